//! A store in one file, that outlives the process.
//!
//! One thread owns the database and works on commands in order. The write-ahead log without a sync per change survives
//! the death of the process; a power cut may cost the last changes, which their owners register again.

use super::{Change, Expect, Record, Store, StoreError, Watch, history::History};
use rusqlite::{Connection, OptionalExtension, params};
use std::path::Path;
use tokio::sync::{mpsc, oneshot};

type Job = Box<dyn FnOnce(&mut Owner) + Send>;

/// Objects in an SQLite file.
#[derive(Clone)]
pub struct SqliteStore {
    jobs: mpsc::Sender<Job>,
}

const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS object (kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, revision INTEGER NOT NULL,
        PRIMARY KEY (kind, key)) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS counter (id INTEGER PRIMARY KEY CHECK (id = 0), revision INTEGER NOT NULL);
    INSERT OR IGNORE INTO counter VALUES (0, 0);";

impl From<rusqlite::Error> for StoreError {
    fn from(cause: rusqlite::Error) -> Self {
        Self::Broken(cause.to_string())
    }
}

fn gone<E>(_: E) -> StoreError {
    StoreError::Broken("the database thread has ended".into())
}

/// SQLite's integers are signed.
fn number(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<u64> {
    row.get::<_, i64>(column).map(i64::cast_unsigned)
}

impl SqliteStore {
    /// Opens or makes the file and its folder.
    pub fn open(file: &Path) -> Result<Self, StoreError> {
        let broken = |cause: std::io::Error| StoreError::Broken(format!("{}: {cause}", file.display()));
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder).map_err(broken)?;
        }
        let db = Connection::open(file).map_err(|cause| StoreError::Broken(format!("{}: {cause}", file.display())))?;
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "synchronous", "NORMAL")?;
        db.execute_batch(SCHEMA)?;
        let revision = db.query_row("SELECT revision FROM counter", [], |row| number(row, 0))?;
        let mut owner = Owner { db, history: History::starting_at(revision) };
        let (jobs, mut queue) = mpsc::channel::<Job>(64);
        std::thread::Builder::new()
            .name("registry-store".into())
            .spawn(move || {
                while let Some(job) = queue.blocking_recv() {
                    job(&mut owner);
                }
            })
            .map_err(broken)?;
        Ok(Self { jobs })
    }

    async fn run<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Owner) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        let (answer, result) = oneshot::channel();
        let job: Job = Box::new(move |owner| {
            // Nobody may be waiting any more; the work is done all the same.
            let _ = answer.send(work(owner));
        });
        self.jobs.send(job).await.map_err(gone)?;
        result.await.map_err(gone)?
    }
}

struct Owner {
    db: Connection,
    history: History,
}

impl Owner {
    fn get(&self, table: &str, key: &str) -> Result<Option<Record>, StoreError> {
        let mut statement =
            self.db.prepare_cached("SELECT value, revision FROM object WHERE kind = ?1 AND key = ?2")?;
        let record = statement
            .query_row(params![table, key], |row| {
                Ok(Record { key: key.to_owned(), value: row.get(0)?, revision: number(row, 1)? })
            })
            .optional()?;
        Ok(record)
    }

    fn list(&self, table: &str) -> Result<(Vec<Record>, u64), StoreError> {
        let mut statement =
            self.db.prepare_cached("SELECT key, value, revision FROM object WHERE kind = ?1 ORDER BY key")?;
        let records = statement
            .query_map([table], |row| Ok(Record { key: row.get(0)?, value: row.get(1)?, revision: number(row, 2)? }))?
            .collect::<Result<_, _>>()?;
        let revision = self.db.query_row("SELECT revision FROM counter", [], |row| number(row, 0))?;
        Ok((records, revision))
    }

    fn put(&mut self, table: &'static str, key: &str, value: Vec<u8>, expect: Expect) -> Result<u64, StoreError> {
        expect.check(key, self.get(table, key)?.map(|record| record.revision))?;
        let transaction = self.db.transaction()?;
        let revision = next_revision(&transaction)?;
        transaction
            .prepare_cached("INSERT OR REPLACE INTO object (kind, key, value, revision) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![table, key, value, revision.cast_signed()])?;
        transaction.commit()?;
        self.history.push(table, revision, Change::Put(Record { key: key.to_owned(), value, revision }));
        Ok(revision)
    }

    fn delete(&mut self, table: &'static str, key: &str, expect: Expect) -> Result<Option<Record>, StoreError> {
        let stored = self.get(table, key)?;
        expect.check(key, stored.as_ref().map(|record| record.revision))?;
        let Some(mut record) = stored else { return Ok(None) };
        let transaction = self.db.transaction()?;
        record.revision = next_revision(&transaction)?;
        transaction.prepare_cached("DELETE FROM object WHERE kind = ?1 AND key = ?2")?.execute(params![table, key])?;
        transaction.commit()?;
        self.history.push(table, record.revision, Change::Deleted(record.clone()));
        Ok(Some(record))
    }
}

fn next_revision(transaction: &rusqlite::Transaction<'_>) -> Result<u64, StoreError> {
    Ok(transaction
        .prepare_cached("UPDATE counter SET revision = revision + 1 RETURNING revision")?
        .query_row([], |row| number(row, 0))?)
}

#[async_trait::async_trait]
impl Store for SqliteStore {
    async fn get(&self, table: &'static str, key: &str) -> Result<Option<Record>, StoreError> {
        let key = key.to_owned();
        self.run(move |owner| owner.get(table, &key)).await
    }

    async fn list(&self, table: &'static str) -> Result<(Vec<Record>, u64), StoreError> {
        self.run(move |owner| owner.list(table)).await
    }

    async fn put_if(&self, table: &'static str, key: &str, value: Vec<u8>, expect: Expect) -> Result<u64, StoreError> {
        let key = key.to_owned();
        self.run(move |owner| owner.put(table, &key, value, expect)).await
    }

    async fn delete_if(&self, table: &'static str, key: &str, expect: Expect) -> Result<Option<Record>, StoreError> {
        let key = key.to_owned();
        self.run(move |owner| owner.delete(table, &key, expect)).await
    }

    async fn watch_from(&self, table: &'static str, revision: u64) -> Result<Watch, StoreError> {
        self.run(move |owner| owner.history.watch(table, revision)).await
    }
}
