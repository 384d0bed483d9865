//! Tells subscribers how connections are, and learns it from the next hop.

mod hub;
pub mod selector;

pub use hub::{HUB, Hub, Subscription};

use crate::{
    CloseCall, Connection, ConnectionEventType, Element, Error, Key, Next, REMOTE, Remote, RequestCall, Side, State,
    Task,
};
use futures_util::StreamExt;

/// Announces every result in its [`Hub`]. If the process passes connections on to a next hop, it watches that hop and
/// announces what happens there, and DOWN when the hop is lost.
pub struct Monitor {
    hub: Hub,
    watcher: Key<Option<Task>>,
}

const NAME: &str = "monitor";

impl Monitor {
    /// An element that announces in `hub`.
    pub fn new(hub: Hub) -> Self {
        Self { hub, watcher: Key::new(Side::Server) }
    }
}

/// Announces what the next hop says about `own`, until the stream ends.
async fn watch(hub: Hub, remote: Remote, mut own: Connection) {
    let cause = match remote.monitor(selector::of(&own)).await {
        // Not every next hop has a monitor; the request was fine.
        Err(status) => return tracing::info!(id = own.id, url = remote.url(), %status, "cannot monitor the next hop"),
        Ok(mut events) => loop {
            let event = match events.next().await {
                Some(Ok(event)) => event,
                Some(Err(status)) => break status.to_string(),
                None => break "the stream has ended".to_owned(),
            };
            let Some(new) = selector::translate(&own, &event) else { continue };
            let initial = event.r#type() == ConnectionEventType::InitialStateTransfer;
            if new == own || (initial && new.state() == own.state()) {
                continue;
            }
            tracing::info!(id = own.id, state = new.state().as_str_name(), "the next hop reports a change");
            own = new;
            hub.update(own.clone());
        },
    };
    tracing::info!(id = own.id, url = remote.url(), cause, "lost sight of the next hop");
    own.set_state(State::Down);
    hub.update(own);
}

#[async_trait::async_trait]
impl Element for Monitor {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        let watched = metadata.remove(&self.watcher).flatten().is_some();
        metadata.insert(&HUB, self.hub.clone());
        let before = call.connection().into_owned();
        match next.request(call).await {
            Ok(connection) => {
                self.hub.update(connection.clone());
                if let Some(remote) = metadata.get(&REMOTE) {
                    let task = Task::spawn(watch(self.hub.clone(), remote, connection.clone()));
                    metadata.insert(&self.watcher, Some(task));
                }
                Ok(connection)
            }
            Err(error) => {
                if watched {
                    let mut down = before;
                    down.set_state(State::Down);
                    self.hub.update(down);
                }
                Err(error)
            }
        }
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        drop(call.ctx.metadata(NAME, call.id())?.remove(&self.watcher));
        let connection = call.message.clone();
        let result = next.close(call).await;
        self.hub.delete(&connection);
        result
    }
}

#[cfg(test)]
mod tests;
