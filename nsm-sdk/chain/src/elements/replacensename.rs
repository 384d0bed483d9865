//! Another endpoint for the next hop than the one that the caller has asked for.

use crate::{CloseCall, Connection, Element, Error, Key, Next, RequestCall, Side};

/// Below it a connection has the endpoint that was found for it there, above it the one that the caller has asked for: this one. For
/// endpoints that pass connections on. What is found stays with the connection, until the next hop is asked for another one.
#[derive(Debug)]
pub struct ReplaceNseName(Key<String>);

const NAME: &str = "replacensename";

impl Default for ReplaceNseName {
    fn default() -> Self {
        Self::new()
    }
}

impl ReplaceNseName {
    /// An element that remembers nothing yet.
    pub fn new() -> Self {
        Self(Key::new(Side::Client))
    }
}

#[async_trait::async_trait]
impl Element for ReplaceNseName {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        let found = metadata.get(&self.0).unwrap_or_default();
        let callers = std::mem::replace(&mut call.connection_mut().network_service_endpoint_name, found);
        let mut connection = next.request(call).await?;
        metadata.insert(&self.0, std::mem::replace(&mut connection.network_service_endpoint_name, callers));
        Ok(connection)
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        let found = call.ctx.metadata(NAME, call.id())?.remove(&self.0);
        call.message.network_service_endpoint_name = found.unwrap_or_default();
        next.close(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context,
        core::testing::{Spy, request_with},
        elements::metadata::MetadataElement,
    };
    use std::sync::Arc;

    /// Finds an endpoint for a connection that has none.
    struct Finds;

    #[async_trait::async_trait]
    impl Element for Finds {
        fn name(&self) -> &'static str {
            "finds"
        }

        async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
            let name = &mut call.connection_mut().network_service_endpoint_name;
            if name.is_empty() {
                "next".clone_into(name);
            }
            next.request(call).await
        }
    }

    // Conformance 106
    #[tokio::test]
    async fn each_side_has_its_own_endpoint() {
        let spy = Arc::new(Spy::default());
        let chain = Chain::builder()
            .element(MetadataElement::new())
            .element(ReplaceNseName::new())
            .element(spy.clone())
            .element(Finds)
            .build();
        let own = || Connection { id: "c".into(), network_service_endpoint_name: "own".into(), ..Default::default() };
        let asked = || spy.last_request().connection.unwrap().network_service_endpoint_name;
        spy.fail_requests(true);
        chain.request(request_with(own())).await.unwrap_err();
        spy.fail_requests(false);
        // At first nothing is known of the next hop, then what it has found.
        for expected in ["", "next"] {
            let answer = chain.request(request_with(own())).await.unwrap();
            assert_eq!((answer.network_service_endpoint_name.as_str(), asked().as_str()), ("own", expected));
        }
        chain.close(CloseCall::new(own(), Context::new())).await.unwrap();
        assert_eq!(spy.last_close().network_service_endpoint_name, "next");
        chain.request(request_with(own())).await.unwrap();
        assert_eq!(asked(), "", "a closed connection is forgotten");
    }
}
