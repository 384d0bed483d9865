//! The targets of the trench: in memory for the watches, in the store for the next start.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use meridio_proto::nsp::v1::{Conduit, Stream, Target, Trench, target};
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::filter::Names;
use crate::store::Store;

/// What identifies a target: its addresses in order, its type and the path of its stream.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) trench: String,
    pub(crate) conduit: String,
    pub(crate) stream: String,
    pub(crate) kind: i32,
    pub(crate) ips: String,
}

impl Key {
    fn of(target: &Target) -> Self {
        let names = Names::of(target.stream.as_ref());
        Self {
            trench: names.trench.to_owned(),
            conduit: names.conduit.to_owned(),
            stream: names.stream.to_owned(),
            kind: target.r#type,
            ips: target.ips.join(";"),
        }
    }
}

#[derive(Debug)]
struct Entry {
    target: Arc<Target>,
    deadline: Instant,
}

/// All targets, sorted by stream.
pub(crate) type Snapshot = Arc<Vec<Arc<Target>>>;

#[derive(Debug)]
struct Inner {
    entries: Mutex<BTreeMap<Key, Entry>>,
    store: Store,
    snapshot: watch::Sender<Snapshot>,
    timeout: Duration,
}

/// The registry; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Registry(Arc<Inner>);

impl Registry {
    /// Loads what is stored; every entry gets a whole `timeout` from now.
    pub(crate) async fn load(path: &Path, timeout: Duration) -> Result<Self, Error> {
        let store = Store::open(path)?;
        let deadline = Instant::now() + timeout;
        let entries: BTreeMap<_, _> = store
            .all()
            .await?
            .into_iter()
            .map(|target| (Key::of(&target), Entry { target: Arc::new(target), deadline }))
            .collect();
        let snapshot = watch::Sender::new(snapshot(&entries));
        Ok(Self(Arc::new(Inner { entries: Mutex::new(entries), store, snapshot, timeout })))
    }

    /// The latest list, for watches.
    pub(crate) fn watch(&self) -> watch::Receiver<Snapshot> {
        self.0.snapshot.subscribe()
    }

    pub(crate) fn count(&self) -> usize {
        self.0.snapshot.borrow().len()
    }

    /// Stores a target or refreshes it. An unknown one is stored as DISABLED, whatever was asked for. A refresh that changes nothing writes
    /// nothing and tells nobody.
    pub(crate) async fn register(&self, target: Target) -> Result<(), Error> {
        let mut target = checked(target)?;
        let inner = &*self.0;
        let mut entries = inner.entries.lock().await;
        let key = Key::of(&target);
        let deadline = Instant::now() + inner.timeout;
        match entries.get_mut(&key) {
            Some(entry) if *entry.target == target => {
                entry.deadline = deadline;
                return Ok(());
            }
            Some(_) => {}
            None => target.set_status(target::Status::Disabled),
        }
        inner.store.put(key.clone(), &target).await?;
        tracing::info!(
            ips = key.ips,
            stream = key.stream,
            status = target.status().as_str_name(),
            kind = target.r#type().as_str_name(),
            "target registered"
        );
        entries.insert(key, Entry { target: Arc::new(target), deadline });
        inner.snapshot.send_replace(snapshot(&entries));
        Ok(())
    }

    /// Removes a target; an unknown one is fine.
    pub(crate) async fn unregister(&self, target: &Target) -> Result<(), Error> {
        let inner = &*self.0;
        let mut entries = inner.entries.lock().await;
        let key = Key::of(target);
        if !entries.contains_key(&key) {
            return Ok(());
        }
        inner.store.delete(vec![key.clone()]).await?;
        tracing::info!(ips = key.ips, stream = key.stream, "target unregistered");
        entries.remove(&key);
        inner.snapshot.send_replace(snapshot(&entries));
        Ok(())
    }

    /// Removes what was not refreshed, until `stop`.
    pub(crate) async fn expire(self, stop: CancellationToken) {
        loop {
            let wait = self.remove_expired().await;
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep_until(wait) => {}
            }
        }
    }

    /// Returns when to look again.
    async fn remove_expired(&self) -> Instant {
        let inner = &*self.0;
        let mut entries = inner.entries.lock().await;
        let now = Instant::now();
        let expired: Vec<Key> = entries.iter().filter(|(_, e)| e.deadline <= now).map(|(key, _)| key.clone()).collect();
        if !expired.is_empty() {
            if let Err(error) = inner.store.delete(expired.clone()).await {
                // They stay listed until the store takes it, or a refresh comes.
                tracing::error!(%error, "expired targets not removed");
                return now + Duration::from_secs(1);
            }
            for key in &expired {
                tracing::warn!(
                    ips = key.ips,
                    stream = key.stream,
                    "target expired: it was not registered again in time"
                );
                entries.remove(key);
            }
            inner.snapshot.send_replace(snapshot(&entries));
        }
        entries.values().map(|e| e.deadline).min().unwrap_or(now + inner.timeout).max(now + Duration::from_millis(10))
    }
}

fn snapshot(entries: &BTreeMap<Key, Entry>) -> Snapshot {
    Arc::new(entries.values().map(|entry| entry.target.clone()).collect())
}

