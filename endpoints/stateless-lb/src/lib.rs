//! Stateless load balancer of a conduit.
