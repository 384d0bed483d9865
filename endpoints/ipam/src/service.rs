//! The trees of both families with their store: what the API, the NSP and the garbage collection act on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use tokio::sync::{Mutex, watch};
use tokio::time::Instant;

use crate::Error;
use crate::settings::Pool;
use crate::store::{Name, Rows, Store};
use crate::tree::{Child, Conduit, Node, Refusal, Seconds, Tree};

/// A refresh is written when the stored time is older than this: far below any sensible age limit.
const WRITE_AFTER: Seconds = 60;

#[derive(Debug)]
struct Inner {
    trees: Mutex<BTreeMap<u8, Tree>>,
    store: Store,
    /// Sent with each list of conduits that was taken over.
    pending: watch::Sender<Pending>,
}

/// What the NSP lists, but could not be given a prefix yet, and why: by family and conduit.
type Pending = BTreeMap<(u8, String), String>;

/// Allocation for one trench; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Service(Arc<Inner>);

/// The family number of `ipam.v1`.
pub(crate) fn family_of(prefix: &IpNet) -> u8 {
    u8::from(prefix.addr().is_ipv6())
}

pub(crate) fn now() -> Seconds {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Service {
    /// Loads everything that is stored.
    ///
    /// # Errors
    /// When the database cannot be opened, belongs to another trench or holds overlaps.
    pub(crate) async fn load(path: &Path, trench: &str, pools: &[Pool]) -> Result<Self, Error> {
        let damaged = |reason: String| Error::Damaged { path: path.display().to_string(), reason };
        let store = Store::open(path)?;
        let stored = store.trench(trench.to_owned()).await?;
        if stored != trench {
            return Err(damaged(format!("belongs to trench {stored:?}, not to {trench:?}")));
        }
        let mut trees = BTreeMap::new();
        for pool in pools {
            let family = family_of(&pool.prefix);
            let rows = store.load(family, pool.prefix).await?;
            let tree = build(rows, pool).map_err(damaged)?;
            let faults = tree.faults();
            if !faults.is_empty() {
                return Err(damaged(faults.join("\n")));
            }
            if tree.prefix != pool.prefix {
                tracing::warn!(stored = %tree.prefix, configured = %pool.prefix, "the stored pool wins over the configured one");
            }
            trees.insert(family, tree);
        }
        Ok(Self(Arc::new(Inner { trees: Mutex::new(trees), store, pending: watch::Sender::default() })))
    }

    /// The address of a child and its node's prefix length. Waits up to `patience` for a conduit that the NSP does not list
    /// or that has no prefix yet.
    pub(crate) async fn allocate(&self, family: u8, name: Name, patience: Duration) -> Result<(IpAddr, u8), Error> {
        let until = Instant::now() + patience;
        let mut lists = self.0.pending.subscribe();
        loop {
            lists.mark_unchanged();
            let (service, wanted) = (self.clone(), name.clone());
            // A task of its own: a caller that leaves must not part the store from the memory.
            let attempt = tokio::spawn(async move { service.try_allocate(family, wanted).await });
            let attempt = attempt.await.map_err(|_| Error::Missing("allocation"))?;
            let Err(Error::UnknownConduit { .. }) = attempt else { return attempt };
            match tokio::time::timeout_at(until, lists.changed()).await {
                Ok(Ok(())) => {}
                _ => return Err(self.missing(family, name.conduit, patience)),
            }
        }
    }

    /// Why a conduit was not there within `waited`.
    fn missing(&self, family: u8, conduit: String, waited: Duration) -> Error {
        let reason = self.0.pending.borrow().get(&(family, conduit.clone())).cloned();
        match reason {
            Some(reason) => Error::PendingConduit { conduit, reason },
            None => Error::UnknownConduit { conduit, waited },
        }
    }

    async fn try_allocate(&self, family: u8, name: Name) -> Result<(IpAddr, u8), Error> {
        let mut trees = self.0.trees.lock().await;
        let tree = trees.get_mut(&family).ok_or(Error::Family(if family == 0 { "ipv4" } else { "ipv6" }))?;
        let choice =
            tree.choose(&name.conduit, &name.node, &name.child).map_err(|refusal| refused(tree, refusal, &name))?;
        let now = now();
        let stored =
            tree.stored(&name.conduit, &name.node, &name.child).filter(|_| !choice.new_child && !choice.new_node);
        let write = stored.is_none_or(|at| now.saturating_sub(at) >= WRITE_AFTER);
        if write {
            self.0.store.put(family, name.clone(), choice, now).await?;
        }
        tree.remember(&name.conduit, &name.node, &name.child, &choice, now, write);
        if choice.new_child {
            tracing::info!(conduit = name.conduit, node = name.node, child = name.child, address = %choice.address, "address allocated");
        }
        Ok((choice.address, choice.node.prefix_len()))
    }

    /// Gives an address back; what does not exist is fine, and nothing is made.
    pub(crate) async fn release(&self, family: u8, name: Name) -> Result<(), Error> {
        let service = self.clone();
        let attempt = tokio::spawn(async move {
            let mut trees = service.0.trees.lock().await;
            let Some(tree) = trees.get_mut(&family).filter(|tree| tree.has(&name.conduit, &name.node, &name.child))
            else {
                return Ok(());
            };
            let stale = crate::tree::Stale { conduit: name.conduit, node: name.node, child: Some(name.child) };
            service.0.store.remove(family, std::slice::from_ref(&stale)).await?;
            tree.remove(&stale);
            tracing::info!(conduit = stale.conduit, node = stale.node, child = stale.child, "address released");
            Ok(())
        });
        attempt.await.map_err(|_| Error::Missing("release"))?
    }

    /// Takes over the NSP's list of conduits. A conduit that is no longer listed gives no addresses any more, but keeps its prefix until
    /// the garbage collection or a new conduit needs it: a list that was wrong for a moment changes no address.
    ///
    /// # Errors
    /// One of those that kept conduits out; with the same list again these are tried again.
    pub(crate) async fn set_conduits(&self, listed: &BTreeSet<String>) -> Result<(), Error> {
        let mut trees = self.0.trees.lock().await;
        let now = now();
        let (mut result, mut pending) = (Ok(()), Pending::new());
        for (family, tree) in trees.iter_mut() {
            for (name, conduit) in &mut tree.conduits {
                let since = conduit.absent_since;
                conduit.absent_since = (!listed.contains(name)).then(|| since.unwrap_or(now));
            }
            for name in listed {
                if !tree.conduits.contains_key(name)
                    && let Err(error) = self.add_conduit(*family, tree, name).await
                {
                    pending.insert((*family, name.clone()), error.to_string());
                    result = Err(error);
                }
            }
        }
        drop(trees);
        self.0.pending.send_replace(pending);
        result
    }

    async fn add_conduit(&self, family: u8, tree: &mut Tree, name: &str) -> Result<(), Error> {
        let prefix = loop {
            if let Some(prefix) = tree.choose_conduit() {
                break prefix;
            }
            let absent = tree.conduits.iter().filter_map(|(name, c)| Some((c.absent_since?, name.clone()))).min();
            let Some((_, oldest)) = absent else {
                return Err(Error::Exhausted { object: format!("conduit {name:?}"), parent: tree.prefix });
            };
            self.remove_conduit(family, tree, oldest).await?;
        };
        self.0.store.add_conduit(family, name.to_owned(), prefix).await?;
        tracing::info!(conduit = name, %prefix, "conduit added");
        tree.conduits.insert(name.to_owned(), Conduit { prefix, absent_since: None, nodes: BTreeMap::new() });
        Ok(())
    }

    async fn remove_conduit(&self, family: u8, tree: &mut Tree, name: String) -> Result<(), Error> {
        self.0.store.remove_conduit(family, name.clone()).await?;
        tracing::info!(conduit = name, "conduit removed");
        tree.conduits.remove(&name);
        Ok(())
    }

    /// Removes what was not asked for since `age`, and conduits that were not listed for as long.
    pub(crate) async fn collect_garbage(&self, age: Duration) -> Result<usize, Error> {
        let limit = now().saturating_sub(age.as_secs());
        let mut trees = self.0.trees.lock().await;
        let mut count = 0;
        for (family, tree) in trees.iter_mut() {
            let stale = tree.stale(limit);
            self.0.store.remove(*family, &stale).await?;
            stale.iter().for_each(|entry| tree.remove(entry));
            count += stale.len();
            let gone: Vec<String> = tree
                .conduits
                .iter()
                .filter(|(_, c)| c.absent_since.is_some_and(|since| since < limit))
                .map(|(name, _)| name.clone())
                .collect();
            count += gone.len();
            for name in gone {
                self.remove_conduit(*family, tree, name).await?;
            }
        }
        Ok(count)
    }

    /// Conduits and addresses, for the log.
    pub(crate) async fn counts(&self) -> (usize, usize) {
        let trees = self.0.trees.lock().await;
        let conduits: BTreeSet<_> = trees.values().flat_map(|t| t.conduits.keys()).collect();
        let nodes = trees.values().flat_map(|t| t.conduits.values()).flat_map(|c| c.nodes.values());
        (conduits.len(), nodes.map(|n| n.children.len()).sum())
    }
}

fn refused(tree: &Tree, refusal: Refusal, name: &Name) -> Error {
    let conduit = tree.conduits.get(&name.conduit);
    match refusal {
        Refusal::UnknownConduit => Error::UnknownConduit { conduit: name.conduit.clone(), waited: Duration::ZERO },
        Refusal::NoNode => Error::Exhausted {
            object: format!("node {:?} of conduit {:?}", name.node, name.conduit),
            parent: conduit.map_or(tree.prefix, |c| c.prefix),
        },
        Refusal::NoAddress => Error::Exhausted {
            object: format!("{:?} on node {:?} of conduit {:?}", name.child, name.node, name.conduit),
            parent: conduit.and_then(|c| c.nodes.get(&name.node)).map_or(tree.prefix, |n| n.prefix),
        },
    }
}

/// The tree of the stored rows; says which row cannot be.
fn build(rows: Rows, pool: &Pool) -> Result<Tree, String> {
    fn parse<T: std::str::FromStr>(what: &str, text: &str) -> Result<T, String> {
        text.parse().map_err(|_| format!("{what}: {text:?} is neither prefix nor address"))
    }
    let mut tree = Tree::new(parse("pool", &rows.pool)?, pool.conduit_length, pool.node_length);
    for row in rows.conduits {
        let prefix = parse(&format!("conduit {}", row.conduit), &row.prefix)?;
        tree.conduits.insert(row.conduit, Conduit { prefix, absent_since: None, nodes: BTreeMap::new() });
    }
    for row in rows.nodes {
        let what = format!("conduit {} node {}", row.conduit, row.node);
        let node = Node {
            prefix: parse(&what, &row.prefix)?,
            updated: row.updated,
            stored: row.updated,
            children: BTreeMap::new(),
        };
        let conduit = tree.conduits.get_mut(&row.conduit).ok_or_else(|| format!("{what}: its conduit is missing"))?;
        conduit.nodes.insert(row.node, node);
    }
    for row in rows.children {
        let what = format!("conduit {} node {} child {}", row.conduit, row.node, row.child);
        let child = Child { address: parse(&what, &row.address)?, updated: row.updated, stored: row.updated };
        let node = tree.conduits.get_mut(&row.conduit).and_then(|c| c.nodes.get_mut(&row.node));
        node.ok_or_else(|| format!("{what}: its node is missing"))?.children.insert(row.child, child);
    }
    Ok(tree)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools() -> Vec<Pool> {
        vec![
            Pool { prefix: "172.16.0.0/16".parse().unwrap(), conduit_length: 20, node_length: 24 },
            Pool { prefix: "fd00::/48".parse().unwrap(), conduit_length: 56, node_length: 64 },
        ]
    }

    fn name(conduit: &str, node: &str, child: &str) -> Name {
        Name { conduit: conduit.to_owned(), node: node.to_owned(), child: child.to_owned() }
    }

    fn listed(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    const SOON: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn addresses_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.db");
        let service = Service::load(&path, "trench-a", &pools()).await.unwrap();
        let unknown = service.allocate(0, name("c", "n", "a"), SOON).await.unwrap_err();
        assert_eq!(unknown.to_string(), "conduit \"c\" is unknown: the NSP did not list it within 20ms");
        service.set_conduits(&listed(&["c"])).await.unwrap();
        let v4 = service.allocate(0, name("c", "n", "a"), SOON).await.unwrap();
        let v6 = service.allocate(1, name("c", "n", "a"), SOON).await.unwrap();
        assert_eq!((v4.0.to_string(), v4.1), ("172.16.0.1".to_owned(), 24));
        assert_eq!((v6.0.to_string(), v6.1), ("fd00::1".to_owned(), 64));
        service.allocate(0, name("c", "n", "b"), SOON).await.unwrap();
        service.release(0, name("c", "n", "a")).await.unwrap();
        service.release(0, name("c", "nowhere", "a")).await.unwrap();
        service.release(0, name("nowhere", "n", "a")).await.unwrap();
        drop(service);

        // Another trench, another pool.
        let other = Service::load(&path, "trench-b", &pools()).await.unwrap_err().to_string();
        assert!(other.ends_with("belongs to trench \"trench-a\", not to \"trench-b\""), "{other}");
        let mut moved = pools();
        moved[0].prefix = "10.0.0.0/16".parse().unwrap();
        let service = Service::load(&path, "trench-a", &moved).await.unwrap();
        // Before the NSP has said anything.
        assert_eq!(service.allocate(0, name("c", "n", "b"), SOON).await.unwrap().0.to_string(), "172.16.0.2");
        assert_eq!(service.allocate(0, name("c", "n", "x"), SOON).await.unwrap().0.to_string(), "172.16.0.1");
        assert_eq!(service.counts().await, (1, 3));
    }

    #[tokio::test]
    async fn a_caller_waits_for_its_conduit() {
        let dir = tempfile::tempdir().unwrap();
        let service = Service::load(&dir.path().join("r.db"), "t", &pools()).await.unwrap();
        let waiting = tokio::spawn({
            let service = service.clone();
            async move { service.allocate(0, name("late", "n", "a"), Duration::from_secs(10)).await }
        });
        tokio::time::sleep(SOON).await;
        service.set_conduits(&listed(&["other"])).await.unwrap();
        service.set_conduits(&listed(&["late", "other"])).await.unwrap();
        assert_eq!(waiting.await.unwrap().unwrap().0.to_string(), "172.16.16.1");
    }

    #[tokio::test]
    async fn a_conduit_that_could_not_be_stored_is_named_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let service = Service::load(&dir.path().join("r.db"), "t", &pools()).await.unwrap();
        service.0.store.refuse_writes(true).await.unwrap();
        assert!(service.set_conduits(&listed(&["c"])).await.is_err());
        let pending = service.allocate(0, name("c", "n", "a"), SOON).await.unwrap_err();
        let text = pending.to_string();
        assert!(text.starts_with("conduit \"c\" is listed by the NSP, but has no prefix yet:"), "{text}");
        assert!(text.contains("r.db") && text.contains("readonly"), "{text}");
        assert_eq!(tonic::Status::from(pending).code(), tonic::Code::Unavailable);
        let unknown = service.allocate(0, name("x", "n", "a"), SOON).await.unwrap_err();
        assert!(matches!(unknown, Error::UnknownConduit { .. }), "{unknown}");

        let waiting = tokio::spawn({
            let service = service.clone();
            async move { service.allocate(0, name("c", "n", "a"), Duration::from_secs(10)).await }
        });
        service.0.store.refuse_writes(false).await.unwrap();
        service.set_conduits(&listed(&["c"])).await.unwrap();
        assert_eq!(waiting.await.unwrap().unwrap().0.to_string(), "172.16.0.1");
        service.set_conduits(&BTreeSet::new()).await.unwrap();
        let gone = service.allocate(0, name("c", "n", "b"), SOON).await.unwrap_err();
        assert!(matches!(gone, Error::UnknownConduit { .. }), "{gone}");
    }

    #[tokio::test]
    async fn a_list_that_is_wrong_for_a_moment_changes_no_address() {
        let dir = tempfile::tempdir().unwrap();
        let service = Service::load(&dir.path().join("r.db"), "t", &pools()).await.unwrap();
        service.set_conduits(&listed(&["a", "b"])).await.unwrap();
        let before = service.allocate(0, name("b", "n", "x"), SOON).await.unwrap();
        service.set_conduits(&BTreeSet::new()).await.unwrap();
        assert!(service.allocate(0, name("b", "n", "x"), SOON).await.is_err());
        service.set_conduits(&listed(&["b"])).await.unwrap();
        assert_eq!(service.allocate(0, name("b", "n", "x"), SOON).await.unwrap(), before);
        // A pool of 16 conduits: the one that is no longer listed makes room.
        let names: Vec<String> = (0..15).map(|i| format!("n{i}")).chain(["b".to_owned()]).collect();
        service.set_conduits(&names.iter().cloned().collect()).await.unwrap();
        assert_eq!(service.0.trees.lock().await[&0].conduits.len(), 16);
        let full = service.set_conduits(&names.into_iter().chain(["one-more".to_owned()]).collect()).await.unwrap_err();
        assert!(full.to_string().starts_with("no more prefix available for conduit \"one-more\" in"), "{full}");
    }

    #[tokio::test]
    async fn garbage_goes_from_memory_and_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.db");
        let service = Service::load(&path, "t", &pools()).await.unwrap();
        service.set_conduits(&listed(&["c"])).await.unwrap();
        service.allocate(0, name("c", "n", "a"), SOON).await.unwrap();
        service.allocate(0, name("c", "n", crate::tree::BRIDGE), SOON).await.unwrap();
        assert_eq!(service.collect_garbage(Duration::from_secs(40 * 60)).await.unwrap(), 0);
        for node in service
            .0
            .trees
            .lock()
            .await
            .values_mut()
            .flat_map(|t| t.conduits.values_mut())
            .flat_map(|c| c.nodes.values_mut())
        {
            node.children.get_mut("a").unwrap().updated -= 3600;
        }
        assert_eq!(service.collect_garbage(Duration::from_secs(40 * 60)).await.unwrap(), 1);
        drop(service);
        let service = Service::load(&path, "t", &pools()).await.unwrap();
        assert_eq!(service.counts().await, (1, 1));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn concurrent_callers_get_different_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let service = Service::load(&dir.path().join("r.db"), "t", &pools()).await.unwrap();
        service.set_conduits(&listed(&["c"])).await.unwrap();
        let calls: Vec<_> = (0..60)
            .map(|i| {
                let service = service.clone();
                tokio::spawn(async move {
                    service.allocate(0, name("c", "n", &format!("x{}", i % 30)), SOON).await.unwrap().0
                })
            })
            .collect();
        let mut addresses = BTreeSet::new();
        for call in calls {
            addresses.insert(call.await.unwrap());
        }
        assert_eq!(addresses.len(), 30);
    }
}