/// Refuses what could never be used, and keeps of the stream what identifies it: two refreshes that differ only in what a client
/// happens to know about the stream are equal.
fn checked(target: Target) -> Result<Target, Error> {
    let fail = |reason| Err(Error::Target { object: format!("[{}]", target.ips.join(", ")), reason });
    if target.ips.is_empty() || target.ips.iter().any(String::is_empty) {
        return fail("ips is empty or holds an empty address");
    }
    if target.ips.iter().any(|ip| ip.contains(';')) {
        return fail("an address must not contain ';'");
    }
    match target::Status::try_from(target.status) {
        Ok(target::Status::Enabled | target::Status::Disabled) => {}
        _ => return fail("status has to be ENABLED or DISABLED"),
    }
    if target::Type::try_from(target.r#type).is_err() {
        return fail("type has to be DEFAULT or FRONTEND");
    }
    if target.r#type() == target::Type::Default && Names::of(target.stream.as_ref()).stream.is_empty() {
        return fail("a target of type DEFAULT needs a stream");
    }
    let stream = target.stream.as_ref().map(|stream| {
        let names = Names::of(Some(stream));
        let trench = Some(Trench { name: names.trench.to_owned() });
        let conduit = Some(Conduit { name: names.conduit.to_owned(), trench, destination_port_nats: Vec::new() });
        Stream { name: names.stream.to_owned(), conduit, max_targets: 0 }
    });
    Ok(Target { stream, ..target })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(ip: &str, status: target::Status) -> Target {
        let stream = Stream { name: "stream-a-i".to_owned(), ..Stream::default() };
        Target {
            ips: vec![ip.to_owned(), "fd00::1".to_owned()],
            context: BTreeMap::from([("identifier".to_owned(), "7".to_owned())]),
            status: status.into(),
            r#type: target::Type::Default.into(),
            stream: Some(stream),
        }
    }

    fn states(registry: &Registry) -> Vec<(String, target::Status)> {
        registry.watch().borrow().iter().map(|t| (t.ips[0].clone(), t.status())).collect()
    }

    use target::Status::{Any, Disabled, Enabled};

    #[tokio::test]
    async fn disabled_first_then_as_asked_and_kept_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.db");
        let timeout = Duration::from_secs(60);
        let registry = Registry::load(&path, timeout).await.unwrap();
        registry.register(target("a", Enabled)).await.unwrap();
        assert_eq!(states(&registry), [("a".to_owned(), Disabled)]);
        registry.register(target("a", Enabled)).await.unwrap();
        registry.register(target("b", Enabled)).await.unwrap();

        let mut watch = registry.watch();
        watch.mark_unchanged();
        registry.register(target("a", Enabled)).await.unwrap();
        let mut verbose = target("a", Enabled);
        verbose.stream.as_mut().unwrap().max_targets = 100;
        registry.register(verbose).await.unwrap();
        assert!(!watch.has_changed().unwrap(), "a refresh tells nobody");

        drop(registry);
        let registry = Registry::load(&path, timeout).await.unwrap();
        assert_eq!(states(&registry), [("a".to_owned(), Enabled), ("b".to_owned(), Disabled)]);
        assert_eq!(registry.watch().borrow()[0].context["identifier"], "7");
        registry.unregister(&target("a", Disabled)).await.unwrap();
        registry.unregister(&target("x", Disabled)).await.unwrap();
        drop(registry);
        let registry = Registry::load(&path, timeout).await.unwrap();
        assert_eq!(states(&registry), [("b".to_owned(), Disabled)]);
    }

    #[tokio::test]
    async fn unusable_targets_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::load(&dir.path().join("r.db"), Duration::from_secs(60)).await.unwrap();
        let bad = [
            Target { ips: Vec::new(), ..target("a", Enabled) },
            target("a;b", Enabled),
            target("a", Any),
            Target { status: 9, ..target("a", Enabled) },
            Target { r#type: 9, ..target("a", Enabled) },
            Target { stream: None, ..target("a", Enabled) },
        ];
        for target in bad {
            assert!(matches!(registry.register(target).await, Err(Error::Target { .. })));
        }
        let frontend = Target {
            ips: vec!["lb-1".to_owned()],
            r#type: target::Type::Frontend.into(),
            stream: None,
            ..target("a", Enabled)
        };
        registry.register(frontend).await.unwrap();
        assert_eq!(registry.count(), 1);
    }

    #[tokio::test]
    async fn entries_expire_unless_refreshed() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::load(&dir.path().join("r.db"), Duration::from_secs(60)).await.unwrap();
        registry.register(target("a", Enabled)).await.unwrap();
        registry.register(target("b", Enabled)).await.unwrap();
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(40)).await;
        tokio::time::resume();
        registry.register(target("b", Disabled)).await.unwrap();
        registry.remove_expired().await;
        assert_eq!(registry.count(), 2);
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(21)).await;
        tokio::time::resume();
        registry.remove_expired().await;
        assert_eq!(states(&registry), [("b".to_owned(), Disabled)]);
        let stored = Registry::load(&dir.path().join("r.db"), Duration::from_secs(60)).await.unwrap();
        assert_eq!(stored.count(), 1);
    }
}
