//! Closes everything when the process ends.

use crate::{CloseCall, Connection, Element, Error, EventFactory, EventOptions, Next, REMOTE, RequestCall};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

/// Knows the connections that are alive; [`Cleanup::close_all`] closes them. Stands in a client chain below `dial`.
/// Clones share the connections: one goes into the chain, one stays with who ends the process.
///
/// Not for processes whose connections outlive them.
#[derive(Clone, Debug, Default)]
pub struct Cleanup(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    connections: Mutex<HashMap<String, EventFactory>>,
    /// Closes do not go to the next hop.
    silent: AtomicBool,
}

const NAME: &str = "cleanup";

impl Cleanup {
    /// An element without connections.
    pub fn new() -> Self {
        Self::default()
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<String, EventFactory>> {
        self.0.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes all connections and returns when that is done; how many there were. With `calls` the next hops are told,
    /// else only this process cleans up.
    pub async fn close_all(&self, calls: bool) -> usize {
        self.0.silent.store(!calls, Ordering::SeqCst);
        let all: Vec<_> = self.connections().drain().collect();
        let closing: Vec<_> = all.iter().map(|(_, factory)| factory.close(EventOptions::default())).collect();
        for ((id, _), event) in all.iter().zip(closing) {
            if let Err(error) = event.await {
                tracing::info!(id, %error, "closing at the end of the process");
            }
        }
        all.len()
    }

    /// How many connections are alive.
    pub fn len(&self) -> usize {
        self.connections().len()
    }

    /// Whether no connection is alive.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[async_trait::async_trait]
impl Element for Cleanup {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let (id, factory) = (call.id().to_owned(), call.ctx.factory.clone());
        let connection = next.request(call).await?;
        if let Some(factory) = factory {
            self.connections().insert(id, factory);
        }
        Ok(connection)
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        self.connections().remove(call.id());
        if !self.0.silent.load(Ordering::SeqCst) {
            return next.close(call).await;
        }
        call.ctx.remote = None;
        if let Some(metadata) = &call.ctx.metadata {
            metadata.remove(&REMOTE);
        }
        // The call that cannot be made is an error there, and meant here.
        if let Err(error) = next.close(call).await {
            tracing::debug!(%error, "closed without a call");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Client, NetworkServiceRequest,
        core::testing::{Hop, HopConnector, Spy},
    };
    use std::time::Duration;

    const TIMEOUT: Duration = Duration::from_secs(15);

    fn client() -> (Client, Cleanup, Arc<Hop>, Arc<Spy>) {
        let (hop, cleanup, spy) = (Arc::<Hop>::default(), Cleanup::new(), Arc::<Spy>::default());
        let client = Client::builder("fwd", Arc::new(HopConnector(hop.clone())))
            .url("unix:///nse")
            .passthrough()
            .element(cleanup.clone())
            .element(spy.clone())
            .build();
        (client, cleanup, hop, spy)
    }

    async fn connect(client: &Client, count: usize) -> Vec<Connection> {
        let mut connections = Vec::new();
        for n in 0..count {
            let connection = Some(Connection { id: format!("c{n}"), ..Default::default() });
            let request = NetworkServiceRequest { connection, ..Default::default() };
            connections.push(client.request(request, TIMEOUT).await.unwrap());
        }
        connections
    }

    // Conformance 105
    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_process_closes_what_is_alive() {
        let (client, cleanup, hop, spy) = client();
        let connections = connect(&client, 10).await;
        client.close(connections[0].clone(), TIMEOUT).await.unwrap();
        assert_eq!(cleanup.len(), 9);
        assert_eq!(cleanup.close_all(true).await, 9);
        assert_eq!((hop.closes(), spy.closes()), (10, 10));
        assert!(cleanup.is_empty() && client.connection("c5").is_none());
        assert_eq!(cleanup.close_all(true).await, 0);
    }

    // Conformance 105
    #[tokio::test(start_paused = true)]
    async fn without_calls_only_this_process_cleans_up() {
        let (client, cleanup, hop, spy) = client();
        connect(&client, 10).await;
        assert_eq!(cleanup.close_all(false).await, 10);
        assert_eq!((hop.closes(), spy.closes()), (0, 10));
        assert!(client.connection("c5").is_none());
    }
}
