//! Where to connect to or listen on.

use crate::Error;
use std::{fmt, path::PathBuf, str::FromStr};

/// A transport address: `unix:///path`, `unix:relative`, `tcp://host:port` or `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Address {
    /// A stream socket in the file system.
    Unix(PathBuf),
    /// `host:port`; the host may be a name, an IPv4 address, a bracketed IPv6 address or, to listen, empty.
    Tcp(String),
}

impl Address {
    /// Reads an address in one of the forms above.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let fail = |cause| Err(Error::Address { text: text.to_owned(), cause });
        if let Some(path) = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:")) {
            return match path {
                "" | "/" => fail("no path"),
                // Abstract sockets have no inode, so they cannot be registered with NSM.
                _ if path.starts_with('@') => fail("abstract sockets are not supported"),
                _ if path.contains('\0') => fail("the path has a NUL byte"),
                _ => Ok(Self::Unix(PathBuf::from(percent_decode(path)))),
            };
        }
        let rest = text.strip_prefix("tcp://").unwrap_or(text).trim_end_matches('/');
        if rest.contains("://") {
            return fail("the scheme must be unix or tcp");
        }
        let Some((host, port)) = rest.rsplit_once(':') else { return fail("no port") };
        if port.parse::<u16>().is_err() {
            return fail("the port is not a number from 0 to 65535");
        }
        let bracketed = host.starts_with('[') && host.ends_with(']');
        if host.contains(':') && !bracketed {
            return fail("an IPv6 address needs brackets");
        }
        if host.contains(|c: char| c.is_whitespace() || c == '/' || c == '@') {
            return fail("the host has a character that is not allowed");
        }
        Ok(Self::Tcp(rest.to_owned()))
    }

    /// Whether descriptors can be passed.
    pub fn is_unix(&self) -> bool {
        matches!(self, Self::Unix(_))
    }
}

/// URL escapes in a path; NSM treats its socket addresses as URLs. An escape that is not one stays as it is.
fn percent_decode(path: &str) -> String {
    let (bytes, mut out, mut at) = (path.as_bytes(), Vec::with_capacity(path.len()), 0);
    while let Some(&byte) = bytes.get(at) {
        let digits = path.get(at + 1..at + 3).filter(|d| byte == b'%' && d.bytes().all(|b| b.is_ascii_hexdigit()));
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()).filter(|&decoded| decoded != 0) {
            Some(decoded) => {
                out.push(decoded);
                at += 3;
            }
            None => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8(out).unwrap_or_else(|_| path.to_owned())
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(text)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // An absolute path gives the three slashes of a URL, a relative one the opaque form.
            Self::Unix(path) if path.is_absolute() => write!(f, "unix://{}", path.display()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host) => write!(f, "tcp://{host}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms() {
        for (text, url) in [
            ("unix:///run/a.sock", "unix:///run/a.sock"),
            ("unix:/run/a.sock", "unix:///run/a.sock"),
            ("unix:rel.sock", "unix:rel.sock"),
            ("unix:///run/a%20b", "unix:///run/a b"),
            ("unix:///run/100%", "unix:///run/100%"),
            ("tcp://10.0.0.1:5001", "tcp://10.0.0.1:5001"),
            ("tcp://:5001", "tcp://:5001"),
            ("nsp-service.default:7778", "tcp://nsp-service.default:7778"),
            ("[::1]:80", "tcp://[::1]:80"),
        ] {
            assert_eq!(Address::parse(text).unwrap().to_string(), url, "{text}");
        }
    }

    #[test]
    fn garbage_is_refused() {
        for text in [
            "",
            "unix:",
            "unix:///",
            "unix:@abstract",
            "tcp://host",
            "host:port",
            "host:70000",
            "::1:80",
            "http://a:1",
            "a b:1",
            "inode://4/5",
        ] {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }
}
