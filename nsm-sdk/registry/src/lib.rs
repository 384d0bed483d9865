//! Registries of network services and endpoints: elements, stock chains and clients.
//!
//! * [`chain`]: calls with three operations (register, find, unregister), elements and chains over any kind of [`Object`];
//! * [`elements`]: one module per element;
//! * [`store`]: where a registry keeps its objects (memory, SQLite);
//! * [`stock`]: the registry and the registry part of a manager, in their documented order;
//! * [`service`]: the gRPC services over a chain;
//! * [`RegistryClient`]: registrations that keep themselves alive, watches that survive restarts;
//! * [`matching`]: which endpoints may serve a request.

pub mod chain;
mod client;
pub mod elements;
mod error;
pub mod matching;
mod object;
pub mod path;
pub mod service;
pub mod stock;
pub mod store;
pub mod watch;

pub use chain::{Call, Chain, ClientToken, Context, Element, Events, Factory, Next};
pub use client::{Builder, RegistryClient};
pub use elements::{
    authorize::{ClientPolicies, Policies},
    clientinfo::ClientInfo,
    dial::Dialer,
};
pub use error::Error;
pub use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint, NetworkServiceLabels};
pub use object::{Event, Object, Query};
pub use path::{PathHandle, RegistryPath};
pub use stock::{ManagerRegistry, Registry, Security, Upstream};

/// Compiles the example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeExample;
