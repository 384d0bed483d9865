//! The chains of an endpoint and of a client, in the order that NSM documents.

mod client;
mod endpoint;
mod observe;

pub use client::{Client, ClientBuilder};
pub use endpoint::{Endpoint, EndpointBuilder};
