//! Gives each connection its [`Metadata`].

use crate::{CloseCall, Connection, Element, Error, Metadata, Next, RequestCall};
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Keeps the values that elements below store for a connection, from its first successful request to its close.
///
/// Stands below `updatepath`, which knows the id, and `begin`, which lets one operation per id run at a time. In a
/// client chain inside a server chain the pair of the server chain is used: one set of values per connection and
/// process, told apart by the side of each [`Key`](crate::Key).
#[derive(Debug, Default)]
pub struct MetadataElement {
    connections: Mutex<HashMap<String, Metadata>>,
}

impl MetadataElement {
    /// An element without any connection.
    pub fn new() -> Self {
        Self::default()
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<String, Metadata>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many connections have values.
    pub fn len(&self) -> usize {
        self.connections().len()
    }

    /// Whether no connection has values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[async_trait::async_trait]
impl Element for MetadataElement {
    fn name(&self) -> &'static str {
        "metadata"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        if call.ctx.metadata.is_some() {
            return next.request(call).await;
        }
        let id = call.id().to_owned();
        let (metadata, fresh) = {
            let mut connections = self.connections();
            match connections.get(&id) {
                Some(metadata) => (metadata.clone(), false),
                None => (connections.entry(id.clone()).or_default().clone(), true),
            }
        };
        call.ctx.metadata = Some(metadata.clone());
        let result = next.request(call).await;
        if result.is_err() && fresh {
            self.connections().remove(&id);
            metadata.clear();
        }
        result
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        if call.ctx.metadata.is_some() {
            return next.close(call).await;
        }
        let metadata = self.connections().remove(call.id()).unwrap_or_default();
        call.ctx.metadata = Some(metadata.clone());
        let result = next.close(call).await;
        metadata.clear();
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context, Key, Side,
        core::testing::{close, request_id},
    };
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Counts the requests of a connection; fails on demand; remembers what it saw.
    struct Counter(Key<u32>, Arc<AtomicBool>, Arc<Mutex<Vec<u32>>>);

    #[async_trait::async_trait]
    impl Element for Counter {
        fn name(&self) -> &'static str {
            "counter"
        }

        async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
            let seen = call.ctx.metadata("counter", "")?.with(&self.0, |n| {
                *n += 1;
                *n
            });
            self.2.lock().unwrap().push(seen);
            if self.1.load(Ordering::Relaxed) {
                return Err(Error::new("counter", "", "no"));
            }
            next.request(call).await
        }

        async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
            let seen = call.ctx.metadata("counter", "")?.get(&self.0);
            self.2.lock().unwrap().push(seen.unwrap_or(100));
            next.close(call).await
        }
    }

    // Conformance 7
    #[tokio::test]
    async fn values_live_from_first_success_to_close() {
        let (fail, seen) = (Arc::new(AtomicBool::new(true)), Arc::<Mutex<Vec<u32>>>::default());
        let element = Arc::new(MetadataElement::new());
        let counter = Counter(Key::new(Side::Server), fail.clone(), seen.clone());
        let chain = Chain::builder().element(element.clone()).element(counter).build();
        let request = || request_id("c", Context::new());

        chain.request(request()).await.unwrap_err(); // 1, dropped
        fail.store(false, Ordering::Relaxed);
        chain.request(request()).await.unwrap(); // 1
        chain.request(request()).await.unwrap(); // 2
        fail.store(true, Ordering::Relaxed);
        chain.request(request()).await.unwrap_err(); // 3, kept
        fail.store(false, Ordering::Relaxed);
        chain.request(request()).await.unwrap(); // 4
        close(&chain, "c").await.unwrap(); // sees 4
        close(&chain, "c").await.unwrap(); // sees none, but a usable map
        assert!(element.is_empty());
        chain.request(request()).await.unwrap(); // 1
        assert_eq!(*seen.lock().unwrap(), [1, 1, 2, 3, 4, 4, 100, 1]);
    }
}
