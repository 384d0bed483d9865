//! The streams that applications asked for, with how far each has come.

use crate::names::{ConduitKey, StreamKey};
use meridio_proto::ambassador::v1::stream_status::Status;
use std::collections::{BTreeMap, BTreeSet};
use tokio::sync::watch;

/// Desired state of the whole process, and its status. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Board(watch::Sender<BTreeMap<StreamKey, Status>>);

/// Why a stream cannot be opened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("unable to connect to trench {wanted}: another trench is already connected: {connected}")]
pub(crate) struct AnotherTrench {
    wanted: String,
    connected: String,
}

impl Board {
    pub(crate) fn new(streams: impl IntoIterator<Item = StreamKey>) -> Self {
        let streams = streams.into_iter().map(|key| (key, Status::Unavailable)).collect();
        Self(watch::Sender::new(streams))
    }

    /// Asks for a stream. A pod belongs to one trench at a time. Returns whether it is new.
    pub(crate) fn open(&self, key: StreamKey) -> Result<bool, AnotherTrench> {
        let mut result = Ok(false);
        self.0.send_if_modified(|streams| {
            let other = streams.keys().find(|other| other.conduit.trench != key.conduit.trench);
            if let Some(other) = other {
                let connected = other.conduit.trench.clone();
                result = Err(AnotherTrench { wanted: key.conduit.trench.clone(), connected });
                return false;
            }
            let new = !streams.contains_key(&key);
            streams.entry(key).or_insert(Status::Unavailable);
            result = Ok(new);
            new
        });
        result
    }

    /// Gives a stream up. It disappears from the list at once.
    pub(crate) fn close(&self, key: &StreamKey) {
        self.0.send_if_modified(|streams| streams.remove(key).is_some());
    }

    /// Tells how far a stream has come; nothing if it was given up.
    pub(crate) fn set(&self, key: &StreamKey, status: Status) {
        self.0.send_if_modified(|streams| match streams.get_mut(key) {
            Some(current) if *current != status => {
                tracing::info!(stream = %key, status = status.as_str_name(), "stream");
                *current = status;
                true
            }
            _ => false,
        });
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<BTreeMap<StreamKey, Status>> {
        self.0.subscribe()
    }

    /// Names of the streams of one conduit.
    pub(crate) fn streams(&self, conduit: &ConduitKey) -> BTreeSet<StreamKey> {
        self.0.borrow().keys().filter(|key| key.conduit == *conduit).cloned().collect()
    }

    pub(crate) fn conduits(&self) -> BTreeSet<ConduitKey> {
        self.0.borrow().keys().map(|key| key.conduit.clone()).collect()
    }

    pub(crate) fn all(&self) -> BTreeSet<StreamKey> {
        self.0.borrow().keys().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(trench: &str, stream: &str) -> StreamKey {
        let conduit = ConduitKey { trench: trench.into(), conduit: "c".into() };
        StreamKey { conduit, stream: stream.into() }
    }

    #[test]
    fn one_trench_at_a_time() {
        let board = Board::new([]);
        assert_eq!(board.open(key("a", "1")), Ok(true));
        assert_eq!(board.open(key("a", "1")), Ok(false));
        assert_eq!(board.open(key("a", "2")), Ok(true));
        let refused = board.open(key("b", "1")).unwrap_err().to_string();
        assert!(refused.contains("another trench is already connected"), "{refused}");
        board.close(&key("a", "1"));
        board.close(&key("a", "2"));
        assert_eq!(board.open(key("b", "1")), Ok(true));
    }

    #[test]
    fn only_changes_are_news() {
        let board = Board::new([key("a", "1")]);
        let mut news = board.subscribe();
        news.mark_unchanged();
        board.set(&key("a", "1"), Status::Unavailable);
        board.set(&key("a", "2"), Status::Open);
        board.close(&key("a", "2"));
        assert!(!news.has_changed().unwrap());
        board.set(&key("a", "1"), Status::Open);
        assert!(news.has_changed().unwrap());
    }
}
