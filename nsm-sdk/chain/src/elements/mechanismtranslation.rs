//! Keeps the mechanisms of the two sides of a forwarder apart.

use crate::{CloseCall, Connection, Element, Error, Key, Mechanism, Next, RequestCall, Side};

/// Below it a connection has the mechanism of the outgoing side, which it remembers; above it that of the incoming one.
#[derive(Debug)]
pub struct MechanismTranslation(Key<Option<Mechanism>>);

const NAME: &str = "mechanismtranslation";

impl Default for MechanismTranslation {
    fn default() -> Self {
        Self::new()
    }
}

impl MechanismTranslation {
    /// An element without memories.
    pub fn new() -> Self {
        Self(Key::new(Side::Client))
    }
}

#[async_trait::async_trait]
impl Element for MechanismTranslation {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        call.message.mechanism_preferences.clear();
        let outgoing = metadata.get(&self.0).flatten();
        let incoming = std::mem::replace(&mut call.connection_mut().mechanism, outgoing);
        let mut connection = next.request(call).await?;
        metadata.insert(&self.0, std::mem::replace(&mut connection.mechanism, incoming));
        Ok(connection)
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        call.message.mechanism = call.ctx.metadata(NAME, call.id())?.remove(&self.0).flatten();
        next.close(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain,
        core::testing::{Spy, request_with},
        elements::metadata::MetadataElement,
    };
    use std::sync::Arc;

    fn mechanism(kind: &str) -> Option<Mechanism> {
        Some(Mechanism { r#type: kind.into(), ..Default::default() })
    }

    /// Gives a connection without mechanism the type VXLAN.
    struct Vxlan;

    #[async_trait::async_trait]
    impl Element for Vxlan {
        fn name(&self) -> &'static str {
            "vxlan"
        }

        async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
            let connection = call.connection_mut();
            connection.mechanism = connection.mechanism.take().or_else(|| mechanism("VXLAN"));
            next.request(call).await
        }
    }

    // Conformance 89
    #[tokio::test]
    async fn what_fails_first_is_not_remembered_and_what_works_is_kept() {
        let (spy, above) = (Arc::new(Spy::default()), Arc::new(Spy::default()));
        let chain = Chain::builder()
            .element(MetadataElement::new())
            .element(above.clone())
            .element(MechanismTranslation::new())
            .element(spy.clone())
            .element(Vxlan)
            .build();
        let connection = || Connection { id: "c".into(), mechanism: mechanism("KERNEL"), ..Default::default() };
        let outgoing = || spy.last_request().connection.unwrap().mechanism;
        for fails in [true, false] {
            spy.fail_requests(fails);
            assert_eq!(chain.request(request_with(connection())).await.is_err(), fails);
            assert_eq!(outgoing(), None);
        }
        for fails in [true, false] {
            spy.fail_requests(fails);
            assert_eq!(chain.request(request_with(connection())).await.is_err(), fails);
            assert_eq!(outgoing(), mechanism("VXLAN"));
        }
        // What was asked for is as it was.
        assert_eq!(above.last_request().connection.unwrap().mechanism, mechanism("KERNEL"));
    }

    // Conformance 89
    #[tokio::test]
    async fn each_side_keeps_its_own() {
        let spy = Arc::new(Spy::default());
        let chain = Chain::builder()
            .element(MetadataElement::new())
            .element(MechanismTranslation::new())
            .element(spy.clone())
            .element(Vxlan)
            .build();
        let connection = || Connection { id: "c".into(), mechanism: mechanism("KERNEL"), ..Default::default() };
        for outgoing in [None, mechanism("VXLAN")] {
            let returned = chain.request(request_with(connection())).await.unwrap();
            assert_eq!(returned.mechanism, mechanism("KERNEL"));
            assert_eq!(spy.last_request().connection.unwrap().mechanism, outgoing);
        }
        chain.close(CloseCall::new(connection(), crate::Context::new())).await.unwrap();
        assert_eq!(spy.last_close().mechanism, mechanism("VXLAN"));
        chain.request(request_with(connection())).await.unwrap();
        assert_eq!(spy.last_request().connection.unwrap().mechanism, None);
    }
}
