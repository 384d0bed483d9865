//! Sends the descriptor of a network namespace beside the message that names it.

use super::kernel_mechanism::{INODE_URL, open};
use crate::{CloseCall, Connection, Element, Error, FdTransceiver, Mechanism, Next, RequestCall, State, unwind};
use std::collections::HashMap;

/// Towards the next hop: `file://` URLs of namespaces become `inode://` URLs, with the descriptor queued on the
/// connection that `dial` made. Transports that carry no descriptors leave URLs as they are.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendFdClient;

/// Towards the caller: the same with the answer's mechanism.
#[derive(Clone, Copy, Debug, Default)]
pub struct SendFdServer;

const NAME: &str = "sendfd";

/// `inode://` URLs that were sent, with the `file://` URLs they stand for.
type Sent = HashMap<String, String>;

fn send(fds: &FdTransceiver, mechanism: &mut Mechanism, id: &str, sent: &mut Sent) -> Result<(), Error> {
    let Some(url) = mechanism.parameters.get_mut(INODE_URL).filter(|url| url.starts_with("file:")) else {
        return Ok(());
    };
    let failed = |what: &str, error: std::io::Error| Error::new(NAME, id, format!("{what} {url}: {error}"));
    let fd = open(url).map_err(|error| failed("cannot open", error))?;
    let (dev, ino) = fds.queue(fd).map_err(|error| failed("cannot send the descriptor of", error))?;
    let inode = format!("inode://{dev}/{ino}");
    sent.insert(inode.clone(), std::mem::replace(url, inode));
    Ok(())
}

#[async_trait::async_trait]
impl Element for SendFdClient {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let Some(fds) = call.ctx.remote.as_ref().and_then(|remote| remote.fds()) else {
            return next.request(call).await;
        };
        let (id, mut sent) = (call.id().to_owned(), Sent::new());
        let request = &mut call.message;
        let chosen = request.connection.as_mut().and_then(|connection| connection.mechanism.as_mut());
        for mechanism in request.mechanism_preferences.iter_mut().chain(chosen) {
            send(&fds, mechanism, &id, &mut sent)?;
        }
        let mut connection = next.request(call).await?;
        let url = connection.mechanism.as_mut().and_then(|mechanism| mechanism.parameters.get_mut(INODE_URL));
        if let Some((url, file)) = url.and_then(|url| sent.remove(url).map(|file| (url, file))) {
            *url = file;
        }
        Ok(connection)
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        let (id, fds) = (call.id().to_owned(), call.ctx.remote.as_ref().and_then(|remote| remote.fds()));
        if let (Some(fds), Some(mechanism)) = (fds, &mut call.message.mechanism) {
            // The namespace may be gone already: a close has to arrive all the same.
            if let Err(error) = send(&fds, mechanism, &id, &mut Sent::new()) {
                tracing::debug!(%error, "closing without the namespace");
            }
        }
        next.close(call).await
    }
}

#[async_trait::async_trait]
impl Element for SendFdServer {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let (fds, postponed) = (call.ctx.fds.clone(), call.ctx.postpone());
        let established = call.ctx.factory.as_ref().is_some_and(|factory| factory.generation() > 0)
            && call.connection().state() != State::ReselectRequested;
        let mut connection = next.request(call).await?;
        if let (Some(fds), Some(mechanism)) = (fds, &mut connection.mechanism)
            && let Err(error) = send(&fds, mechanism, &connection.id, &mut Sent::new())
        {
            // A failing refresh leaves what works.
            return Err(match established {
                true => error,
                false => unwind(&next, connection, &postponed, error).await,
            });
        }
        Ok(connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Connector, Context,
        core::testing::{Hop, HopConnector, Spy, request_id},
    };
    use std::sync::Arc;

    /// A transport that carries no descriptors must not be promised any: who waits for one waits until its deadline.
    #[tokio::test]
    async fn without_descriptors_urls_stay_as_they_are() {
        let connector = HopConnector(Arc::new(Hop::default()));
        let remote = connector.connect("tcp://10.0.0.1:5001", tokio::time::Instant::now()).await.unwrap();
        assert!(remote.fds().is_none());
        let url = "file:///proc/thread-self/ns/net";
        let own = Mechanism { parameters: [(INODE_URL.to_owned(), url.to_owned())].into(), ..Default::default() };
        let spy = Arc::new(Spy::default());
        let chain = Chain::builder().element(SendFdServer).element(SendFdClient).element(spy.clone()).build();
        let mut call = request_id("c", Context { remote: Some(remote), ..Context::new() });
        call.connection_mut().mechanism = Some(own.clone());
        call.message.mechanism_preferences = vec![own.clone()];
        let ctx = call.ctx.clone();
        let connection = chain.request(call).await.unwrap();
        let sent = spy.last_request();
        assert_eq!((&sent.mechanism_preferences[0], sent.connection.unwrap().mechanism.as_ref()), (&own, Some(&own)));
        assert_eq!(connection.mechanism, Some(own.clone()), "nor towards the caller");
        chain.close(CloseCall::new(connection, ctx)).await.unwrap();
        assert_eq!(spy.last_close().mechanism, Some(own));
    }
}
