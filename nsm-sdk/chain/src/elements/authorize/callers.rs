//! Which connections each caller has.

use super::policy::service_connection;
use crate::{MonitorScopeSelector, Peer};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The connections of each caller, by its SPIFFE id and its own ids of them: who may watch what. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Callers(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    /// Whose a connection is, and its caller's id of it, by the id here.
    connections: HashMap<String, (String, String)>,
    /// The callers' ids by SPIFFE id; how many connections have each, because nothing keeps a caller from using one twice.
    callers: HashMap<String, BTreeMap<String, usize>>,
}

impl Inner {
    fn remove(&mut self, id: &str) {
        let Some((caller, theirs)) = self.connections.remove(id) else { return };
        let Some(ids) = self.callers.get_mut(&caller) else { return };
        if let Some(count) = ids.get_mut(&theirs) {
            *count -= 1;
            if *count == 0 {
                ids.remove(&theirs);
            }
        }
        if ids.is_empty() {
            self.callers.remove(&caller);
        }
    }
}

impl Callers {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection `id` is the caller's, who calls it `theirs`.
    pub(super) fn note(&self, id: &str, peer: &Peer, theirs: String) {
        let mut inner = self.lock();
        inner.remove(id);
        let caller = peer.spiffe_id.clone();
        *inner.callers.entry(caller.clone()).or_default().entry(theirs.clone()).or_default() += 1;
        inner.connections.insert(id.to_owned(), (caller, theirs));
    }

    /// The connection is gone.
    pub(super) fn forget(&self, id: &str) {
        self.lock().remove(id);
    }

    /// Whether a caller has one of the connections that it wants to watch.
    pub fn may_watch(&self, peer: &Peer, selector: &MonitorScopeSelector) -> bool {
        let inner = self.lock();
        let known = inner.callers.get(&peer.spiffe_id).into_iter().flat_map(BTreeMap::keys);
        service_connection(known.map(String::as_str), selector.path_segments.iter().map(|segment| segment.id.as_str()))
    }

    /// Whether no caller has a connection.
    pub fn is_empty(&self) -> bool {
        let inner = self.lock();
        inner.callers.is_empty() && inner.connections.is_empty()
    }
}
