//! Chooses how a connection is carried.

use crate::{CloseCall, Connection, Element, Error, Mechanism, Next, RequestCall, Side, path};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Hands a connection to the element for its mechanism's type; without a mechanism the caller's preferences are tried
/// in their order.
pub struct Mechanisms {
    side: Side,
    elements: BTreeMap<String, Arc<dyn Element>>,
}

const NAME: &str = "mechanisms";

impl Mechanisms {
    /// An element without any mechanism.
    pub fn new(side: Side) -> Self {
        Self { side, elements: BTreeMap::new() }
    }

    /// Supports the type `kind` ("KERNEL", "NOOP", ...) by an element.
    #[must_use]
    pub fn with(mut self, kind: impl Into<String>, element: impl Element) -> Self {
        self.elements.insert(kind.into(), Arc::new(element));
        self
    }

    /// Tells the outside which interface carries the connection, once.
    fn note(&self, connection: &mut Connection) {
        let Some(mechanism) = &connection.mechanism else { return };
        let name = mechanism.parameters.get("name").map_or("unknown", String::as_str);
        let value = format!("{}/{name}", mechanism.r#type);
        let key = match self.side {
            Side::Client => "client_interface",
            Side::Server => "server_interface",
        };
        if let Some(segment) = path::segment_mut(connection, 0) {
            segment.metrics.entry(key.to_owned()).or_insert(value);
        }
    }
}

fn unsupported(id: &str, causes: Vec<Error>) -> Error {
    Error::many(NAME, id, "cannot support any of the requested mechanism", causes)
}

#[async_trait::async_trait]
impl Element for Mechanisms {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let id = call.id().to_owned();
        if let Some(mechanism) = &call.connection_mut().mechanism {
            let Some(element) = self.elements.get(&mechanism.r#type) else {
                return Err(Error::new(NAME, id, format!("unsupported mechanism {}", mechanism.r#type)));
            };
            let mut connection = element.request(call, next).await?;
            self.note(&mut connection);
            return Ok(connection);
        }
        let (mut causes, mut tried) = (Vec::new(), BTreeSet::new());
        for preference in call.message.mechanism_preferences.clone() {
            let Some(element) = self.elements.get(&preference.r#type) else { continue };
            // A client element lets the other side choose: one attempt covers all preferences of its type.
            if self.side == Side::Client && !tried.insert(preference.r#type.clone()) {
                continue;
            }
            let mut attempt = call.clone();
            if self.side == Side::Server {
                attempt.connection_mut().mechanism = Some(preference);
            }
            match element.request(attempt, next.clone()).await {
                Ok(mut connection) => {
                    self.note(&mut connection);
                    return Ok(connection);
                }
                Err(error) => causes.push(error),
            }
        }
        if self.side == Side::Client && call.message.mechanism_preferences.is_empty() {
            // The client elements append the preferences themselves.
            return self.request_first(call, next).await;
        }
        Err(unsupported(&id, causes))
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let kind = call.message.mechanism.as_ref().map(|mechanism: &Mechanism| mechanism.r#type.as_str());
        match kind.and_then(|kind| self.elements.get(kind)) {
            Some(element) => element.close(call, next).await,
            None => {
                let error = unsupported(call.id(), Vec::new());
                next.close(call).await.and(Err(error))
            }
        }
    }
}

impl Mechanisms {
    /// A client without preferences offers what it supports.
    async fn request_first(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let id = call.id().to_owned();
        let mut last = unsupported(&id, Vec::new());
        for element in self.elements.values() {
            match element.request(call.clone(), next.clone()).await {
                Ok(mut connection) => {
                    self.note(&mut connection);
                    return Ok(connection);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, PathSegment,
        core::testing::{Spy, request_with},
        elements::null::Null,
    };

    fn mechanism(kind: &str) -> Mechanism {
        Mechanism { r#type: kind.into(), ..Default::default() }
    }

    fn request(chosen: Option<&str>, preferences: &[&str]) -> RequestCall {
        let path = crate::Path { index: 0, path_segments: vec![PathSegment::default()] };
        let connection =
            Connection { id: "c".into(), mechanism: chosen.map(mechanism), path: Some(path), ..Default::default() };
        let mut call = request_with(connection);
        call.message.mechanism_preferences = preferences.iter().map(|kind| mechanism(kind)).collect();
        call
    }

    // Conformance 85
    #[tokio::test]
    async fn the_first_supported_preference_wins() {
        let spy = Arc::new(Spy::default());
        let mechanisms = Mechanisms::new(Side::Server).with("KERNEL", Null).with("NOOP", Null);
        let chain = Chain::builder().element(mechanisms).element(spy.clone()).build();
        let kind = |connection: Connection| connection.mechanism.unwrap().r#type;

        let connection = chain.request(request(None, &["VXLAN", "KERNEL", "NOOP"])).await.unwrap();
        let metrics = &connection.path.as_ref().unwrap().path_segments[0].metrics;
        assert_eq!(metrics["server_interface"], "KERNEL/unknown");
        assert_eq!((kind(connection), spy.requests()), ("KERNEL".to_owned(), 1));
        let set = chain.request(request(Some("NOOP"), &["KERNEL"])).await.unwrap();
        assert_eq!(kind(set), "NOOP");

        let error = chain.request(request(Some("VXLAN"), &["KERNEL"])).await.unwrap_err();
        assert!(error.to_string().contains("unsupported mechanism"));
        let error = chain.request(request(None, &["VXLAN"])).await.unwrap_err();
        assert!(error.to_string().contains("cannot support any of the requested mechanism"));

        spy.fail_requests(true);
        let before = spy.requests();
        let error = chain.request(request(None, &["KERNEL", "NOOP"])).await.unwrap_err();
        assert_eq!(spy.requests() - before, 2);
        assert!(error.to_string().contains("told to fail"));
    }

    // Conformance 85
    #[tokio::test]
    async fn close_needs_a_known_mechanism_but_goes_on() {
        let spy = Arc::new(Spy::default());
        let mechanisms = Mechanisms::new(Side::Server).with("KERNEL", Null);
        let chain = Chain::builder().element(mechanisms).element(spy.clone()).build();
        let close = |mechanism| Connection { id: "c".into(), mechanism, ..Default::default() };
        chain.close(CloseCall::new(close(Some(mechanism("KERNEL"))), crate::Context::new())).await.unwrap();
        chain.close(CloseCall::new(close(None), crate::Context::new())).await.unwrap_err();
        assert_eq!(spy.closes(), 2);
    }
}
