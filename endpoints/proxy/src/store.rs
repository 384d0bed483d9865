//! The connections to load balancers, on disk: what only this process and the node's NSM know, both of which may be restarted at once.
//!
//! NSM recognises a connection by the ids on its path. If its managers and the client have all forgotten them, another connection is made
//! beside the old one, and at a load balancer on another node, where nothing was restarted, two interfaces claim one address.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fs, io};

use meridio_proto::nsm::connection::ConnectionEvent;
use nsm_chain::Connection;
use prost::Message;

/// The file and what is in it, by connection id. Clones share it. A file that cannot be used is a warning, not an obstacle.
#[derive(Clone, Debug)]
pub(crate) struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// None: nothing is kept.
    file: Option<PathBuf>,
    connections: Mutex<BTreeMap<String, Connection>>,
}

impl Store {
    /// What an earlier run of the proxy `name` has left in `directory`; without a directory nothing is kept.
    pub(crate) fn open(directory: &str, name: &str) -> Self {
        let file =
            (!directory.is_empty()).then(|| Path::new(directory).join(format!("proxy-{}", name.replace('/', "_"))));
        let connections = file.as_deref().map(read).unwrap_or_default();
        Self(Arc::new(Inner { file, connections: Mutex::new(connections) }))
    }

    /// The connection `id` as it was last noted.
    pub(crate) fn connection(&self, id: &str) -> Option<Connection> {
        self.connections().get(id).cloned()
    }

    /// Notes a connection. Tokens, which change with every refresh and are worth something to others, are not.
    pub(crate) fn note(&self, connection: &Connection) {
        let mut connection = connection.clone();
        for segment in connection.path.iter_mut().flat_map(|path| &mut path.path_segments) {
            (segment.token, segment.expires) = (String::new(), None);
        }
        let mut connections = self.connections();
        if connections.get(&connection.id) != Some(&connection) {
            connections.insert(connection.id.clone(), connection);
            self.write(&connections);
        }
    }

    /// The connection is no longer wanted.
    pub(crate) fn forget(&self, id: &str) {
        let mut connections = self.connections();
        if connections.remove(id).is_some() {
            self.write(&connections);
        }
    }

    /// Of those that are not in `ids` nobody has spoken since the start: they are no longer wanted either.
    pub(crate) fn keep_only(&self, ids: &BTreeSet<String>) {
        let mut connections = self.connections();
        let before = connections.len();
        connections.retain(|id, _| ids.contains(id));
        if connections.len() != before {
            self.write(&connections);
        }
    }

    fn connections(&self) -> MutexGuard<'_, BTreeMap<String, Connection>> {
        self.0.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces the file as a whole: it is complete at every moment. What is not complete has a name that no proxy's file has.
    fn write(&self, connections: &BTreeMap<String, Connection>) {
        let Some(file) = &self.0.file else { return };
        let all = ConnectionEvent { connections: connections.clone(), ..ConnectionEvent::default() };
        let new = file.with_file_name(format!(".{}", file.file_name().unwrap_or_default().display()));
        let written = file.parent().map_or(Ok(()), fs::create_dir_all);
        let written = written.and_then(|()| fs::write(&new, all.encode_to_vec())).and_then(|()| fs::rename(&new, file));
        if let Err(error) = written {
            tracing::warn!(file = %file.display(), %error, "connections are not noted: a restart of proxy and NSM at once may break them");
        }
    }
}

fn read(file: &Path) -> BTreeMap<String, Connection> {
    let decoded = match fs::read(file) {
        Ok(bytes) => ConnectionEvent::decode(bytes.as_slice()).map_err(io::Error::other),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return BTreeMap::new(),
        Err(cause) => Err(cause),
    };
    match decoded {
        Ok(all) => all.connections,
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "connections of an earlier run cannot be read");
            BTreeMap::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_chain::{Path as NsmPath, PathSegment};

    fn connection(id: &str, token: &str) -> Connection {
        let segment = PathSegment { id: id.into(), token: token.into(), ..PathSegment::default() };
        let path = NsmPath { index: 0, path_segments: vec![segment] };
        Connection { id: id.into(), path: Some(path), ..Connection::default() }
    }

    #[test]
    fn connections_are_found_again_without_their_tokens() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("made/when/needed");
        let open = || Store::open(directory.to_str().unwrap(), "proxy/1");
        let store = open();
        assert_eq!(store.connection("a"), None);
        store.note(&connection("a", "secret"));
        store.note(&connection("b", "secret"));
        let file = directory.join("proxy-proxy_1");
        let written = || fs::metadata(&file).unwrap().modified().unwrap();
        let before = written();
        store.note(&connection("a", "another secret"));
        assert_eq!(written(), before, "a refresh changes nothing");
        assert!(!String::from_utf8_lossy(&fs::read(&file).unwrap()).contains("secret"));

        let store = open();
        assert_eq!(store.connection("a"), Some(connection("a", "")));
        store.forget("a");
        let store = open();
        assert_eq!((store.connection("a"), store.connection("b")), (None, Some(connection("b", ""))));

        store.note(&connection("c", ""));
        store.keep_only(&["b".to_owned(), "never noted".to_owned()].into());
        assert_eq!((open().connection("b"), open().connection("c")), (Some(connection("b", "")), None));

        // Proxies of several trenches share the directory, whatever they are called.
        for other in ["proxy/1.new", "new", "proxy/1.json"] {
            Store::open(directory.to_str().unwrap(), other).note(&connection(other, ""));
        }
        for other in ["proxy/1.new", "new", "proxy/1.json"] {
            let noted = Store::open(directory.to_str().unwrap(), other).connection(other);
            assert_eq!(noted, Some(connection(other, "")));
        }
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 4, "and nothing else is left there");

        // Nonsense is as good as nothing, and nowhere to write to is no obstacle.
        fs::write(&file, [0xff; 7]).unwrap();
        assert_eq!(open().connection("b"), None);
        let nowhere = Store::open(file.to_str().unwrap(), "x");
        nowhere.note(&connection("a", ""));
        assert_eq!(nowhere.connection("a"), Some(connection("a", "")));
        Store::open("", "x").note(&connection("a", ""));
    }
}
