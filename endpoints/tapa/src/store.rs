//! What outlives the process: open streams with their identifiers, and connections.

use crate::names::{ConduitKey, StreamKey};
use base64::{Engine, engine::general_purpose::STANDARD};
use nsm_chain::Connection;
use prost::Message;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeSet,
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

/// One open stream.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedStream {
    #[serde(flatten)]
    pub(crate) key: StreamKey,
    /// The last identifier that was registered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) identifier: Option<u32>,
    /// The addresses it was registered with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) ips: Vec<String>,
}

/// One conduit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct SavedConduit {
    #[serde(flatten)]
    key: ConduitKey,
    interface: String,
    /// The NSM connection as it was last returned, protobuf in base64.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    connection: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Saved {
    streams: Vec<SavedStream>,
    conduits: Vec<SavedConduit>,
}

/// The state file. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    saved: Mutex<Saved>,
}

impl Store {
    /// Reads what an earlier run left. A file that cannot be read is as good as none: the applications open their streams again.
    pub(crate) fn open(directory: &Path, name: &str) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        let path = directory.join(format!("tapa-{}.json", name.replace('/', "_")));
        let saved = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(path = %path.display(), %error, "state of an earlier run cannot be read, starting without");
                Saved::default()
            }),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Saved::default(),
            Err(cause) => return Err(cause),
        };
        Ok(Self(Arc::new(Inner { path, saved: Mutex::new(saved) })))
    }

    /// The streams of the earlier run.
    pub(crate) fn streams(&self) -> Vec<SavedStream> {
        self.read(|saved| saved.streams.clone())
    }

    /// What is known of one stream.
    pub(crate) fn stream(&self, key: &StreamKey) -> SavedStream {
        let fresh = || SavedStream { key: key.clone(), ..SavedStream::default() };
        self.read(|saved| saved.streams.iter().find(|one| one.key == *key).cloned().unwrap_or_else(fresh))
    }

    /// Exactly these streams are open.
    pub(crate) fn set_streams(&self, open: &BTreeSet<StreamKey>) {
        self.change(|saved| {
            saved.streams.retain(|one| open.contains(&one.key));
            for key in open {
                if !saved.streams.iter().any(|one| one.key == *key) {
                    saved.streams.push(SavedStream { key: key.clone(), ..SavedStream::default() });
                }
            }
        });
    }

    /// Remembers a registration, if the stream is still open.
    pub(crate) fn set_registration(&self, key: &StreamKey, identifier: u32, ips: &[String]) {
        self.change(|saved| {
            if let Some(one) = saved.streams.iter_mut().find(|one| one.key == *key) {
                one.identifier = Some(identifier);
                one.ips = ips.to_vec();
            }
        });
    }

    /// The interface of a conduit: the one it had, or the smallest `nsm-<n>` that no other conduit has.
    pub(crate) fn interface(&self, key: &ConduitKey) -> String {
        let mut name = String::new();
        self.change(|saved| {
            if let Some(one) = saved.conduits.iter().find(|one| one.key == *key) {
                name.clone_from(&one.interface);
                return;
            }
            let taken = |name: &str| saved.conduits.iter().any(|one| one.interface == name);
            name = (0u32..).map(|n| format!("nsm-{n}")).find(|name| !taken(name)).unwrap_or_default();
            saved.conduits.push(SavedConduit { key: key.clone(), interface: name.clone(), connection: String::new() });
        });
        name
    }

    /// The connection of a conduit in the earlier run.
    pub(crate) fn connection(&self, key: &ConduitKey) -> Option<Connection> {
        let text =
            self.read(|saved| saved.conduits.iter().find(|one| one.key == *key).map(|one| one.connection.clone()))?;
        let bytes = STANDARD.decode(text).ok().filter(|bytes| !bytes.is_empty())?;
        Connection::decode(bytes.as_slice()).ok()
    }

    /// Remembers a connection.
    pub(crate) fn set_connection(&self, key: &ConduitKey, connection: &Connection) {
        let text = STANDARD.encode(connection.encode_to_vec());
        self.change(|saved| {
            if let Some(one) = saved.conduits.iter_mut().find(|one| one.key == *key) {
                one.connection = text;
            }
        });
    }

    /// The connection is closed; its interface name is free.
    pub(crate) fn forget_conduit(&self, key: &ConduitKey) {
        self.change(|saved| saved.conduits.retain(|one| one.key != *key));
    }

    fn read<T>(&self, read: impl FnOnce(&Saved) -> T) -> T {
        read(&self.0.saved.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, change: impl FnOnce(&mut Saved)) {
        let mut saved = self.0.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let before = saved.clone();
        change(&mut saved);
        if *saved == before {
            return;
        }
        if let Err(error) = write(&self.0.path, &saved) {
            tracing::warn!(path = %self.0.path.display(), %error, "state cannot be written: a restart would forget it");
        }
    }
}

/// The file is whole at every moment. It holds tokens, so it is for the owner only.
fn write(path: &Path, saved: &Saved) -> io::Result<()> {
    let temporary = path.with_extension("new");
    let mut file = fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
    file.write_all(&serde_json::to_vec_pretty(saved).map_err(io::Error::other)?)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conduit(name: &str) -> ConduitKey {
        ConduitKey { trench: "t".into(), conduit: name.into() }
    }

    fn stream(name: &str) -> StreamKey {
        StreamKey { conduit: conduit("c"), stream: name.into() }
    }

    #[test]
    fn everything_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), "a/b").unwrap();
        store.set_streams(&[stream("1"), stream("2")].into());
        store.set_registration(&stream("1"), 7, &["10.0.0.1/24".into()]);
        store.set_registration(&stream("3"), 8, &[]);
        assert_eq!(store.interface(&conduit("c")), "nsm-0");
        assert_eq!(store.interface(&conduit("d")), "nsm-1");
        let connection = Connection { id: "id".into(), ..Connection::default() };
        assert_eq!(store.connection(&conduit("c")), None);
        store.set_connection(&conduit("c"), &connection);

        let store = Store::open(dir.path(), "a/b").unwrap();
        assert_eq!(store.streams().len(), 2);
        assert_eq!(store.stream(&stream("1")).identifier, Some(7));
        assert_eq!(store.stream(&stream("1")).ips, ["10.0.0.1/24"]);
        assert_eq!(store.connection(&conduit("c")), Some(connection));
        store.set_streams(&[stream("2")].into());
        assert_eq!(store.stream(&stream("1")).identifier, None);
        store.forget_conduit(&conduit("c"));
        assert_eq!(store.interface(&conduit("e")), "nsm-0");
        assert_eq!(store.interface(&conduit("d")), "nsm-1");
    }

    #[test]
    fn a_broken_file_is_as_good_as_none() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tapa-x.json"), "{").unwrap();
        assert!(Store::open(dir.path(), "x").unwrap().streams().is_empty());
    }
}
