//! Other labels for the next hop than the caller's.

use crate::{CloseCall, Connection, Element, Error, Next, RequestCall};
use std::collections::BTreeMap;

/// Below it a connection has these labels, above it those of the caller. For endpoints that pass connections on: the labels say which
/// stage of a service is next.
#[derive(Clone, Debug, Default)]
pub struct ReplaceLabels(BTreeMap<String, String>);

impl ReplaceLabels {
    /// An element that asks the next hop with these labels.
    pub fn new(labels: impl IntoIterator<Item = (String, String)>) -> Self {
        Self(labels.into_iter().collect())
    }
}

#[async_trait::async_trait]
impl Element for ReplaceLabels {
    fn name(&self) -> &'static str {
        "replacelabels"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let callers = std::mem::replace(&mut call.connection_mut().labels, self.0.clone());
        let mut connection = next.request(call).await?;
        connection.labels = callers;
        Ok(connection)
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        call.message.labels.clone_from(&self.0);
        next.close(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context,
        core::testing::{Spy, request_with},
    };
    use std::sync::Arc;

    fn labels(value: &str) -> BTreeMap<String, String> {
        [("app".to_owned(), value.to_owned())].into()
    }

    // Conformance 106
    #[tokio::test]
    async fn each_side_has_its_own_labels() {
        let spy = Arc::new(Spy::default());
        let chain = Chain::builder().element(ReplaceLabels::new(labels("filter"))).element(spy.clone()).build();
        let connection = Connection { id: "c".into(), labels: labels("client"), ..Default::default() };
        for _ in 0..2 {
            let answer = chain.request(request_with(connection.clone())).await.unwrap();
            assert_eq!(answer.labels, labels("client"));
            assert_eq!(spy.last_request().connection.unwrap().labels, labels("filter"));
        }
        chain.close(CloseCall::new(connection, Context::new())).await.unwrap();
        assert_eq!(spy.last_close().labels, labels("filter"));
    }
}
