//! What a client asks for, as one URL.

use http::Uri;
use nsm_chain::{
    Mechanism,
    elements::kernel_mechanism::{KERNEL, LOCAL, NAME, NAME_LIMIT},
};
use percent_encoding::percent_decode_str;
use std::{collections::BTreeMap, str::FromStr};

/// A network service, the interface to it and the labels of the request: `kernel://service/interface?label=value`.
///
/// Interface and labels may be left out; a bare name is the service. A label that is repeated gets its values joined by commas.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceUrl {
    /// Name of the network service, `name@domain` for one of another domain.
    pub service: String,
    /// Name of the interface, 15 bytes at most; made up if there is none.
    pub interface: Option<String>,
    /// Labels by which an endpoint is chosen.
    pub labels: BTreeMap<String, String>,
}

impl ServiceUrl {
    /// The mechanism to ask for.
    pub(crate) fn preference(&self) -> Mechanism {
        let parameters = self.interface.iter().map(|name| (NAME.to_owned(), name.clone())).collect();
        Mechanism { cls: LOCAL.into(), r#type: KERNEL.into(), parameters }
    }
}

fn decoded(text: &str) -> Result<String, String> {
    let text = percent_decode_str(text).decode_utf8().map_err(|_| format!("{text:?} is not UTF-8"))?;
    Ok(text.into_owned())
}

fn interface(path: &str) -> Result<Option<String>, String> {
    let name = decoded(path.rsplit('/').next().unwrap_or_default())?;
    match name.len() {
        0 => Ok(None),
        length if length > NAME_LIMIT => Err(format!("interface {name:?} is longer than {NAME_LIMIT} bytes")),
        _ => Ok(Some(name)),
    }
}

fn labels(query: &str) -> Result<BTreeMap<String, String>, String> {
    let mut labels = BTreeMap::<String, String>::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').ok_or_else(|| format!("label {pair:?} is not key=value"))?;
        let value = decoded(value)?;
        labels
            .entry(decoded(key)?)
            .and_modify(|known| {
                known.push(',');
                known.push_str(&value);
            })
            .or_insert(value);
    }
    Ok(labels)
}

impl FromStr for ServiceUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fault = |cause: String| format!("service {text:?}: {cause}");
        let uri: Uri = text.parse().map_err(|cause: http::uri::InvalidUri| fault(cause.to_string()))?;
        match uri.scheme_str() {
            None => {}
            Some(scheme) if scheme.eq_ignore_ascii_case(KERNEL) => {}
            Some(scheme) => return Err(fault(format!("mechanism {scheme:?} is not supported, only kernel"))),
        }
        let service = uri.authority().map(http::uri::Authority::to_string).unwrap_or_default();
        if service.is_empty() {
            return Err(fault("no name".into()));
        }
        Ok(Self {
            service,
            interface: interface(uri.path()).map_err(fault)?,
            labels: labels(uri.query().unwrap_or_default()).map_err(fault)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> (String, Option<String>, Vec<(String, String)>) {
        let url: ServiceUrl = text.parse().unwrap();
        (url.service, url.interface, url.labels.into_iter().collect())
    }

    #[test]
    fn forms() {
        assert_eq!(parse("icmp-responder"), ("icmp-responder".into(), None, vec![]));
        assert_eq!(parse("kernel://svc/nsm-1"), ("svc".into(), Some("nsm-1".into()), vec![]));
        let red = vec![("color".to_owned(), "red,blue".to_owned()), ("n".to_owned(), "a b".to_owned())];
        assert_eq!(parse("kernel://svc?color=red&color=blue&n=a%20b"), ("svc".into(), None, red));
        assert_eq!(parse("KERNEL://load_balancer.conduit-a.trench/nsm-0").0, "load_balancer.conduit-a.trench");
        assert_eq!(parse("kernel://svc@domain/if").0, "svc@domain");
    }

    #[test]
    fn garbage_is_refused_by_name() {
        for (text, cause) in [
            ("", "service \"\""),
            ("/only/a/path", "no name"),
            ("memif://svc/if", "only kernel"),
            ("kernel://svc/an-interface-name-too-long", "longer than 15"),
            ("kernel://svc?color", "is not key=value"),
            ("kernel://svc?color=%ff", "is not UTF-8"),
        ] {
            let error = text.parse::<ServiceUrl>().unwrap_err();
            assert!(error.contains(cause), "{text}: {error}");
        }
    }
}
