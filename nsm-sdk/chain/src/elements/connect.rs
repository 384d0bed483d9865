//! The call to the next hop, and the chain that makes it.

use crate::{
    Chain, CloseCall, Connection, Context, Element, Error, Key, Next, REMOTE, Remote, RequestCall, Side, unwind,
};
use std::time::Duration;
use tonic::{Code, Status};

const NAME: &str = "connect";
/// Bound for calls without a deadline: the line of a connection is never held for ever.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Last element of a client chain: calls the remote of the context.
#[derive(Clone, Copy, Debug, Default)]
pub struct Connect;

/// The remote a call goes to.
fn remote(ctx: &Context, id: &str) -> Result<Remote, Error> {
    let known = || ctx.metadata.as_ref()?.get(&REMOTE);
    ctx.remote.clone().or_else(known).ok_or_else(|| {
        Error::new(NAME, id, "no grpc.ClientConnInterface provided: the next hop is not connected")
            .with_code(Code::Unavailable)
    })
}

async fn bounded<T>(
    ctx: &Context,
    id: &str,
    url: &str,
    call: impl Future<Output = Result<T, Status>>,
) -> Result<T, Error> {
    match ctx.bounded(DEFAULT_TIMEOUT, call).await {
        Ok(result) => result.map_err(|status| Error::remote(NAME, id, url, status)),
        Err(Code::Cancelled) => {
            Err(Error::new(NAME, id, "given up because a close is waiting").with_code(Code::Cancelled))
        }
        Err(_) => Err(Error::deadline(NAME, id, url)),
    }
}

#[async_trait::async_trait]
impl Element for Connect {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let (id, deadline) = (call.id().to_owned(), call.ctx.deadline_or(DEFAULT_TIMEOUT));
        let remote = remote(&call.ctx, &id)?;
        let request = remote.request((*call.message).clone(), Some(deadline));
        let connection = bounded(&call.ctx, &id, remote.url(), request).await?;
        call.message.connection = Some(connection);
        next.request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let (id, deadline) = (call.id().to_owned(), call.ctx.deadline_or(DEFAULT_TIMEOUT));
        let result = match remote(&call.ctx, &id) {
            Ok(remote) => {
                let close = remote.close((*call.message).clone(), Some(deadline));
                bounded(&call.ctx, &id, remote.url(), close).await
            }
            Err(error) => Err(error),
        };
        next.close(call).await.and(result)
    }
}

/// In an endpoint that passes connections on: first the client chain, then the rest of the own chain with what the
/// client chain returned.
pub struct ConnectServer {
    client: Chain,
    /// Set once a request has gone through.
    established: Key<bool>,
}

impl ConnectServer {
    /// An element around this client chain.
    pub fn new(client: Chain) -> Self {
        Self { client, established: Key::new(Side::Server) }
    }
}

#[async_trait::async_trait]
impl Element for ConnectServer {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let (postponed, metadata) = (call.ctx.postpone(), call.ctx.metadata.clone().unwrap_or_default());
        let connection = self.client.request(call.clone()).await?;
        call.message.connection = Some(connection.clone());
        match next.request(call).await {
            Ok(connection) => {
                metadata.insert(&self.established, true);
                Ok(connection)
            }
            // A failing refresh leaves what works.
            Err(error) if metadata.contains(&self.established) => Err(error),
            Err(error) => {
                let client = self.client.followed_by(Next::tail());
                Err(unwind(&client, connection, &postponed, error).await)
            }
        }
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let client = self.client.close(call.clone()).await;
        let server = next.close(call).await;
        match (client, server) {
            (Err(client), Err(server)) => Err(client.also("and", &server)),
            (client, server) => client.and(server),
        }
    }
}
