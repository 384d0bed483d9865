//! Connections that are put aside until the next operation on them.

use nsm_proto::connection::Connection;
use prost::Message;
use std::{fmt, sync::Arc};

/// A connection in as little memory as it takes: encoded in one piece, which clones share. What a process keeps for each of
/// its connections is mostly this, several times; as a [`Connection`] it is a hundred pieces with gaps between them.
#[derive(Clone, PartialEq, Eq)]
pub struct Kept(Arc<[u8]>);

impl Kept {
    /// Puts a connection aside.
    pub fn new(connection: &Connection) -> Self {
        Self(connection.encode_to_vec().into())
    }

    /// The same, in the memory of `other` if that is an equal one: maps are ordered, so equal connections have equal encodings.
    #[must_use]
    pub fn shared_with(self, other: Option<&Self>) -> Self {
        other.filter(|other| **other == self).cloned().unwrap_or(self)
    }

    /// The connection.
    pub fn get(&self) -> Connection {
        // What was encoded here is never wrong.
        Connection::decode(&*self.0).unwrap_or_default()
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_proto::connection::{Mechanism, Path, PathSegment, State};

    fn connection() -> Connection {
        let parameters = [("b", "2"), ("a", "1")].map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let segment = PathSegment { name: "nsc".into(), id: "c".into(), token: "a.b.c".into(), ..Default::default() };
        Connection {
            id: "c".into(),
            mechanism: Some(Mechanism { parameters, ..Default::default() }),
            path: Some(Path { index: 1, path_segments: vec![segment; 3] }),
            state: State::Down.into(),
            ..Default::default()
        }
    }

    #[test]
    fn what_was_put_aside_comes_back_as_it_was() {
        assert_eq!(Kept::new(&connection()).get(), connection());
        assert_eq!(Kept::new(&Connection::default()).get(), Connection::default());
    }

    #[test]
    fn equal_ones_share_their_memory_and_others_do_not() {
        let (first, mut other) = (Kept::new(&connection()), connection());
        let same = Kept::new(&other).shared_with(Some(&first));
        assert!(Arc::ptr_eq(&same.0, &first.0));
        other.set_state(State::Up);
        let other = Kept::new(&other).shared_with(Some(&first));
        assert!(other != first && other.get().state() == State::Up);
        assert!(!Arc::ptr_eq(&Kept::new(&connection()).shared_with(None).0, &first.0));
    }
}
