//! The call to the next hop, and the chain that makes it.

use crate::{
    Chain, CloseCall, Connection, Context, Element, Error, Key, Next, REMOTE, Remote, RequestCall, Side, State,
    path::{self, PathError},
    unwind,
};
use std::{sync::Arc, time::Duration};
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

/// Gives an answer the index and the id that this process asked with, if its path is that of what was asked for. This is the place
/// where an answer comes in: nothing above remembers a wrong one, whether a caller or a replayed event has asked.
fn own_view(asked: &Connection, answer: &mut Connection) -> Result<(), PathError> {
    match path::segment(asked, 0) {
        Some(own) => path::restore(answer, path::index(asked), &own.id),
        // Without `updatepath` there is no own segment.
        None => Ok(()),
    }
}

/// Whether it is a refresh of what may work still.
fn established(call: &RequestCall) -> bool {
    let before = call.ctx.factory.as_ref().is_some_and(|factory| factory.generation() > 0);
    call.ctx.refresh || before && call.connection().state() != State::ReselectRequested
}

#[async_trait::async_trait]
impl Element for Connect {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let (id, deadline) = (call.id().to_owned(), call.ctx.deadline_or(DEFAULT_TIMEOUT));
        let remote = remote(&call.ctx, &id)?;
        let postponed = call.ctx.postpone();
        let request = remote.request((*call.message).clone(), Some(deadline));
        let mut connection = bounded(&call.ctx, &id, remote.url(), request).await?;
        if let Err(error) = own_view(&call.connection(), &mut connection) {
            let text = format!("{} answers with a wrong path: {error}", remote.url());
            let error = Error::new(NAME, id, text).with_code(Code::Internal);
            if established(&call) {
                return Err(error);
            }
            let next = next.above(Arc::new(*self));
            return Err(unwind(&next, call.connection().into_owned(), &postponed, error).await);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Client, NetworkServiceRequest, Path,
        core::testing::{Hop, HopConnector, request_id},
    };

    const TIMEOUT: Duration = Duration::from_secs(15);

    type Change = fn(&mut Connection);

    // Bad input 1
    #[tokio::test(start_paused = true)]
    async fn an_answer_with_a_wrong_path_is_an_error_and_is_never_kept() {
        let foreign = |connection: &mut Connection| {
            connection.path.as_mut().unwrap().path_segments[0].id = "d".into();
            connection.id = "d".into();
        };
        let cases: [(Change, &str); 3] = [
            (|connection| connection.path = None, "None"),
            (|connection| connection.path = Some(Path::default()), "None"),
            (foreign, "Some(\"d\")"),
        ];
        for (wrong, found) in cases {
            let hop = Arc::new(Hop::default());
            let client =
                Client::builder("nsc", Arc::new(HopConnector(hop.clone()))).url("unix:///mgr").passthrough().build();
            let refused = |error: Error| {
                let text = format!(
                    "nsc/connect (connection c): unix:///mgr answers with a wrong path: \
                     Path.PathSegments[0].Id=={found} of the answer should be equal \"c\""
                );
                assert_eq!((error.to_string(), error.code()), (text, Code::Internal));
            };
            *hop.answer.lock().unwrap() = Some(wrong);
            refused(client.request(*request_id("c", Context::new()).message, TIMEOUT).await.unwrap_err());
            assert!(client.connection("c").is_none());
            let closed = hop.closes.lock().unwrap().pop().unwrap().1;
            assert_eq!((closed.id.as_str(), closed.path.unwrap().path_segments[0].id.as_str()), ("c", "c"));

            // Neither is what works replaced or closed by it.
            *hop.answer.lock().unwrap() = None;
            let connection = client.request(*request_id("c", Context::new()).message, TIMEOUT).await.unwrap();
            *hop.answer.lock().unwrap() = Some(wrong);
            let again = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
            refused(client.request(again, TIMEOUT).await.unwrap_err());
            let kept = client.connection("c").unwrap();
            assert_eq!((hop.closes(), kept.path.unwrap().path_segments[0].id.as_str()), (0, "c"));
        }
    }
}
