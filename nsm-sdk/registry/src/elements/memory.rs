//! The end of a registry's chain: objects in a [`Store`], and watches over it.

use crate::{
    Call, Element, Error, Event, Events, Next, Object, Query,
    store::{Change, Expect, Record, Store, StoreError, Watch},
};
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

const NAME: &str = "memory";

/// The element.
pub struct Memory {
    store: Arc<dyn Store>,
}

impl Memory {
    /// Keeps objects in `store`, in a table of their kind.
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }
}

impl From<StoreError> for Error {
    fn from(cause: StoreError) -> Self {
        Self::new(NAME, "", cause).with_code(tonic::Code::Unavailable)
    }
}

/// All objects of a kind that a store holds; records that do not decode are skipped with a warning.
pub async fn load<T: Object>(store: &dyn Store) -> Result<(Vec<T>, u64), StoreError> {
    let (records, revision) = store.list(T::KIND).await?;
    Ok((records.iter().filter_map(decode).collect(), revision))
}

fn decode<T: Object>(record: &Record) -> Option<T> {
    T::decode(record.value.as_slice())
        .inspect_err(|cause| tracing::warn!(object = record.key, %cause, "a stored object does not decode"))
        .ok()
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for Memory {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(&self, call: Call<T>, next: Next<T>) -> Result<T, Error> {
        let object = next.register(call).await?;
        let stored = self.store.put_if(T::KIND, object.name(), object.encode_to_vec(), Expect::Any).await;
        stored.map_err(|cause| Error::from(cause).about(object.name()))?;
        Ok(object)
    }

    async fn find(&self, call: Call<Query<T>>, _next: Next<T>) -> Result<Events<T>, Error> {
        let Query { template, watch } = call.message;
        let about = |cause: StoreError| Error::from(cause).about(template.name());
        let (objects, revision) = load::<T>(&*self.store).await.map_err(about)?;
        let current: VecDeque<_> = objects.into_iter().filter(|object| template.selects(object)).collect();
        if !watch {
            return Ok(Box::pin(futures_util::stream::iter(
                current.into_iter().map(|object| Ok(Event::present(object))),
            )));
        }
        let changes = self.store.watch_from(T::KIND, revision).await.map_err(about)?;
        let known = current.iter().map(|object| (object.name().to_owned(), object.clone())).collect();
        let pending = current.into_iter().map(Event::present).collect();
        let watcher = Watcher { store: self.store.clone(), template, changes, known, pending };
        Ok(Box::pin(futures_util::stream::try_unfold(watcher, |mut watcher| async move {
            Ok(Some((watcher.next().await?, watcher)))
        })))
    }

    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        let removed = self.store.delete_if(T::KIND, call.message.name(), Expect::Any).await;
        removed.map_err(|cause| Error::from(cause).about(call.message.name()))?;
        next.unregister(call).await
    }
}

/// One reader's view. It remembers what the reader has been told, so that a reader who was too slow for the bounded
/// queue gets the difference instead of holding up the others.
struct Watcher<T> {
    store: Arc<dyn Store>,
    template: T,
    changes: Watch,
    known: BTreeMap<String, T>,
    pending: VecDeque<Event<T>>,
}

