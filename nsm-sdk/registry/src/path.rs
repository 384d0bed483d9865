//! The registry path: the tokens of everyone who passed a registration on.
//!
//! It travels in gRPC metadata under the key `path` as JSON, upwards with the request, back in the response
//! *headers*: `{"Index":0,"PathSegments":[{"token":"..."}]}`.

use serde::{Deserialize, Deserializer, Serialize};
use std::sync::{Arc, Mutex, PoisonError};
use tonic::metadata::MetadataMap;

/// The metadata key.
pub const KEY: &str = "path";

/// One process on the way of a registration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Its JWT.
    #[serde(default)]
    pub token: String,
}

/// The processes a registration has passed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistryPath {
    /// The segment of the process that looks at it.
    #[serde(rename = "Index", default)]
    pub index: usize,
    /// From the owner to the registry.
    #[serde(rename = "PathSegments", default, deserialize_with = "nullable", serialize_with = "null_if_empty")]
    pub segments: Vec<Segment>,
}

fn nullable<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Segment>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn null_if_empty<S: serde::Serializer>(segments: &[Segment], to: S) -> Result<S::Ok, S::Error> {
    if segments.is_empty() { to.serialize_none() } else { segments.serialize(to) }
}

/// A path that does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Path.Index+1=={next} should be less or equal len(Path.PathSegments)=={len}")]
pub struct PathError {
    /// Index this process would get.
    pub next: usize,
    /// Number of segments.
    pub len: usize,
}

impl RegistryPath {
    /// The last value of the key in `metadata`. `None` if there is none; an unreadable one is worth a warning only,
    /// as older peers send none or others.
    pub fn read(metadata: &MetadataMap) -> Option<Self> {
        let value = metadata.get_all(KEY).iter().next_back()?;
        match value.to_str().map_err(|e| e.to_string()).and_then(|t| serde_json::from_str(t).map_err(|e| e.to_string()))
        {
            Ok(path) => Some(path),
            Err(cause) => {
                tracing::warn!(%cause, "the peer's registry path is not readable; going on without");
                None
            }
        }
    }

    /// Puts the path under its key.
    pub fn write(&self, metadata: &mut MetadataMap) {
        let value = serde_json::to_string(self).ok().and_then(|text| text.parse().ok());
        if let Some(value) = value {
            metadata.insert(KEY, value);
        }
    }

    /// Adds the caller's and the own token: the index becomes this process's.
    pub fn advance(&mut self, peer: &str, own: &str) -> Result<(), PathError> {
        if self.segments.is_empty() {
            self.segments = vec![Segment { token: peer.into() }, Segment { token: own.into() }];
            self.index = 1;
            return Ok(());
        }
        let (next, len) = (self.index.saturating_add(1), self.segments.len());
        let Some(sender) = self.segments.get_mut(self.index) else { return Err(PathError { next, len }) };
        sender.token = peer.into();
        match self.segments.get_mut(next) {
            Some(segment) => segment.token = own.into(),
            None => self.segments.push(Segment { token: own.into() }),
        }
        self.index = next;
        Ok(())
    }

    /// The tokens from the owner's to the one at the index.
    pub fn left(&self) -> &[Segment] {
        &self.segments[..self.segments.len().min(self.index.saturating_add(1))]
    }
}

/// The path of one operation, shared by everything it passes: what is below changes what is above gets back.
#[derive(Clone, Debug, Default)]
pub struct PathHandle(Arc<Mutex<RegistryPath>>);

impl PathHandle {
    /// Wraps a path.
    pub fn new(path: RegistryPath) -> Self {
        Self(Arc::new(Mutex::new(path)))
    }
    /// A copy of what it is now.
    pub fn get(&self) -> RegistryPath {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    /// Replaces it.
    pub fn set(&self, path: RegistryPath) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = path;
    }
    /// Changes it.
    pub fn update<R>(&self, change: impl FnOnce(&mut RegistryPath) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
    /// One that changes apart from this one.
    pub fn detached(&self) -> Self {
        Self::new(self.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(index: usize, tokens: &[&str]) -> RegistryPath {
        RegistryPath { index, segments: tokens.iter().map(|token| Segment { token: token.to_string() }).collect() }
    }

    // Conformance 110
    #[test]
    fn the_json_is_what_go_writes() {
        assert_eq!(serde_json::to_string(&path(0, &[])).unwrap(), r#"{"Index":0,"PathSegments":null}"#);
        assert_eq!(serde_json::to_string(&path(1, &["a"])).unwrap(), r#"{"Index":1,"PathSegments":[{"token":"a"}]}"#);
        for (text, expected) in [
            (r#"{"Index":0,"PathSegments":null}"#, path(0, &[])),
            (r#"{"Index":1,"PathSegments":[{"token":"a"},{"token":"b"}]}"#, path(1, &["a", "b"])),
            ("{}", path(0, &[])),
        ] {
            assert_eq!(serde_json::from_str::<RegistryPath>(text).unwrap(), expected);
        }
    }

    // Conformance 110
    #[test]
    fn metadata_takes_the_last_value_and_survives_garbage() {
        let mut metadata = MetadataMap::new();
        assert_eq!(RegistryPath::read(&metadata), None);
        metadata.append(KEY, "garbage".parse().unwrap());
        assert_eq!(RegistryPath::read(&metadata), None);
        metadata.append(KEY, r#"{"Index":0,"PathSegments":[{"token":"t"}]}"#.parse().unwrap());
        assert_eq!(RegistryPath::read(&metadata), Some(path(0, &["t"])));
    }

    proptest::proptest! {
        #[test]
        fn any_path_either_advances_by_one_or_is_refused(index in 0usize..12, tokens in proptest::collection::vec(".{0,8}", 0..10)) {
            let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
            let before = path(index, &tokens);
            let mut after = before.clone();
            match after.advance("peer", "own") {
                Ok(()) => {
                    assert_eq!(after.segments[after.index].token, "own");
                    assert_eq!(after.segments[after.index - 1].token, "peer");
                    assert!(after.segments.len() >= before.segments.len());
                    assert_eq!(after.left().len(), after.index + 1);
                }
                Err(_) => assert!(index >= before.segments.len() && after == before),
            }
        }

        #[test]
        fn no_header_makes_the_reader_fail(text in "[ -~]{0,64}") {
            let mut metadata = MetadataMap::new();
            metadata.insert(KEY, text.parse().unwrap());
            let _ = RegistryPath::read(&metadata);
        }
    }

    // Conformance 111
    #[test]
    fn a_path_grows_refreshes_and_rejects_a_wrong_index() {
        let mut own = RegistryPath::default();
        own.advance("peer", "own").unwrap();
        assert_eq!(own, path(1, &["peer", "own"]));
        let mut again = path(0, &["old", "older", "right"]);
        again.advance("peer", "own").unwrap();
        assert_eq!(again, path(1, &["peer", "own", "right"]));
        let mut longer = path(1, &["a", "b"]);
        longer.advance("peer", "own").unwrap();
        assert_eq!(longer, path(2, &["a", "peer", "own"]));
        assert_eq!(path(2, &["a", "b"]).advance("peer", "own"), Err(PathError { next: 3, len: 2 }));
    }
}
