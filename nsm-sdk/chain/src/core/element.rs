//! Elements, and what stands below them.

use crate::core::{CloseCall, Error, Operation, Outcome, Postponed, RequestCall};
use futures_util::future::BoxFuture;
use nsm_proto::connection::Connection;
use std::{
    any::Any,
    fmt,
    sync::Arc,
    task::{self, Poll},
};
use tower::{Layer, Service, ServiceExt};

/// One link of a chain.
///
/// ```
/// use nsm_chain::{Connection, Element, Error, Next, RequestCall};
///
/// /// Gives every connection a label.
/// struct Label(&'static str, String);
///
/// #[async_trait::async_trait]
/// impl Element for Label {
///     fn name(&self) -> &'static str {
///         "label"
///     }
///
///     async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
///         call.connection_mut().labels.insert(self.0.into(), self.1.clone());
///         next.request(call).await
///     }
/// }
/// ```
///
/// Rules: pass errors of `next` on as they are, after undoing what this element itself did on the way down; when
/// failing *after* `next` succeeded, close what it made ([`unwind`]); a close always goes on down the chain, even
/// if the own clean-up fails; waits end at `ctx.deadline`; state of a connection lives in
/// [`Metadata`](crate::Metadata) under a [`Key`](crate::Key) made in the constructor; background work is a
/// [`Task`](crate::Task) in that metadata, so that it ends with the connection.
#[async_trait::async_trait]
pub trait Element: Send + Sync + 'static {
    /// Short lower-case name for errors and logs.
    fn name(&self) -> &'static str;

    /// Establishes or refreshes a connection.
    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        next.request(call).await
    }

    /// Ends a connection.
    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        next.close(call).await
    }
}

#[async_trait::async_trait]
impl<E: Element + ?Sized> Element for Arc<E> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        (**self).request(call, next).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        (**self).close(call, next).await
    }
}

/// What remains of the chain below an element: a boxed `tower` service that is cheap to clone.
#[derive(Clone)]
pub struct Next(Arc<dyn Node>);

trait Node: Send + Sync {
    fn operate(&self, operation: Operation) -> BoxFuture<'static, Result<Outcome, Error>>;
}

impl fmt::Debug for Next {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Next")
    }
}

impl Next {
    /// The end of a chain: a request returns its connection as it is, a close succeeds.
    pub fn tail() -> Self {
        struct Tail;
        impl Node for Tail {
            fn operate(&self, operation: Operation) -> BoxFuture<'static, Result<Outcome, Error>> {
                Box::pin(std::future::ready(Ok(match operation {
                    Operation::Request(call) => Outcome::Connection(call.message.connection.unwrap_or_default()),
                    Operation::Close(_) => Outcome::Closed,
                })))
            }
        }
        Self(Arc::new(Tail))
    }

    /// Any `tower` service as the rest of a chain.
    pub fn service<S>(service: S) -> Self
    where
        S: Service<Operation, Response = Outcome, Error = Error> + Clone + Send + Sync + 'static,
        S::Future: Send,
    {
        struct Tower<S>(S);
        impl<S> Node for Tower<S>
        where
            S: Service<Operation, Response = Outcome, Error = Error> + Clone + Send + Sync + 'static,
            S::Future: Send,
        {
            fn operate(&self, operation: Operation) -> BoxFuture<'static, Result<Outcome, Error>> {
                Box::pin(self.0.clone().oneshot(operation))
            }
        }
        // A `Next` needs no second box.
        match (&service as &dyn Any).downcast_ref::<Next>() {
            Some(next) => next.clone(),
            None => Self(Arc::new(Tower(service))),
        }
    }

    /// `element` above this.
    pub fn above(self, element: Arc<dyn Element>) -> Self {
        struct Link {
            element: Arc<dyn Element>,
            next: Next,
        }
        impl Node for Link {
            fn operate(&self, operation: Operation) -> BoxFuture<'static, Result<Outcome, Error>> {
                let (element, next) = (self.element.clone(), self.next.clone());
                Box::pin(async move {
                    match operation {
                        Operation::Request(call) => element.request(call, next).await.map(Outcome::Connection),
                        Operation::Close(call) => element.close(call, next).await.map(|()| Outcome::Closed),
                    }
                })
            }
        }
        Self(Arc::new(Link { element, next: self }))
    }

    /// Runs either operation.
    pub async fn operate(&self, operation: Operation) -> Result<Outcome, Error> {
        self.0.operate(operation).await
    }

    /// Requests from the rest of the chain.
    pub async fn request(&self, call: RequestCall) -> Result<Connection, Error> {
        match self.0.operate(Operation::Request(call)).await? {
            Outcome::Connection(connection) => Ok(connection),
            Outcome::Closed => Err(Error::new("chain", "", "a request was answered as if it were a close")),
        }
    }

    /// Closes in the rest of the chain.
    pub async fn close(&self, call: CloseCall) -> Result<(), Error> {
        self.0.operate(Operation::Close(call)).await.map(|_| ())
    }
}

impl Service<Operation> for Next {
    type Response = Outcome;
    type Error = Error;
    type Future = BoxFuture<'static, Result<Outcome, Error>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, operation: Operation) -> Self::Future {
        self.0.operate(operation)
    }
}

/// An element as a `tower` layer, to stand among layers that know nothing of NSM.
#[derive(Clone)]
pub struct ElementLayer(Arc<dyn Element>);

impl ElementLayer {
    /// Wraps an element.
    pub fn new(element: impl Element) -> Self {
        Self(Arc::new(element))
    }
}

impl<S> Layer<S> for ElementLayer
where
    S: Service<Operation, Response = Outcome, Error = Error> + Clone + Send + Sync + 'static,
    S::Future: Send,
{
    type Service = Next;

    fn layer(&self, inner: S) -> Next {
        Next::service(inner).above(self.0.clone())
    }
}

/// Closes what `next` has made, for an element that fails after it; returns the error to answer with.
///
/// A connection that was established before this request is left alone: its data path works, and its client asks again.
pub async fn unwind(next: &Next, connection: Connection, postponed: &Postponed, error: Error) -> Error {
    if postponed.is_refresh() {
        return error;
    }
    match next.close(CloseCall::new(connection, postponed.context())).await {
        Ok(()) => error,
        Err(close) => error.also("connection closed with error", &close),
    }
}
