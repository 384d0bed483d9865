//! Connections of one client that depend on each other.

use crate::{EventOptions, elements::begin::Begin};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

/// A round waits no longer than this for connections whose turn does not come.
const ROUND: Duration = Duration::from_secs(5);

/// Requests all connections of a client again once one of them has been, as the other side had wished. Clones share it.
///
/// This happens in rounds, one after the other: an endpoint that wishes it of each of a thousand connections gets a few thousand requests,
/// not a million.
#[derive(Clone)]
pub(super) struct Together(Arc<Inner>);

struct Inner {
    begin: Weak<Begin>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Connections that were requested again since the last round began.
    refreshed: HashSet<String>,
    under_way: bool,
}

impl Together {
    pub(super) fn new(begin: &Arc<Begin>) -> Self {
        Self(Arc::new(Inner { begin: Arc::downgrade(begin), state: Mutex::default() }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection `id` has been requested again: the others follow, in the next round to begin.
    pub(super) fn follow(&self, id: &str) {
        let mut state = self.state();
        state.refreshed.insert(id.to_owned());
        if std::mem::replace(&mut state.under_way, true) {
            return;
        }
        let this = self.clone();
        tokio::spawn(async move {
            while let Some(refreshed) = this.next() {
                this.round(&refreshed).await;
            }
        });
    }

    /// Whom the next round follows; `None` if there is none.
    fn next(&self) -> Option<HashSet<String>> {
        let mut state = self.state();
        state.under_way = !state.refreshed.is_empty();
        state.under_way.then(|| std::mem::take(&mut state.refreshed))
    }

    async fn round(&self, refreshed: &HashSet<String>) {
        let Some(begin) = self.0.begin.upgrade() else { return };
        // Of several that were requested, each has to follow the others.
        let follows = |id: &String| refreshed.len() > 1 || !refreshed.contains(id);
        let factories = begin.ids().into_iter().filter(follows).filter_map(|id| begin.factory(&id));
        // One that is not established has nothing to refresh and skips it.
        let events: Vec<_> = factories.map(|other| other.request(EventOptions::default())).collect();
        drop(begin);
        let all = futures_util::future::join_all(events);
        // Whatever becomes of them, nobody else is bothered.
        drop(tokio::time::timeout(ROUND, all).await);
    }
}
