//! Tells subscribers how connections are, and learns it from the next hop.

mod hub;
pub mod selector;

pub use hub::{HUB, Hub, Subscription};

use crate::{
    CloseCall, Connection, ConnectionEvent, ConnectionEventType, Element, Error, Kept, Key, Next, REMOTE, Remote,
    RequestCall, Side, State, Task,
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
async fn watch(hub: Hub, remote: Remote, mut own: Kept) {
    // In a box, which ends before the long wait begins.
    let opening = Box::pin(async { remote.monitor(selector::of(&own.get())).await });
    let cause = match opening.await {
        // Not every next hop has a monitor; the request was fine.
        Err(status) => {
            let id = own.get().id;
            return tracing::info!(id, url = remote.url(), %status, "cannot monitor the next hop");
        }
        Ok(mut events) => loop {
            let event = match events.next().await {
                Some(Ok(event)) => event,
                Some(Err(status)) => break status.to_string(),
                None => break "the stream has ended".to_owned(),
            };
            match news(&own, &event) {
                News::None => {}
                News::Changed(new) => {
                    tracing::info!(id = new.id, state = new.state().as_str_name(), "the next hop reports a change");
                    own = Kept::new(&new);
                    hub.update_kept(&new, own.clone());
                }
                News::Unknown => break selector::UNKNOWN.to_owned(),
            }
        },
    };
    let mut lost = own.get();
    tracing::info!(id = lost.id, url = remote.url(), cause, "lost sight of the next hop");
    lost.set_state(State::Down);
    hub.update(lost);
}

/// What an event of the next hop means for a connection.
enum News {
    None,
    Changed(Box<Connection>),
    /// The next hop does not know it.
    Unknown,
}

fn news(own: &Kept, event: &ConnectionEvent) -> News {
    let own = own.get();
    let initial = event.r#type() == ConnectionEventType::InitialStateTransfer;
    match selector::translate(&own, event) {
        None if initial => News::Unknown,
        Some(new) if new != own && !(initial && new.state() == own.state()) => News::Changed(Box::new(new)),
        _ => News::None,
    }
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
        let (before, factory) = (call.connection().into_owned(), call.ctx.factory.clone());
        match next.request(call).await {
            Ok(connection) => {
                let kept = match &factory {
                    Some(factory) => factory.keep(&connection),
                    None => Kept::new(&connection),
                };
                self.hub.update_kept(&connection, kept.clone());
                if let Some(remote) = metadata.get(&REMOTE) {
                    let task = Task::spawn(watch(self.hub.clone(), remote, kept));
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
        let connection = (*call.message).clone();
        let result = next.close(call).await;
        self.hub.delete(&connection);
        result
    }
}

#[cfg(test)]
mod tests;
