//! Chooses among elements.

use crate::{CloseCall, Connection, Context, Element, Error, Next, RequestCall};
use std::sync::Arc;

/// Decides whether a case applies to a connection.
pub type Condition = dyn Fn(&Context, &Connection) -> bool + Send + Sync;

/// The first case whose condition holds handles the call; without one the call just goes on.
#[derive(Default)]
pub struct SwitchCase(Vec<(Arc<Condition>, Arc<dyn Element>)>);

impl SwitchCase {
    /// An element without cases.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a case after the others.
    #[must_use]
    pub fn case(
        mut self,
        condition: impl Fn(&Context, &Connection) -> bool + Send + Sync + 'static,
        element: impl Element,
    ) -> Self {
        self.0.push((Arc::new(condition), Arc::new(element)));
        self
    }

    fn choose(&self, ctx: &Context, connection: &Connection) -> Option<&Arc<dyn Element>> {
        self.0.iter().find(|(condition, _)| condition(ctx, connection)).map(|(_, element)| element)
    }
}

#[async_trait::async_trait]
impl Element for SwitchCase {
    fn name(&self) -> &'static str {
        "switchcase"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        match self.choose(&call.ctx, &call.connection()) {
            Some(element) => element.request(call, next).await,
            None => next.request(call).await,
        }
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        match self.choose(&call.ctx, &call.message) {
            Some(element) => element.close(call, next).await,
            None => next.close(call).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain,
        core::testing::{Spy, close, request_id},
    };

    // Conformance 106
    #[tokio::test]
    async fn the_first_true_case_runs() {
        let spies: [Arc<Spy>; 3] = Default::default();
        let switch = SwitchCase::new()
            .case(|_, connection| connection.id == "a", spies[0].clone())
            .case(|_, connection| connection.id != "c", spies[1].clone());
        let chain = Chain::builder().element(switch).element(spies[2].clone()).build();
        for id in ["a", "b", "c"] {
            chain.request(request_id(id, Context::new())).await.unwrap();
            close(&chain, id).await.unwrap();
        }
        assert_eq!(spies.each_ref().map(|spy| spy.requests()), [1, 1, 3]);
        assert_eq!(spies.each_ref().map(|spy| spy.closes()), [1, 1, 3]);
    }
}
