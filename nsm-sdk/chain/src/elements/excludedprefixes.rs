//! Ranges that no IPAM may hand out: those of the node ([`ExcludedPrefixes`]), and what the other connections of a client
//! have already ([`ExcludedPrefixesClient`]).

mod awareness;
mod client;

pub use awareness::AwarenessGroups;
pub use client::ExcludedPrefixesClient;

use crate::{Connection, Element, Error, Next, RequestCall};
use tokio::sync::watch;

const NAME: &str = "excludedprefixes";

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

/// Reads the `prefixes` list of NSM's excluded_prefixes.yaml: one `- prefix` per line below the key, or `[prefix, prefix]` after it.
/// What is no prefix is left out, with a warning. A text without content is an empty list.
///
/// # Errors
/// There is a text, but no list in it.
pub fn parse(yaml: &str) -> Result<Vec<String>, Error> {
    const KEY: &str = "prefixes:";
    let content: Vec<&str> = yaml.lines().map(without_comment).filter(|line| !line.is_empty()).collect();
    let is_key = |line: &&str| line.get(..KEY.len()).is_some_and(|start| start.eq_ignore_ascii_case(KEY));
    let garbled = |cause: &str| Error::new(NAME, "", format!("{cause} in {:?}", excerpt(yaml)));
    let Some(key) = content.iter().position(is_key) else {
        let empty = content.iter().all(|line| *line == "---");
        return if empty { Ok(Vec::new()) } else { Err(garbled("there is no list of prefixes")) };
    };
    let (after, below) = (content[key][KEY.len()..].trim(), &content[key + 1..]);
    let entries: Vec<String> = match after.strip_prefix('[') {
        // It may go on over several lines.
        Some(start) => {
            let text = [&[start], below].concat().join(" ");
            let (inside, _) = text.split_once(']').ok_or_else(|| garbled("the list of prefixes does not end"))?;
            inside.split(',').map(str::to_owned).collect()
        }
        None if after.is_empty() => below.iter().map_while(|line| line.strip_prefix('-')).map(str::to_owned).collect(),
        None => return Err(garbled("the prefixes are no list")),
    };
    let entries = entries.iter().map(|entry| entry.trim().trim_matches(['"', '\''])).filter(|entry| !entry.is_empty());
    let known = |entry: &&str| {
        let known = entry.parse::<ipnet::IpNet>().is_ok();
        if !known {
            tracing::warn!(entry, "this is no prefix to exclude");
        }
        known
    };
    Ok(entries.filter(known).map(str::to_owned).collect())
}

fn without_comment(line: &str) -> &str {
    let end = line.starts_with('#').then_some(0).or_else(|| line.find(" #")).unwrap_or(line.len());
    line[..end].trim()
}

/// The beginning of a text, for errors.
fn excerpt(text: &str) -> String {
    text.chars().take(60).collect()
}

#[async_trait::async_trait]
impl Element for ExcludedPrefixes {
    fn name(&self) -> &'static str {
        NAME
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
        let both = ["10.0.0.0/8", "fd00::/8"];
        for text in [
            "prefixes:\n- 10.0.0.0/8\n# x\n  - \"fd00::/8\"\n- nonsense\nother:\n- 1.1.1.1/32\n",
            "---\nPrefixes:   # the node's\n\n- '10.0.0.0/8' # v4\n- fd00::/8",
            "other: [1.1.1.1/32]\nprefixes: [10.0.0.0/8, \"fd00::/8\"]\nmore: [1.1.1.1/32]\n",
            "prefixes: [10.0.0.0/8,\n  nonsense,\n  'fd00::/8',   # v6\n]\n",
        ] {
            assert_eq!(parse(text).unwrap(), both, "{text}");
        }
        for text in ["", "\n# nothing\n", "---\n", "prefixes:\n", "prefixes: []", "prefixes:\nother:\n- 1.1.1.1/32\n"] {
            assert!(parse(text).unwrap().is_empty(), "{text}");
        }
        for (text, cause) in [
            ("garbage: [", "there is no list of prefixes"),
            ("- 10.0.0.0/8", "there is no list of prefixes"),
            ("prefixes: 10.0.0.0/8", "the prefixes are no list"),
            ("prefixes: [10.0.0.0/8", "the list of prefixes does not end"),
            ("ä: ö", "there is no list of prefixes"),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), format!("excludedprefixes: {cause} in {text:?}"));
        }
    }
}
