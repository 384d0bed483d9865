//! Names from a counter, handed out by connection id.

use crate::elements::kernel_mechanism::NAME_LIMIT;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Which connection has which name. Clones share it, so that it can be saved and restored by its owner.
#[derive(Clone, Debug)]
pub struct Names(Arc<Mutex<Inner>>, String, Duration);

#[derive(Debug, Default)]
struct Inner {
    /// Name by connection id, and since when it waits to be free again.
    names: BTreeMap<String, (String, Option<Instant>)>,
}

impl Names {
    /// Names `prefix0`, `prefix1` ... A released name is free again after `delay`.
    pub fn new(prefix: impl Into<String>, delay: Duration) -> Self {
        Self(Arc::default(), prefix.into(), delay)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.names.retain(|_, (_, released)| released.is_none_or(|at| at.elapsed() < self.2));
        inner
    }

    /// The name of a connection: the one it has, else `proposed` if that is of our kind and free, else the smallest
    /// free one. `None` if all names that fit into an interface name are taken.
    pub fn take(&self, id: &str, proposed: Option<&str>) -> Option<String> {
        let mut inner = self.lock();
        if let Some((name, released)) = inner.names.get_mut(id) {
            *released = None;
            return Some(name.clone());
        }
        let free = |inner: &Inner, name: &str| inner.names.values().all(|(taken, _)| taken != name);
        let ours = |name: &&str| name.starts_with(&self.1) && name.len() <= NAME_LIMIT;
        let name = match proposed.filter(ours).filter(|name| free(&inner, name)) {
            Some(name) => name.to_owned(),
            None => (0..=inner.names.len()).map(|n| format!("{}{n}", self.1)).find(|name| free(&inner, name))?,
        };
        if name.len() > NAME_LIMIT {
            return None;
        }
        inner.names.insert(id.to_owned(), (name.clone(), None));
        Some(name)
    }

    /// Frees a connection's name after the delay, unless the connection takes it again before.
    pub fn release(&self, id: &str) {
        if let Some((_, released)) = self.lock().names.get_mut(id) {
            *released = Some(Instant::now());
        }
    }

    /// Names by connection id, released ones included.
    pub fn all(&self) -> BTreeMap<String, String> {
        self.lock().names.iter().map(|(id, (name, _))| (id.clone(), name.clone())).collect()
    }

    /// Sets names that an earlier run has saved; existing ones win.
    pub fn restore(&self, saved: impl IntoIterator<Item = (String, String)>) {
        let mut inner = self.lock();
        for (id, name) in saved {
            if inner.names.values().all(|(taken, _)| *taken != name) {
                inner.names.entry(id).or_insert((name, None));
            }
        }
    }
}
