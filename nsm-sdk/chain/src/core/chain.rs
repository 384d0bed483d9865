//! An ordered list of elements.

use crate::core::{CloseCall, Element, Error, Next, Operation, Outcome, RequestCall};
use futures_util::future::BoxFuture;
use nsm_proto::connection::Connection;
use std::{
    fmt,
    sync::Arc,
    task::{self, Poll},
};
use tower::Service;

/// Elements in the order a request travels, with a tail that answers with the request's connection.
///
/// A chain is a `Clone` `tower` service, and an [`Element`] itself: inside another chain it is followed by what
/// stands below it there.
#[derive(Clone)]
pub struct Chain {
    elements: Arc<[Arc<dyn Element>]>,
    head: Next,
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.elements.iter().map(|element| element.name())).finish()
    }
}

impl Chain {
    /// A chain of these elements.
    pub fn new(elements: impl IntoIterator<Item = Arc<dyn Element>>) -> Self {
        let elements: Arc<[_]> = elements.into_iter().collect();
        let head = stack(&elements, Next::tail());
        Self { elements, head }
    }

    /// Starts an empty list; add to it with [`ChainBuilder::element`].
    pub fn builder() -> ChainBuilder {
        ChainBuilder::default()
    }

    /// Establishes or refreshes a connection.
    pub async fn request(&self, call: RequestCall) -> Result<Connection, Error> {
        self.head.request(call).await
    }

    /// Ends a connection.
    pub async fn close(&self, call: CloseCall) -> Result<(), Error> {
        self.head.close(call).await
    }

    /// This chain with `next` in place of its tail.
    pub fn followed_by(&self, next: Next) -> Next {
        stack(&self.elements, next)
    }

    /// The names of its elements, in order.
    pub fn names(&self) -> Vec<&'static str> {
        self.elements.iter().map(|element| element.name()).collect()
    }
}

fn stack(elements: &[Arc<dyn Element>], tail: Next) -> Next {
    elements.iter().rev().fold(tail, |next, element| next.above(element.clone()))
}

/// Collects elements top to bottom.
#[derive(Default)]
pub struct ChainBuilder(Vec<Arc<dyn Element>>);

impl ChainBuilder {
    /// Adds an element below the others.
    #[must_use]
    pub fn element(mut self, element: impl Element) -> Self {
        self.0.push(Arc::new(element));
        self
    }

    /// Adds an element if there is one.
    #[must_use]
    pub fn maybe(self, element: Option<impl Element>) -> Self {
        match element {
            Some(element) => self.element(element),
            None => self,
        }
    }

    /// Adds elements that are shared already.
    #[must_use]
    pub fn extend(mut self, elements: impl IntoIterator<Item = Arc<dyn Element>>) -> Self {
        self.0.extend(elements);
        self
    }

    /// The chain.
    pub fn build(self) -> Chain {
        Chain::new(self.0)
    }
}

#[async_trait::async_trait]
impl Element for Chain {
    fn name(&self) -> &'static str {
        "chain"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.followed_by(next).request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.followed_by(next).close(call).await
    }
}

impl Service<Operation> for Chain {
    type Response = Outcome;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Outcome, Error>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, operation: Operation) -> Self::Future {
        self.head.call(operation)
    }
}

#[cfg(test)]
mod tests;
