//! The targets of the trench: in memory for the watches, in the store for the next start.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use meridio_common::{Backoff, Health};
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

/// Key of the database's fault in the health report.
const NOTE: &str = "targets";
/// Between two attempts to delete from the store, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

#[derive(Debug)]
struct Inner {
    entries: Mutex<Entries>,
    store: Store,
    snapshot: watch::Sender<Snapshot>,
    /// What the store said last, if it was a fault.
    fault: watch::Sender<Option<String>>,
    timeout: Duration,
}

#[derive(Debug)]
struct Entries {
    present: BTreeMap<Key, Entry>,
    /// Gone, but not from the store yet.
    gone: BTreeSet<Key>,
    /// When to try these again; none as long as the store takes everything.
    retry: Option<Instant>,
    backoff: Backoff,
}

/// The registry; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Registry(Arc<Inner>);

impl Registry {
    /// Loads what is stored; every entry gets a whole `timeout` from now.
    pub(crate) async fn load(path: &Path, timeout: Duration) -> Result<Self, Error> {
        let store = Store::open(path)?;
        let deadline = Instant::now() + timeout;
        let present: BTreeMap<_, _> = store
            .all()
            .await?
            .into_iter()
            .map(|target| (Key::of(&target), Entry { target: Arc::new(target), deadline }))
            .collect();
        let snapshot = watch::Sender::new(snapshot(&present));
        let backoff = Backoff::new(RETRY.0, RETRY.1);
        let entries = Mutex::new(Entries { present, gone: BTreeSet::new(), retry: None, backoff });
        Ok(Self(Arc::new(Inner { entries, store, snapshot, fault: watch::Sender::default(), timeout })))
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
        match entries.present.get_mut(&key) {
            Some(entry) if *entry.target == target => {
                entry.deadline = deadline;
                return Ok(());
            }
            Some(_) => {}
            None => target.set_status(target::Status::Disabled),
        }
        self.noted(inner.store.put(key.clone(), &target).await)?;
        tracing::info!(
            ips = key.ips,
            stream = key.stream,
            status = target.status().as_str_name(),
            kind = target.r#type().as_str_name(),
            "target registered"
        );
        entries.gone.remove(&key);
        entries.present.insert(key, Entry { target: Arc::new(target), deadline });
        inner.snapshot.send_replace(snapshot(&entries.present));
        Ok(())
    }

    /// Removes a target; an unknown one is fine, and so is a store that refuses: whoever has closed a target must not get its traffic any
    /// more. A row that stays is deleted later, or expires after a restart.
    pub(crate) async fn unregister(&self, target: &Target) {
        let mut entries = self.0.entries.lock().await;
        let key = Key::of(target);
        if entries.present.remove(&key).is_none() {
            return;
        }
        tracing::info!(ips = key.ips, stream = key.stream, "target unregistered");
        entries.gone.insert(key);
        self.0.snapshot.send_replace(snapshot(&entries.present));
        self.delete_gone(&mut entries).await;
    }

