//! A next hop that is reached already.

use crate::{CloseCall, Connection, Element, Error, Next, REMOTE, Remote, RequestCall};

/// Uses a fixed remote, owned by whoever made the chain. `None` leaves reaching the next hop to `dial`.
#[derive(Clone, Debug)]
pub struct ClientConn(Option<Remote>);

impl ClientConn {
    /// An element with this remote.
    pub fn new(remote: Option<Remote>) -> Self {
        Self(remote)
    }
}

const NAME: &str = "clientconn";

#[async_trait::async_trait]
impl Element for ClientConn {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        if let Some(remote) = &self.0 {
            call.ctx.metadata(NAME, call.id())?.insert(&REMOTE, remote.clone());
            call.ctx.remote = Some(remote.clone());
        }
        next.request(call).await
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        let Some(remote) = &self.0 else { return next.close(call).await };
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        call.ctx.remote = Some(remote.clone());
        let result = next.close(call).await;
        metadata.remove(&REMOTE);
        result
    }
}
