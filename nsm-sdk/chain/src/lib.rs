//! Network Service Mesh chain of responsibility: one call, one element, one chain.