    /// Removes what was not refreshed, and says in the health report when the store refuses, until `stop`.
    pub(crate) async fn expire(self, health: Health, stop: CancellationToken) {
        let mut fault = self.0.fault.subscribe();
        loop {
            let wait = self.remove_expired().await;
            health.note(NOTE, fault.borrow_and_update().iter().cloned().collect());
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep_until(wait) => {}
                // There may be something to try again.
                _ = fault.changed() => {}
            }
        }
    }

    /// Returns when to look again.
    async fn remove_expired(&self) -> Instant {
        let inner = &*self.0;
        let mut entries = inner.entries.lock().await;
        let now = Instant::now();
        let expired: Vec<Key> =
            entries.present.iter().filter(|(_, e)| e.deadline <= now).map(|(key, _)| key.clone()).collect();
        if !expired.is_empty() {
            for key in &expired {
                tracing::warn!(
                    ips = key.ips,
                    stream = key.stream,
                    "target expired: it was not registered again in time"
                );
                entries.present.remove(key);
            }
            entries.gone.extend(expired);
            inner.snapshot.send_replace(snapshot(&entries.present));
        }
        if entries.retry.is_none_or(|at| at <= now) {
            self.delete_gone(&mut entries).await;
        }
        let deadlines = entries.present.values().map(|e| e.deadline);
        deadlines.chain(entries.retry).min().unwrap_or(now + inner.timeout).max(now + Duration::from_millis(10))
    }

    /// Deletes from the store what is gone; what it refuses stays to be tried again.
    async fn delete_gone(&self, entries: &mut Entries) {
        if entries.gone.is_empty() {
            entries.retry = None;
            return;
        }
        if self.noted(self.0.store.delete(entries.gone.iter().cloned().collect()).await).is_ok() {
            entries.gone.clear();
            entries.backoff.reset();
            entries.retry = None;
        } else {
            entries.retry = Some(Instant::now() + entries.backoff.delay());
        }
    }

    /// Keeps the result for the health report. A fault is told each time, so that [`Registry::expire`] knows when to try again.
    fn noted(&self, result: Result<(), meridio_common::Error>) -> Result<(), meridio_common::Error> {
        let fault = result.as_ref().err().map(ToString::to_string);
        self.0.fault.send_if_modified(|last| {
            if *last != fault {
                match &fault {
                    Some(error) => tracing::error!(error, "the targets' database refuses"),
                    None => tracing::info!("the targets' database works again"),
                }
                last.clone_from(&fault);
                return true;
            }
            fault.is_some()
        });
        result
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
        registry.unregister(&target("a", Disabled)).await;
        registry.unregister(&target("x", Disabled)).await;
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

    /// The health report of a loop that begins now.
    async fn note(registry: &Registry) -> String {
        let (health, stop) = (Health::detached("test"), CancellationToken::new());
        let expiring = tokio::spawn(registry.clone().expire(health.clone(), stop.clone()));
        tokio::time::sleep(Duration::from_millis(1)).await;
        stop.cancel();
        expiring.await.unwrap();
        health.report().lines().join(" ")
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_refuses_keeps_no_target_listed() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::load(&dir.path().join("r.db"), Duration::from_secs(60)).await.unwrap();
        for ip in ["back", "closed", "dead"] {
            registry.register(target(ip, Enabled)).await.unwrap();
        }
        assert_eq!(note(&registry).await, "");
        registry.0.store.refuse_writes(true).await.unwrap();
        registry.unregister(&target("back", Disabled)).await;
        registry.unregister(&target("closed", Disabled)).await;
        assert_eq!(states(&registry), [("dead".to_owned(), Disabled)]);
        tokio::time::advance(Duration::from_secs(61)).await;
        registry.remove_expired().await;
        assert_eq!(registry.count(), 0);
        let said = note(&registry).await;
        assert!(said.starts_with("targets: ") && said.contains("r.db") && said.contains("readonly"), "{said}");
        // Who asks for a change is told.
        assert!(matches!(registry.register(target("new", Enabled)).await, Err(Error::Storage(_))));
        assert_eq!(registry.0.store.all().await.unwrap().len(), 3);

        registry.0.store.refuse_writes(false).await.unwrap();
        // Registered again before its row is deleted: the row is the new one's.
        registry.register(target("back", Enabled)).await.unwrap();
        tokio::time::advance(Duration::from_secs(40)).await;
        registry.remove_expired().await;
        let rows: Vec<_> = registry.0.store.all().await.unwrap().into_iter().map(|row| row.ips[0].clone()).collect();
        assert_eq!(rows, ["back"]);
        assert_eq!(note(&registry).await, "");
    }

    #[tokio::test(start_paused = true)]
    async fn a_deletion_is_tried_again_soon() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::load(&dir.path().join("r.db"), Duration::from_secs(600)).await.unwrap();
        registry.register(target("a", Enabled)).await.unwrap();
        registry.0.store.refuse_writes(true).await.unwrap();
        // Time stands still while this task runs: nobody but the clock waits for the storage thread.
        let (go_on, held) = std::sync::mpsc::channel::<()>();
        let still = tokio::task::spawn_blocking(move || held.recv().is_err());
        let (health, stop, start) = (Health::detached("test"), CancellationToken::new(), Instant::now());
        let expiring = tokio::spawn(registry.clone().expire(health.clone(), stop.clone()));
        tokio::task::yield_now().await;
        registry.unregister(&target("a", Disabled)).await;
        registry.0.store.refuse_writes(false).await.unwrap();
        assert!(registry.0.fault.borrow().is_some());
        drop(go_on);
        assert!(still.await.unwrap());
        // A limit in the clock's time would pass while the storage thread works.
        let limit = stop.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(10));
            limit.cancel();
        });
        let mut fault = registry.0.fault.subscribe();
        tokio::select! {
            works = fault.wait_for(Option::is_none) => drop(works.unwrap()),
            () = stop.cancelled() => panic!("not tried again"),
        }
        assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
        stop.cancel();
        expiring.await.unwrap();
        assert!(registry.0.store.all().await.unwrap().is_empty());
    }
}
