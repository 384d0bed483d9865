//! The embedded Network Service Mesh of one node: registry, manager and kernel forwarder in one process.
