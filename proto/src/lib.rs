//! Wire contracts: the gRPC APIs of Meridio (`nsp`, `ipam`, `ambassador`, `loadbalancer`), and beside them those of Network
//! Service Mesh (`nsm`) and of the SPIFFE Workload API (`spiffe`), which live in `nsm-proto`. Field numbers, package names and
//! method paths are those of the original projects; nothing but generated code lives here.
#![allow(clippy::all, clippy::pedantic)]

pub use nsm_proto as nsm;
pub use nsm_proto::spiffe;

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
