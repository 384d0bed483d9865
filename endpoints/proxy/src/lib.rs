//! Per-node bridge between the targets of a conduit and its load balancers.
