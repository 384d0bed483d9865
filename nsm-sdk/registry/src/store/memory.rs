//! A store that lives as long as the process.

use super::{Change, Expect, Record, Store, StoreError, Watch, history::History};
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Objects in maps.
#[derive(Default)]
pub struct MemoryStore(Mutex<State>);

#[derive(Default)]
struct State {
    revision: u64,
    tables: BTreeMap<&'static str, BTreeMap<String, Record>>,
    history: History,
}

impl MemoryStore {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait::async_trait]
impl Store for MemoryStore {
    async fn get(&self, table: &'static str, key: &str) -> Result<Option<Record>, StoreError> {
        Ok(self.state().tables.get(table).and_then(|records| records.get(key)).cloned())
    }

    async fn list(&self, table: &'static str) -> Result<(Vec<Record>, u64), StoreError> {
        let state = self.state();
        let records = state.tables.get(table).map(|records| records.values().cloned().collect()).unwrap_or_default();
        Ok((records, state.revision))
    }

    async fn put_if(&self, table: &'static str, key: &str, value: Vec<u8>, expect: Expect) -> Result<u64, StoreError> {
        let mut state = self.state();
        let records = state.tables.entry(table).or_default();
        expect.check(key, records.get(key).map(|record| record.revision))?;
        state.revision += 1;
        let record = Record { key: key.to_owned(), value, revision: state.revision };
        state.tables.entry(table).or_default().insert(key.to_owned(), record.clone());
        let revision = state.revision;
        state.history.push(table, revision, Change::Put(record));
        Ok(revision)
    }

    async fn delete_if(&self, table: &'static str, key: &str, expect: Expect) -> Result<Option<Record>, StoreError> {
        let mut state = self.state();
        let records = state.tables.entry(table).or_default();
        expect.check(key, records.get(key).map(|record| record.revision))?;
        let Some(mut record) = records.remove(key) else { return Ok(None) };
        state.revision += 1;
        let revision = state.revision;
        record.revision = revision;
        state.history.push(table, revision, Change::Deleted(record.clone()));
        Ok(Some(record))
    }

    async fn watch_from(&self, table: &'static str, revision: u64) -> Result<Watch, StoreError> {
        self.state().history.watch(table, revision)
    }
}
