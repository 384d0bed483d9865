//! One thread that owns an SQLite connection: rusqlite blocks and is not `Sync`, and one owner orders all writes.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::Error;

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// Handle to the thread; it ends with the last clone, after all jobs that were handed in.
#[derive(Clone, Debug)]
pub struct Storage {
    jobs: mpsc::Sender<Job>,
    path: PathBuf,
}

impl Storage {
    /// Opens (or makes) the database, runs `schema` (idempotent SQL) and starts the thread. Writes are in the file before a
    /// job's answer (WAL, `synchronous = FULL`).
    ///
    /// # Errors
    /// When the directory or file cannot be made, or is no database of this schema.
    pub fn open(path: &Path, schema: &str) -> Result<Self, Error> {
        let failed = |e: rusqlite::Error| Error::Storage { object: path.display().to_string(), reason: e.to_string() };
        if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(|e| Error::io(parent.display().to_string(), e))?;
        }
        let mut connection = Connection::open(path).map_err(failed)?;
        connection.busy_timeout(Duration::from_secs(5)).map_err(failed)?;
        // The answer of `journal_mode` is a row, which execute_batch ignores.
        let settings = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;";
        connection.execute_batch(settings).map_err(failed)?;
        connection.execute_batch(schema).map_err(failed)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("storage".to_owned())
            .spawn(move || {
                for job in queue {
                    job(&mut connection);
                }
            })
            .map_err(|e| Error::io("storage thread", e))?;
        Ok(Self { jobs, path: path.to_owned() })
    }

    /// Runs `job` on the connection and waits for its result. A caller that leaves does not stop a job that was handed in.
    ///
    /// # Errors
    /// What the job returned, or that the thread is gone.
    pub async fn call<R, F>(&self, job: F) -> Result<R, Error>
    where
        R: Send + 'static,
        F: FnOnce(&mut Connection) -> rusqlite::Result<R> + Send + 'static,
    {
        let failed = |reason: String| Error::Storage { object: self.path.display().to_string(), reason };
        let (answer, result) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            // The caller may have left; the write counts all the same.
            let _ = answer.send(job(connection));
        });
        self.jobs.send(job).map_err(|_| failed("storage thread ended".to_owned()))?;
        result.await.map_err(|_| failed("storage thread ended".to_owned()))?.map_err(|e| failed(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn survives_a_reopen_and_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/registry.db");
        let schema = "CREATE TABLE IF NOT EXISTS t (k TEXT PRIMARY KEY)";
        let storage = Storage::open(&path, schema).unwrap();
        storage.call(|c| c.execute("INSERT INTO t VALUES ('x')", [])).await.unwrap();
        let error = storage.call(|c| c.execute("INSERT INTO t VALUES ('x')", [])).await.unwrap_err().to_string();
        assert!(error.contains("registry.db") && error.contains("UNIQUE"), "{error}");
        drop(storage);
        let storage = Storage::open(&path, schema).unwrap();
        let count: i64 = storage.call(|c| c.query_row("SELECT count(*) FROM t", [], |r| r.get(0))).await.unwrap();
        assert_eq!(count, 1);

        std::fs::write(dir.path().join("bad.db"), "this is not a database, it is a sentence of some length").unwrap();
        assert!(Storage::open(&dir.path().join("bad.db"), schema).unwrap_err().to_string().contains("bad.db"));
    }
}
