//! Targets in SQLite. A stream is known by its whole path, so two of one name in different conduits do not disturb each other, as they
//! do in the original.

use std::collections::BTreeMap;
use std::path::Path;

use meridio_common::Error;
use meridio_common::storage::Storage;
use meridio_proto::nsp::v1::{Conduit, Stream, Target, Trench};
use rusqlite::{Connection, params};

use crate::registry::Key;

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS nsp_target (
    ips TEXT NOT NULL,
    type INTEGER NOT NULL,
    stream TEXT NOT NULL,
    conduit TEXT NOT NULL,
    trench TEXT NOT NULL,
    has_stream INTEGER NOT NULL,
    status INTEGER NOT NULL,
    context TEXT NOT NULL,
    PRIMARY KEY (ips, type, stream, conduit, trench)
) WITHOUT ROWID;";

/// The table of targets.
#[derive(Clone, Debug)]
pub(crate) struct Store(Storage);

impl Store {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self(Storage::open(path, SCHEMA)?))
    }

    /// From now on every write fails, as on a full volume.
    #[cfg(test)]
    pub(crate) async fn refuse_writes(&self, refuse: bool) -> Result<(), Error> {
        self.0.call(move |connection| connection.pragma_update(None, "query_only", refuse)).await
    }

    pub(crate) async fn all(&self) -> Result<Vec<Target>, Error> {
        self.0.call(read_all).await
    }

    /// Writes one target; it is in the file when this returns.
    pub(crate) async fn put(&self, key: Key, target: &Target) -> Result<(), Error> {
        let (status, has_stream) = (target.status, target.stream.is_some());
        // A map of texts always has a JSON form.
        let context = serde_json::to_string(&target.context).unwrap_or_else(|_| "{}".to_owned());
        self.0
            .call(move |connection| {
                connection
                    .prepare_cached("INSERT OR REPLACE INTO nsp_target VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)")?
                    .execute(params![
                        key.ips,
                        key.kind,
                        key.stream,
                        key.conduit,
                        key.trench,
                        has_stream,
                        status,
                        context
                    ])
            })
            .await
            .map(drop)
    }

    /// Deletes all of `keys` or none.
    pub(crate) async fn delete(&self, keys: Vec<Key>) -> Result<(), Error> {
        self.0
            .call(move |connection| {
                let transaction = connection.transaction()?;
                for key in &keys {
                    transaction
                        .prepare_cached("DELETE FROM nsp_target WHERE ips = ?1 AND type = ?2 AND stream = ?3 AND conduit = ?4 AND trench = ?5")?
                        .execute(params![key.ips, key.kind, key.stream, key.conduit, key.trench])?;
                }
                transaction.commit()
            })
            .await
    }
}

fn read_all(connection: &mut Connection) -> rusqlite::Result<Vec<Target>> {
    let mut statement =
        connection.prepare("SELECT ips, type, stream, conduit, trench, has_stream, status, context FROM nsp_target")?;
    let rows = statement.query_map([], |row| {
        let ips: String = row.get(0)?;
        let has_stream: bool = row.get(5)?;
        let context: String = row.get(7)?;
        let trench = Trench { name: row.get(4)? };
        let conduit = Conduit { name: row.get(3)?, trench: Some(trench), destination_port_nats: Vec::new() };
        let stream = Stream { name: row.get(2)?, conduit: Some(conduit), max_targets: 0 };
        Ok(Target {
            ips: ips.split(';').map(str::to_owned).collect(),
            context: serde_json::from_str::<BTreeMap<String, String>>(&context).unwrap_or_default(),
            status: row.get(6)?,
            r#type: row.get(1)?,
            stream: has_stream.then_some(stream),
        })
    })?;
    rows.collect()
}
