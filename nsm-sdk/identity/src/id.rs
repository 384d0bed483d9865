//! SPIFFE IDs (SPIFFE-ID.md, section 2).

use crate::Error;
use std::{fmt, str::FromStr};

/// `spiffe://trust-domain/path`, checked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    text: String,
    domain_end: usize,
}

const SCHEME: &str = "spiffe://";

impl SpiffeId {
    /// The id of a workload: a trust domain and a path with or without its leading slash.
    pub fn new(trust_domain: &str, path: &str) -> Result<Self, Error> {
        format!("{SCHEME}{trust_domain}/{}", path.trim_start_matches('/')).parse()
    }

    /// The trust domain, without scheme.
    pub fn trust_domain(&self) -> &str {
        self.text.get(SCHEME.len()..self.domain_end).unwrap_or_default()
    }

    /// The path with its leading slash; empty for a trust domain's own id.
    pub fn path(&self) -> &str {
        self.text.get(self.domain_end..).unwrap_or_default()
    }

    /// The whole text.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl FromStr for SpiffeId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |cause| Err(Error::SpiffeId { text: text.to_owned(), cause });
        let Some(rest) = text.strip_prefix(SCHEME) else { return fail("it does not begin with spiffe://") };
        if text.len() > 2048 {
            return fail("it is longer than 2048 bytes");
        }
        let (domain, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        if domain.is_empty() || domain.len() > 255 {
            return fail("the trust domain must have 1 to 255 characters");
        }
        if !domain.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b)) {
            return fail("the trust domain may have lower case letters, digits, '-', '.' and '_' only");
        }
        for segment in path.split('/').skip(1) {
            if segment.is_empty() || segment == "." || segment == ".." {
                return fail("a path segment is empty, '.' or '..'");
            }
            if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
                return fail("a path segment may have letters, digits, '-', '.' and '_' only");
            }
        }
        Ok(Self { text: text.to_owned(), domain_end: SCHEME.len() + domain.len() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts() {
        let id: SpiffeId = "spiffe://example.org/ns/default/pod".parse().unwrap();
        assert_eq!((id.trust_domain(), id.path()), ("example.org", "/ns/default/pod"));
        assert_eq!(SpiffeId::new("example.org", "a").unwrap().as_str(), "spiffe://example.org/a");
        assert_eq!("spiffe://example.org".parse::<SpiffeId>().unwrap().path(), "");
    }

    #[test]
    fn garbage_is_refused() {
        for text in [
            "",
            "spiffe://",
            "http://a/b",
            "spiffe:///a",
            "spiffe://A/b",
            "spiffe://a/",
            "spiffe://a//b",
            "spiffe://a/../b",
            "spiffe://a:80/b",
            "spiffe://u@a/b",
            "spiffe://a/b?c",
            "spiffe://a/b#c",
            "spiffe://a/é",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
    }
}
