//! The trees in SQLite. Uniqueness of names and prefixes among siblings is a constraint of the schema, too.

use std::path::Path;

use ipnet::IpNet;
use meridio_common::Error;
use meridio_common::storage::Storage;
use rusqlite::{Connection, OptionalExtension, params};

use crate::tree::{Choice, Seconds, Stale};

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS ipam_trench (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    name TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS ipam_pool (
    family INTEGER PRIMARY KEY,
    prefix TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS ipam_conduit (
    family INTEGER NOT NULL REFERENCES ipam_pool ON DELETE CASCADE,
    conduit TEXT NOT NULL,
    prefix TEXT NOT NULL,
    PRIMARY KEY (family, conduit),
    UNIQUE (family, prefix)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ipam_node (
    family INTEGER NOT NULL,
    conduit TEXT NOT NULL,
    node TEXT NOT NULL,
    prefix TEXT NOT NULL,
    updated_at INTEGER NOT NULL,
    PRIMARY KEY (family, conduit, node),
    UNIQUE (family, prefix),
    FOREIGN KEY (family, conduit) REFERENCES ipam_conduit ON DELETE CASCADE
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ipam_child (
    family INTEGER NOT NULL,
    conduit TEXT NOT NULL,
    node TEXT NOT NULL,
    child TEXT NOT NULL,
    address TEXT NOT NULL,
    updated_at INTEGER NOT NULL,
    PRIMARY KEY (family, conduit, node, child),
    UNIQUE (family, address),
    FOREIGN KEY (family, conduit, node) REFERENCES ipam_node ON DELETE CASCADE
) WITHOUT ROWID;";

/// Rows that are deleted in one go, so that the thread is free for allocations in between.
const BATCH: usize = 50;

/// A row of the conduits.
pub(crate) struct ConduitRow {
    pub(crate) conduit: String,
    pub(crate) prefix: String,
}

/// A row of the nodes.
pub(crate) struct NodeRow {
    pub(crate) conduit: String,
    pub(crate) node: String,
    pub(crate) prefix: String,
    pub(crate) updated: Seconds,
}

/// A row of the children.
pub(crate) struct ChildRow {
    pub(crate) conduit: String,
    pub(crate) node: String,
    pub(crate) child: String,
    pub(crate) address: String,
    pub(crate) updated: Seconds,
}

/// Everything of one family.
pub(crate) struct Rows {
    pub(crate) pool: String,
    pub(crate) conduits: Vec<ConduitRow>,
    pub(crate) nodes: Vec<NodeRow>,
    pub(crate) children: Vec<ChildRow>,
}

/// Who an allocation is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    pub(crate) conduit: String,
    pub(crate) node: String,
    pub(crate) child: String,
}

/// The tables.
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

    /// The trench of this database; `trench` if it had none.
    pub(crate) async fn trench(&self, trench: String) -> Result<String, Error> {
        self.0
            .call(move |connection| {
                connection.execute("INSERT OR IGNORE INTO ipam_trench VALUES (1, ?1)", [trench])?;
                connection.query_row("SELECT name FROM ipam_trench", [], |row| row.get(0))
            })
            .await
    }

    /// All rows of a family; a pool that is not yet stored is stored as `prefix`.
    pub(crate) async fn load(&self, family: u8, prefix: IpNet) -> Result<Rows, Error> {
        self.0
            .call(move |connection| {
                connection
                    .execute("INSERT OR IGNORE INTO ipam_pool VALUES (?1, ?2)", params![family, prefix.to_string()])?;
                read(connection, family)
            })
            .await
    }

    pub(crate) async fn add_conduit(&self, family: u8, conduit: String, prefix: IpNet) -> Result<(), Error> {
        self.0
            .call(move |connection| {
                connection.execute(
                    "INSERT INTO ipam_conduit VALUES (?1, ?2, ?3)",
                    params![family, conduit, prefix.to_string()],
                )
            })
            .await
            .map(drop)
    }

    /// Removes a conduit and all below it.
    pub(crate) async fn remove_conduit(&self, family: u8, conduit: String) -> Result<(), Error> {
        self.0
            .call(move |connection| {
                connection
                    .execute("DELETE FROM ipam_conduit WHERE family = ?1 AND conduit = ?2", params![family, conduit])
            })
            .await
            .map(drop)
    }

    /// Stores a choice, or that it was asked for again: all or nothing.
    pub(crate) async fn put(&self, family: u8, name: Name, choice: Choice, now: Seconds) -> Result<(), Error> {
        self.0
            .call(move |connection| {
                let now = i64::try_from(now).unwrap_or(i64::MAX);
                let Name { conduit, node, child } = name;
                let transaction = connection.transaction()?;
                transaction
                    .prepare_cached(
                        "INSERT INTO ipam_node VALUES (?1, ?2, ?3, ?4, ?5)
                         ON CONFLICT (family, conduit, node) DO UPDATE SET updated_at = excluded.updated_at",
                    )?
                    .execute(params![family, conduit, node, choice.node.to_string(), now])?;
                transaction
                    .prepare_cached(
                        "INSERT INTO ipam_child VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                         ON CONFLICT (family, conduit, node, child) DO UPDATE SET updated_at = excluded.updated_at",
                    )?
                    .execute(params![family, conduit, node, child, choice.address.to_string(), now])?;
                transaction.commit()
            })
            .await
    }

    pub(crate) async fn remove(&self, family: u8, stale: &[Stale]) -> Result<(), Error> {
        for batch in stale.chunks(BATCH) {
            let batch = batch.to_vec();
            self.0
                .call(move |connection| {
                    let transaction = connection.transaction()?;
                    for Stale { conduit, node, child } in &batch {
                        match child {
                            Some(child) => transaction.execute(
                                "DELETE FROM ipam_child WHERE family = ?1 AND conduit = ?2 AND node = ?3 AND child = ?4",
                                params![family, conduit, node, child],
                            )?,
                            None => transaction.execute(
                                "DELETE FROM ipam_node WHERE family = ?1 AND conduit = ?2 AND node = ?3",
                                params![family, conduit, node],
                            )?,
                        };
                    }
                    transaction.commit()
                })
                .await?;
        }
        Ok(())
    }
}

fn read(connection: &mut Connection, family: u8) -> rusqlite::Result<Rows> {
    let pool = connection
        .query_row("SELECT prefix FROM ipam_pool WHERE family = ?1", [family], |row| row.get(0))
        .optional()?;
    let time = |seconds: i64| Seconds::try_from(seconds).unwrap_or(0);
    let mut statement = connection.prepare("SELECT conduit, prefix FROM ipam_conduit WHERE family = ?1")?;
    let conduits = statement
        .query_map([family], |row| Ok(ConduitRow { conduit: row.get(0)?, prefix: row.get(1)? }))?
        .collect::<Result<_, _>>()?;
    let mut statement =
        connection.prepare("SELECT conduit, node, prefix, updated_at FROM ipam_node WHERE family = ?1")?;
    let nodes = statement
        .query_map([family], |row| {
            Ok(NodeRow { conduit: row.get(0)?, node: row.get(1)?, prefix: row.get(2)?, updated: time(row.get(3)?) })
        })?
        .collect::<Result<_, _>>()?;
    let mut statement =
        connection.prepare("SELECT conduit, node, child, address, updated_at FROM ipam_child WHERE family = ?1")?;
    let children = statement
        .query_map([family], |row| {
            Ok(ChildRow {
                conduit: row.get(0)?,
                node: row.get(1)?,
                child: row.get(2)?,
                address: row.get(3)?,
                updated: time(row.get(4)?),
            })
        })?
        .collect::<Result<_, _>>()?;
    Ok(Rows { pool: pool.unwrap_or_default(), conduits, nodes, children })
}
