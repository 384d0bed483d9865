//! Wire contracts: the gRPC APIs of Network Service Mesh (`nsm`), of Meridio (`nsp`, `ipam`,
//! `ambassador`, `loadbalancer`) and of the SPIFFE Workload API (`spiffe`). Field numbers, package
//! names and method paths are those of the original projects; nothing but generated code lives here.
#![allow(clippy::all, clippy::pedantic)]

/// Network Service Mesh: requests, connections, monitoring and the registries.
pub mod nsm {
    pub mod connection {
        tonic::include_proto!("connection");
    }
    pub mod connectioncontext {
        tonic::include_proto!("connectioncontext");
    }
    pub mod networkservice {
        tonic::include_proto!("networkservice");
    }
    pub mod registry {
        tonic::include_proto!("registry");
    }
}

/// Network service platform: configuration watches and the target registry.
pub mod nsp {
    pub mod v1 {
        tonic::include_proto!("nsp.v1");
    }
}

/// Address allocation for conduits.
pub mod ipam {
    pub mod v1 {
        tonic::include_proto!("ipam.v1");
    }
}

/// The side-car API of applications.
pub mod ambassador {
    pub mod v1 {
        tonic::include_proto!("ambassador.v1");
    }
}

/// Stream availability between load balancer and frontend.
pub mod loadbalancer {
    pub mod v1 {
        tonic::include_proto!("loadbalancer.v1");
    }
}

/// The SPIFFE Workload API.
pub mod spiffe {
    tonic::include_proto!("_");
}
