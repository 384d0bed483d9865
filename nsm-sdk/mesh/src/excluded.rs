//! Prefixes of the node's other networks, which no endpoint shall hand out.

use nsm_chain::{Connection, Element, Error, Next, RequestCall};
use serde::Deserialize;
use std::path::PathBuf;

/// Where NSM keeps the list.
pub const DEFAULT_FILE: &str = "/var/lib/networkservicemesh/config/excluded_prefixes.yaml";

#[derive(Default, Deserialize)]
struct File {
    #[serde(default)]
    prefixes: Vec<String>,
}

/// Adds the prefixes of a YAML file (key `prefixes`) to each request. The file is read anew each time: it is short, and
/// changes take effect at once. No file means no prefixes.
#[derive(Clone, Debug)]
pub struct ExcludedPrefixes(PathBuf);

impl ExcludedPrefixes {
    /// Reads `file`.
    pub fn new(file: impl Into<PathBuf>) -> Self {
        Self(file.into())
    }

    async fn read(&self) -> Vec<String> {
        let Ok(text) = tokio::fs::read_to_string(&self.0).await else { return Vec::new() };
        match serde_yaml_ng::from_str::<Option<File>>(&text) {
            Ok(file) => file.unwrap_or_default().prefixes,
            Err(cause) => {
                tracing::warn!(file = %self.0.display(), %cause, "the excluded prefixes cannot be read");
                Vec::new()
            }
        }
    }
}

#[async_trait::async_trait]
impl Element for ExcludedPrefixes {
    fn name(&self) -> &'static str {
        "excludedprefixes"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let context = call.connection_mut().context.get_or_insert_default();
        let known = &mut context.ip_context.get_or_insert_default().excluded_prefixes;
        for prefix in self.read().await {
            if !known.contains(&prefix) {
                known.push(prefix);
            }
        }
        next.request(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_chain::{Chain, Context, NetworkServiceRequest};

    // Conformance 97
    #[tokio::test]
    async fn a_union_without_duplicates_that_follows_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("excluded.yaml");
        let chain = Chain::builder().element(ExcludedPrefixes::new(&file)).build();
        let ask = || async {
            let request = NetworkServiceRequest { connection: Some(Connection::default()), ..Default::default() };
            let connection = chain.request(RequestCall::new(request, Context::new())).await.unwrap();
            connection.context.unwrap().ip_context.unwrap().excluded_prefixes
        };
        assert!(ask().await.is_empty());
        for (text, expected) in [
            ("prefixes: [10.0.0.0/8, 10.0.0.0/8, fd00::/8]", vec!["10.0.0.0/8", "fd00::/8"]),
            ("prefixes: [192.168.0.0/16]", vec!["192.168.0.0/16"]),
            ("", vec![]),
            ("prefixes: {", vec![]),
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(ask().await, expected);
        }
    }
}
