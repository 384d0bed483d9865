//! What a client may change of an established connection.

use crate::{Connection, ConnectionContext};
use std::collections::BTreeMap;

/// The connection to request: the current one (which may be newer than what the caller saw, because refresh or heal
/// ran meanwhile) with the caller's changes relative to what it was `returned`.
pub(super) fn merge(returned: Option<&Connection>, requested: Connection, current: Option<&Connection>) -> Connection {
    let (Some(returned), Some(current)) = (returned, current) else { return requested };
    let mut result = current.clone();
    if requested.network_service_endpoint_name != returned.network_service_endpoint_name {
        result.network_service_endpoint_name = requested.network_service_endpoint_name;
    }
    if requested.context != returned.context {
        result.context = merge_context(returned.context.as_ref(), requested.context, result.context);
    }
    result
}

fn merge_context(
    returned: Option<&ConnectionContext>,
    requested: Option<ConnectionContext>,
    current: Option<ConnectionContext>,
) -> Option<ConnectionContext> {
    let Some(current) = current else { return requested };
    let requested = requested.unwrap_or_default();
    let empty = BTreeMap::new();
    let old = returned.map_or(&empty, |context| &context.extra_context);
    let extra_context = merge_map(old, &requested.extra_context, current.extra_context);
    Some(ConnectionContext { extra_context, ..requested })
}

/// Keys the caller changed or removed; new ones are the chain's business.
fn merge_map(
    returned: &BTreeMap<String, String>,
    requested: &BTreeMap<String, String>,
    mut current: BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    for (key, old) in returned {
        match requested.get(key) {
            Some(new) if new != old => _ = current.insert(key.clone(), new.clone()),
            Some(_) => {}
            None => _ = current.remove(key),
        }
    }
    current
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IpContext;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    fn conn(mtu: u32, extra: &[(&str, &str)]) -> Connection {
        let context = ConnectionContext { mtu, extra_context: map(extra), ..Default::default() };
        Connection { context: Some(context), ..Default::default() }
    }

    // Conformance 12
    #[test]
    fn context_changes_labels_do_not() {
        let returned = conn(1, &[("a", "1"), ("b", "1"), ("c", "1")]);
        let current = conn(2, &[("a", "1"), ("b", "1"), ("c", "1"), ("d", "1")]);
        let mut requested = conn(3, &[("a", "2"), ("b", "1"), ("e", "1")]);
        requested.labels = map(&[("x", "y")]);
        requested.context.as_mut().unwrap().ip_context =
            Some(IpContext { src_ip_addrs: vec!["10.0.0.1/32".into()], ..Default::default() });
        let merged = merge(Some(&returned), requested.clone(), Some(&current));
        let context = merged.context.unwrap();
        assert_eq!(context.mtu, 3);
        assert_eq!(context.ip_context, requested.context.unwrap().ip_context);
        assert_eq!(context.extra_context, map(&[("a", "2"), ("b", "1"), ("d", "1")]));
        assert!(merged.labels.is_empty());
    }

    // Conformance 12
    #[test]
    fn an_unchanged_request_keeps_the_newer_context() {
        let (returned, current) = (conn(1, &[]), conn(2, &[]));
        assert_eq!(merge(Some(&returned), returned.clone(), Some(&current)), current);
    }
}