impl<T: Object> Watcher<T> {
    async fn next(&mut self) -> Result<Event<T>, Error> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Ok(event);
            }
            match self.changes.next().await {
                Some(change) => self.apply(change),
                None => self.resync().await?,
            }
        }
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Put(record) => match decode::<T>(&record) {
                Some(object) if self.template.selects(&object) => {
                    self.known.insert(record.key, object.clone());
                    self.pending.push_back(Event::present(object));
                }
                // It is there, but no longer what the reader asked for.
                _ => self.gone(&record.key),
            },
            Change::Deleted(record) => self.gone(&record.key),
        }
    }

    fn gone(&mut self, name: &str) {
        if let Some(object) = self.known.remove(name) {
            self.pending.push_back(Event::gone(object));
        }
    }

    async fn resync(&mut self) -> Result<(), Error> {
        let (objects, revision) = load::<T>(&*self.store).await?;
        self.changes = self.store.watch_from(T::KIND, revision).await?;
        let now: BTreeMap<_, _> = objects
            .into_iter()
            .filter(|object| self.template.selects(object))
            .map(|object| (object.name().to_owned(), object))
            .collect();
        let lost: Vec<_> = self.known.keys().filter(|name| !now.contains_key(*name)).cloned().collect();
        for name in lost {
            self.gone(&name);
        }
        for (name, object) in now {
            if self.known.get(&name) != Some(&object) {
                self.known.insert(name, object.clone());
                self.pending.push_back(Event::present(object));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Context, store::MemoryStore};
    use futures_util::StreamExt;
    use nsm_proto::registry::NetworkServiceEndpoint;

    fn endpoint(name: &str, url: &str) -> NetworkServiceEndpoint {
        NetworkServiceEndpoint { name: name.into(), url: url.into(), ..Default::default() }
    }

    fn call(name: &str, url: &str) -> Call<NetworkServiceEndpoint> {
        Call::new(endpoint(name, url), Context::new())
    }

    // Conformance 117
    #[tokio::test]
    async fn a_watch_gets_what_is_there_then_updates_and_removals() {
        let chain = Next::new(vec![Arc::new(Memory::new(Arc::new(MemoryStore::default())))]);
        chain.register(call("a", "1")).await.unwrap();
        chain.register(call("b", "1")).await.unwrap();
        let mut watch = chain.find(Call::new(Query::watch(endpoint("a", "")), Context::new())).await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap(), Event::present(endpoint("a", "1")));
        chain.register(call("b", "2")).await.unwrap();
        chain.register(call("a", "2")).await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap(), Event::present(endpoint("a", "2")));
        // The removal carries the stored object.
        chain.unregister(call("a", "")).await.unwrap();
        assert_eq!(watch.next().await.unwrap().unwrap(), Event::gone(endpoint("a", "2")));
        assert_eq!(chain.list(endpoint("", ""), Context::new()).await.unwrap(), [endpoint("b", "2")]);
    }

    // Conformance 117
    #[tokio::test]
    async fn a_slow_watcher_holds_nobody_up_and_still_learns_the_truth() {
        let chain = Next::new(vec![Arc::new(Memory::new(Arc::new(MemoryStore::default())))]);
        chain.register(call("leaves", "1")).await.unwrap();
        let mut watch = chain.find(Call::new(Query::watch(endpoint("", "")), Context::new())).await.unwrap();
        for i in 0..5000 {
            chain.register(call("stays", &i.to_string())).await.unwrap();
        }
        chain.unregister(call("leaves", "")).await.unwrap();
        let mut seen = BTreeMap::new();
        while seen.get("stays").map(String::as_str) != Some("4999") || seen.contains_key("leaves") {
            let event = tokio::time::timeout(std::time::Duration::from_secs(5), watch.next()).await.unwrap();
            let event = event.unwrap().unwrap();
            match event.deleted {
                true => seen.remove(&event.object.name),
                false => seen.insert(event.object.name, event.object.url),
            };
        }
    }

    // Conformance 117
    #[tokio::test(flavor = "multi_thread")]
    async fn every_registration_and_removal_is_observed_under_concurrency() {
        const WRITERS: usize = 8;
        const ROUNDS: usize = 10;
        let chain = Next::new(vec![Arc::new(Memory::new(Arc::new(MemoryStore::default())))]);
        let mut watch = chain.find(Call::new(Query::watch(endpoint("", "")), Context::new())).await.unwrap();
        for n in 0..WRITERS {
            let chain = chain.clone();
            tokio::spawn(async move {
                for round in 0..ROUNDS {
                    chain.register(call(&n.to_string(), &round.to_string())).await.unwrap();
                    chain.unregister(call(&n.to_string(), "")).await.unwrap();
                }
            });
        }
        let mut seen: BTreeMap<String, Vec<(String, bool)>> = BTreeMap::new();
        for _ in 0..WRITERS * ROUNDS * 2 {
            let event = tokio::time::timeout(std::time::Duration::from_secs(10), watch.next()).await.unwrap();
            let event = event.unwrap().unwrap();
            seen.entry(event.object.name).or_default().push((event.object.url, event.deleted));
        }
        let each: Vec<_> = (0..ROUNDS).flat_map(|n| [(n.to_string(), false), (n.to_string(), true)]).collect();
        assert_eq!(seen.len(), WRITERS);
        assert!(seen.values().all(|events| *events == each), "{seen:?}");
    }

    /// A store whose disk is full.
    struct Full;

    #[async_trait::async_trait]
    impl Store for Full {
        async fn get(&self, _: &'static str, _: &str) -> Result<Option<Record>, StoreError> {
            Err(StoreError::Broken("disk is full".into()))
        }
        async fn list(&self, _: &'static str) -> Result<(Vec<Record>, u64), StoreError> {
            Err(StoreError::Broken("disk is full".into()))
        }
        async fn put_if(&self, _: &'static str, _: &str, _: Vec<u8>, _: Expect) -> Result<u64, StoreError> {
            Err(StoreError::Broken("disk is full".into()))
        }
        async fn delete_if(&self, _: &'static str, _: &str, _: Expect) -> Result<Option<Record>, StoreError> {
            Err(StoreError::Broken("disk is full".into()))
        }
        async fn watch_from(&self, _: &'static str, _: u64) -> Result<Watch, StoreError> {
            Err(StoreError::Broken("disk is full".into()))
        }
    }

    #[tokio::test]
    async fn a_store_that_fails_is_an_error_about_the_object() {
        let chain = Next::new(vec![Arc::new(Memory::new(Arc::new(Full)))]);
        let expected = "memory (a): store: disk is full";
        assert_eq!(chain.register(call("a", "1")).await.unwrap_err().to_string(), expected);
        assert_eq!(chain.unregister(call("a", "1")).await.unwrap_err().to_string(), expected);
        assert_eq!(chain.list(endpoint("a", ""), Context::new()).await.unwrap_err().to_string(), expected);
    }
}
