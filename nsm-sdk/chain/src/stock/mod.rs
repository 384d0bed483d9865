//! The chains of an endpoint and of a client, in the order that NSM documents.

mod client;
mod endpoint;
mod observe;

pub use client::{Client, ClientBuilder};
pub use endpoint::{Endpoint, EndpointBuilder};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        core::testing::{Hop, HopConnector, tokens},
        elements::{null::Null, retry::Retry},
    };
    use std::sync::Arc;

    fn client() -> ClientBuilder {
        Client::builder("nsc", Arc::new(HopConnector(Arc::new(Hop::default())))).element(Null).retry(Retry::default())
    }

    const CLIENT: [&str; 14] = [
        "retry",
        "updatepath",
        "begin",
        "metadata",
        "observe",
        "refresh",
        "clienturl",
        "clientconn",
        "heal",
        "dial",
        "null",
        "authorize",
        "trimpath",
        "connect",
    ];

    #[test]
    fn the_client_chain_has_its_documented_order() {
        assert_eq!(client().build().chain().names(), CLIENT);
        let passthrough: Vec<_> = CLIENT.into_iter().filter(|name| !["refresh", "heal"].contains(name)).collect();
        assert_eq!(client().passthrough().build().chain().names(), passthrough);
    }

    #[test]
    fn the_endpoint_chain_has_its_documented_order() {
        let endpoint = Endpoint::builder("nse", tokens("nse")).element(Null).build();
        let expected =
            ["updatepath", "begin", "updatetoken", "authorize", "metadata", "timeout", "monitor", "trimpath", "null"];
        assert_eq!(endpoint.chain().names(), expected);
    }
}
