//! Where a registry keeps its objects: a small contract that memory, SQLite and a Kubernetes API server can all keep.
//!
//! Every change has a revision, counted up over all tables. A reader lists, then watches from the revision of the list;
//! when the watch ends, because it fell behind or the history is gone, it lists again.

mod history;
mod memory;
mod sqlite;

pub use history::Watch;
pub use memory::MemoryStore;
pub use sqlite::SqliteStore;

/// A stored object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Unique in its table.
    pub key: String,
    /// Encoded object.
    pub value: Vec<u8>,
    /// Revision of its last change; for a removal the removal's.
    pub revision: u64,
}

/// What a writer takes to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Anything or nothing.
    Any,
    /// Nothing.
    Absent,
    /// The record of that revision.
    Revision(u64),
}

impl Expect {
    fn check(self, key: &str, actual: Option<u64>) -> Result<(), StoreError> {
        let holds = match self {
            Self::Any => true,
            Self::Absent => actual.is_none(),
            Self::Revision(revision) => actual == Some(revision),
        };
        if holds { Ok(()) } else { Err(StoreError::Conflict { key: key.to_owned(), actual }) }
    }
}

/// One change of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Stored, anew or again.
    Put(Record),
    /// Removed; the record as it last was.
    Deleted(Record),
}

/// Why a store did not do it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Something else is stored than the writer took to be.
    #[error("{key}: stored revision is {actual:?}")]
    Conflict {
        /// The record's key.
        key: String,
        /// Its revision; `None` if there is none.
        actual: Option<u64>,
    },
    /// The changes since that revision are no longer known: list again.
    #[error("the history does not reach back to revision {0}")]
    Compacted(u64),
    /// The store itself fails.
    #[error("store: {0}")]
    Broken(String),
}

/// See the module.
#[async_trait::async_trait]
pub trait Store: Send + Sync + 'static {
    /// One record.
    async fn get(&self, table: &'static str, key: &str) -> Result<Option<Record>, StoreError>;
    /// All records of a table in the order of their keys, and the revision they were read at.
    async fn list(&self, table: &'static str) -> Result<(Vec<Record>, u64), StoreError>;
    /// Stores a record if `expect` holds; returns its revision.
    async fn put_if(&self, table: &'static str, key: &str, value: Vec<u8>, expect: Expect) -> Result<u64, StoreError>;
    /// Removes a record if `expect` holds; returns what it was. Removing nothing is no error unless a revision is expected.
    async fn delete_if(&self, table: &'static str, key: &str, expect: Expect) -> Result<Option<Record>, StoreError>;
    /// All changes of a table after `revision`.
    async fn watch_from(&self, table: &'static str, revision: u64) -> Result<Watch, StoreError>;
}

#[cfg(test)]
mod tests;
