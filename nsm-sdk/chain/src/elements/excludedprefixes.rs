//! Ranges that no IPAM may hand out: those of the node ([`ExcludedPrefixes`]), and what the other connections of a client
//! have already ([`ExcludedPrefixesClient`]).

mod awareness;
mod client;

pub use awareness::AwarenessGroups;
pub use client::ExcludedPrefixesClient;

use crate::{Connection, Element, Error, Next, RequestCall};
use tokio::sync::watch;

/// Adds prefixes to each request's `excluded_prefixes`.
#[derive(Clone, Debug)]
pub struct ExcludedPrefixes(watch::Receiver<Vec<String>>);

impl ExcludedPrefixes {
    /// Uses the latest list of a channel, whoever reads it from where.
    pub fn new(prefixes: watch::Receiver<Vec<String>>) -> Self {
        Self(prefixes)
    }

    /// A list that never changes.
    pub fn fixed(prefixes: Vec<String>) -> Self {
        Self(watch::channel(prefixes).1)
    }
}

/// Reads the `prefixes` list of NSM's excluded_prefixes.yaml: one `- prefix` per line below the key.
pub fn parse(yaml: &str) -> Vec<String> {
    let below = yaml.lines().skip_while(|line| !line.trim_start().to_lowercase().starts_with("prefixes:")).skip(1);
    below
        .map(str::trim)
        .take_while(|line| line.is_empty() || line.starts_with(['-', '#']))
        .filter_map(|line| line.strip_prefix('-'))
        .map(|prefix| prefix.trim().trim_matches(['"', '\'']).to_owned())
        .filter(|prefix| prefix.parse::<ipnet::IpNet>().is_ok())
        .collect()
}

#[async_trait::async_trait]
impl Element for ExcludedPrefixes {
    fn name(&self) -> &'static str {
        "excludedprefixes"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let own = self.0.borrow().clone();
        let context = call.connection_mut().context.get_or_insert_default().ip_context.get_or_insert_default();
        for prefix in own {
            if !context.excluded_prefixes.contains(&prefix) {
                context.excluded_prefixes.push(prefix);
            }
        }
        next.request(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Chain, Context, core::testing::request_id};

    // Conformance 97
    #[tokio::test]
    async fn the_union_without_duplicates_and_the_latest_list() {
        let (sender, receiver) = watch::channel(vec!["10.0.0.0/8".to_owned(), "172.16.0.0/16".to_owned()]);
        let chain = Chain::builder().element(ExcludedPrefixes::new(receiver)).build();
        let run = async || {
            let mut call = request_id("c", Context::new());
            let context = call.connection_mut().context.get_or_insert_default().ip_context.get_or_insert_default();
            context.excluded_prefixes = vec!["10.0.0.0/8".into()];
            chain.request(call).await.unwrap().context.unwrap().ip_context.unwrap().excluded_prefixes
        };
        assert_eq!(run().await, ["10.0.0.0/8", "172.16.0.0/16"]);
        sender.send(vec!["fd00::/8".into()]).unwrap();
        assert_eq!(run().await, ["10.0.0.0/8", "fd00::/8"]);
    }

    // Conformance 97
    #[test]
    fn the_file() {
        assert_eq!(
            parse("prefixes:\n- 10.0.0.0/8\n# x\n  - \"fd00::/8\"\n- nonsense\nother:\n- 1.1.1.1/32\n"),
            ["10.0.0.0/8", "fd00::/8"]
        );
        assert!(parse("").is_empty());
    }
}
