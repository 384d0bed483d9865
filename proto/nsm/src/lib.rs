//! Wire contracts: the gRPC APIs of Network Service Mesh (requests, connections, monitoring, registries) and of the SPIFFE Workload
//! API. Field numbers, package names and method paths are those of the original projects; nothing lives here but generated code and what
//! writes and reads it.
#![allow(clippy::all, clippy::pedantic)]

pub mod codec;

/// Connections, their paths and mechanisms, and the monitor.
pub mod connection {
    tonic::include_proto!("connection");
}

/// What a connection carries: addresses, routes, policies, MTU.
pub mod connectioncontext {
    tonic::include_proto!("connectioncontext");
}

/// Request and close.
pub mod networkservice {
    tonic::include_proto!("networkservice");
}

/// Registries of services and endpoints.
pub mod registry {
    tonic::include_proto!("registry");
}

/// The SPIFFE Workload API.
pub mod spiffe {
    tonic::include_proto!("_");
}
