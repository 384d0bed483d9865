//! The recent changes of a store, and who listens to new ones.

use super::{Change, StoreError};
use std::collections::VecDeque;
use tokio::sync::mpsc;

/// Changes kept for watches that start a little in the past.
const KEPT: usize = 1024;
/// Changes a watcher may be behind before it has to list again.
const QUEUE: usize = 256;

/// Changes as they happen. `None` means that this watch has fallen behind or the store is gone: list again.
#[derive(Debug)]
pub struct Watch {
    past: VecDeque<Change>,
    live: mpsc::Receiver<Change>,
}

impl Watch {
    /// The next change.
    pub async fn next(&mut self) -> Option<Change> {
        match self.past.pop_front() {
            Some(change) => Some(change),
            None => self.live.recv().await,
        }
    }
}

struct Entry {
    table: &'static str,
    revision: u64,
    change: Change,
}

/// The changes after `floor`, as far as they are kept.
#[derive(Default)]
pub(super) struct History {
    floor: u64,
    entries: VecDeque<Entry>,
    watchers: Vec<(&'static str, mpsc::Sender<Change>)>,
}

impl History {
    /// A history that knows nothing before `floor`.
    pub(super) fn starting_at(floor: u64) -> Self {
        Self { floor, ..Self::default() }
    }

    pub(super) fn push(&mut self, table: &'static str, revision: u64, change: Change) {
        // A watcher whose queue is full is let go; it finds its queue closed once it has read it.
        self.watchers.retain(|(watched, queue)| match *watched == table {
            true => queue.try_send(change.clone()).is_ok(),
            false => !queue.is_closed(),
        });
        self.entries.push_back(Entry { table, revision, change });
        if self.entries.len() > KEPT
            && let Some(old) = self.entries.pop_front()
        {
            self.floor = old.revision;
        }
    }

    pub(super) fn watch(&mut self, table: &'static str, revision: u64) -> Result<Watch, StoreError> {
        if revision < self.floor {
            return Err(StoreError::Compacted(revision));
        }
        let past = self
            .entries
            .iter()
            .filter(|entry| entry.table == table && entry.revision > revision)
            .map(|entry| entry.change.clone())
            .collect();
        let (queue, live) = mpsc::channel(QUEUE);
        self.watchers.push((table, queue));
        Ok(Watch { past, live })
    }
}
