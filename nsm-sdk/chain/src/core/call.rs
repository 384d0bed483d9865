//! One operation on its way through a chain.

use crate::core::Context;
use nsm_proto::{connection::Connection, networkservice::NetworkServiceRequest};

/// A message together with everything that travels beside it. Both are in boxes, because each of the dozens of elements that wait for
/// `next` would have room for them in its future: a thousand bytes, several times.
#[derive(Clone, Debug)]
pub struct Call<M> {
    /// What is asked for. Elements change it on its way down.
    pub message: Box<M>,
    /// Deadline, peer, metadata and the like.
    pub ctx: Box<Context>,
}

/// A request for a connection, the first one or a refresh.
pub type RequestCall = Call<NetworkServiceRequest>;
/// The end of a connection.
pub type CloseCall = Call<Connection>;

impl<M> Call<M> {
    /// Puts a message and its context together.
    pub fn new(message: impl Into<Box<M>>, ctx: impl Into<Box<Context>>) -> Self {
        Self { message: message.into(), ctx: ctx.into() }
    }
}

impl Call<NetworkServiceRequest> {
    /// The connection asked for; an absent one is as good as an empty one.
    pub fn connection(&self) -> std::borrow::Cow<'_, Connection> {
        match &self.message.connection {
            Some(connection) => std::borrow::Cow::Borrowed(connection),
            None => std::borrow::Cow::Owned(Connection::default()),
        }
    }

    /// The connection asked for, made if absent.
    pub fn connection_mut(&mut self) -> &mut Connection {
        self.message.connection.get_or_insert_default()
    }

    /// The id of the connection in this process; empty before `updatepath` ran.
    pub fn id(&self) -> &str {
        self.message.connection.as_ref().map_or("", |connection| &connection.id)
    }
}

impl Call<Connection> {
    /// The id of the connection in this process.
    pub fn id(&self) -> &str {
        &self.message.id
    }
}

/// Either operation: the request type of the `tower` services that chains are made of.
#[derive(Clone, Debug)]
pub enum Operation {
    /// Establish or refresh.
    Request(RequestCall),
    /// End.
    Close(CloseCall),
}

impl Operation {
    /// The context of either operation.
    pub fn ctx(&self) -> &Context {
        match self {
            Self::Request(call) => &call.ctx,
            Self::Close(call) => &call.ctx,
        }
    }
}

/// What an [`Operation`] ends in.
#[derive(Clone, Debug, PartialEq)]
// Short-lived, and nearly always the large one.
#[allow(clippy::large_enum_variant)]
pub enum Outcome {
    /// A request's connection.
    Connection(Connection),
    /// A close is done.
    Closed,
}
