#![doc = include_str!("../README.md")]

mod client;
mod endpoint;
mod error;
mod service;
mod settings;
mod shutdown;

pub use client::{Client, ClientBuilder};
pub use endpoint::{Endpoint, EndpointBuilder};
pub use error::Error;
pub use service::ServiceUrl;
pub use settings::DEFAULT_MANAGER;

/// For implementations of [`Element`].
pub use async_trait::async_trait;
pub use nsm_chain as chain;
pub use nsm_chain::{
    CloseCall, Connection, Element, Key, Next, RequestCall, Side,
    elements::{self, heal::ConnectionStatus},
    registry::{NetworkService, NetworkServiceEndpoint},
    unwind,
};
pub use nsm_registry::ClientPolicies;

#[cfg(test)]
fn test_source() -> nsm_identity::X509Source {
    let authority = nsm_identity::Authority::generate("example.org").unwrap();
    authority.source("/test", std::time::Duration::from_secs(3600)).unwrap()
}
