//! Stock chains of a node: manager and kernel forwarder.
