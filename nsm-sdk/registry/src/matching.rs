//! Which endpoints may serve a request: the matches of a network service applied to labels. Pure functions.

use nsm_proto::registry::{Match, NetworkService, NetworkServiceEndpoint};
use std::collections::BTreeMap;

/// Labels of a request or of an endpoint.
pub type Labels = BTreeMap<String, String>;

/// Whether every pair of `selector` is among `labels`, literally or after its value was rendered with `data`.
pub fn is_subset(labels: &Labels, selector: &Labels, data: &Labels) -> bool {
    selector.len() <= labels.len()
        && selector
            .iter()
            .all(|(key, wanted)| labels.get(key).is_some_and(|own| own == wanted || *own == render(wanted, data)))
}

/// Replaces every `{{.key}}` and `{{ .key }}` by the value in `data`; an absent key becomes `<no value>`. A text that
/// is no such template stays as it is.
pub fn render(text: &str, data: &Labels) -> String {
    let mut rendered = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("{{") {
        let Some((inside, behind)) = after.split_once("}}") else { return text.to_owned() };
        let Some(key) = inside.trim().strip_prefix('.').filter(|key| is_identifier(key)) else {
            return text.to_owned();
        };
        rendered.push_str(before);
        rendered.push_str(data.get(key).map_or("<no value>", String::as_str));
        rest = behind;
    }
    rendered.push_str(rest);
    rendered
}

fn is_identifier(key: &str) -> bool {
    !key.is_empty()
        && !key.starts_with(|c: char| c.is_ascii_digit())
        && key.chars().all(|c| c.is_alphanumeric() || c == '_')
}

/// The endpoints that `service` allows for a request with `labels`, in the order of its routes. An endpoint that two
/// routes name appears twice.
pub fn match_endpoints(
    service: &NetworkService,
    labels: &Labels,
    endpoints: &[NetworkServiceEndpoint],
) -> Vec<NetworkServiceEndpoint> {
    if service.matches.is_empty() {
        return endpoints.to_vec();
    }
    for rule in &service.matches {
        if !is_subset(labels, &rule.source_selector, labels) {
            continue;
        }
        let found = routed(rule, &service.name, labels, endpoints);
        if !found.is_empty() {
            return found;
        }
        if rule.fallthrough {
            continue;
        }
        if rule.metadata.is_some() && rule.routes.is_empty() {
            return endpoints.to_vec();
        }
        return found;
    }
    Vec::new()
}

fn routed(
    rule: &Match,
    service: &str,
    labels: &Labels,
    endpoints: &[NetworkServiceEndpoint],
) -> Vec<NetworkServiceEndpoint> {
    let none = Labels::new();
    let mut found = Vec::new();
    for route in &rule.routes {
        for endpoint in endpoints {
            let own = endpoint.network_service_labels.get(service).map_or(&none, |own| &own.labels);
            if is_subset(own, &route.destination_selector, labels) {
                found.push(endpoint.clone());
            }
        }
    }
    found
}

/// The forwarders (endpoints of `forwarder_service`) that `service` allows for a request with `labels`.
pub fn match_forwarders(
    service: &NetworkService,
    labels: &Labels,
    forwarders: &[NetworkServiceEndpoint],
    forwarder_service: &str,
) -> Vec<NetworkServiceEndpoint> {
    if service.matches.is_empty() {
        return forwarders.to_vec();
    }
    let none = Labels::new();
    for rule in &service.matches {
        if !is_subset(labels, &rule.source_selector, labels) {
            continue;
        }
        let wanted = match &rule.metadata {
            // Metadata without labels says as little as none.
            Some(metadata) if !metadata.labels.is_empty() => metadata.labels.clone(),
            _ => Labels::from([("p2p".to_owned(), "true".to_owned())]),
        };
        let found: Vec<_> = forwarders
            .iter()
            .filter(|forwarder| {
                let own = forwarder.network_service_labels.get(forwarder_service).map_or(&none, |own| &own.labels);
                is_subset(own, &wanted, labels)
            })
            .cloned()
            .collect();
        if !found.is_empty() || !rule.fallthrough {
            return found;
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_proto::registry::{Destination, Metadata, NetworkServiceLabels};

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }

    fn endpoint(name: &str, pairs: &[(&str, &str)]) -> NetworkServiceEndpoint {
        let own = NetworkServiceLabels { labels: labels(pairs) };
        NetworkServiceEndpoint {
            name: name.into(),
            network_service_labels: BTreeMap::from([("s".into(), own)]),
            ..Default::default()
        }
    }

    fn rule(source: &[(&str, &str)], destinations: &[&[(&str, &str)]], fallthrough: bool) -> Match {
        Match {
            source_selector: labels(source),
            routes: destinations
                .iter()
                .map(|pairs| Destination { destination_selector: labels(pairs), ..Default::default() })
                .collect(),
            fallthrough,
            ..Default::default()
        }
    }

    fn service(matches: Vec<Match>) -> NetworkService {
        NetworkService { name: "s".into(), matches, ..Default::default() }
    }

    fn names(found: &[NetworkServiceEndpoint]) -> Vec<&str> {
        found.iter().map(|endpoint| endpoint.name.as_str()).collect()
    }

    // Conformance 61
    #[test]
    fn templates_render_with_and_without_spaces() {
        let data = labels(&[("nodeName", "node-a")]);
        for (text, expected) in [
            ("{{.nodeName}}", "node-a"),
            ("{{ .nodeName }}", "node-a"),
            ("x-{{.nodeName}}-y", "x-node-a-y"),
            ("{{.absent}}", "<no value>"),
            ("{{nodeName}}", "{{nodeName}}"),
            ("{{.nodeName", "{{.nodeName"),
            ("plain", "plain"),
        ] {
            assert_eq!(render(text, &data), expected);
        }
    }

    // Conformance 70
    #[test]
    fn the_node_template_keeps_a_request_on_its_node() {
        let service = service(vec![rule(&[("nodeName", "{{.nodeName}}")], &[&[("nodeName", "{{.nodeName}}")]], false)]);
        let all = [endpoint("a", &[("nodeName", "node-a")]), endpoint("b", &[("nodeName", "node-b")])];
        assert_eq!(names(&match_endpoints(&service, &labels(&[("nodeName", "node-b")]), &all)), ["b"]);
        assert!(match_endpoints(&service, &labels(&[]), &all).is_empty());
    }

    // Conformance 56
    #[test]
    fn selectors_build_a_passthrough_order() {
        let service = service(vec![
            rule(&[("app", "firewall")], &[&[("app", "gateway")]], false),
            rule(&[], &[&[("app", "firewall")]], false),
        ]);
        let all = [endpoint("fw", &[("app", "firewall")]), endpoint("gw", &[("app", "gateway")])];
        assert_eq!(names(&match_endpoints(&service, &labels(&[]), &all)), ["fw"]);
        assert_eq!(names(&match_endpoints(&service, &labels(&[("app", "firewall")]), &all)), ["gw"]);
    }

    // Conformance 60
    #[test]
    fn fallthrough_tries_the_next_match() {
        let service = service(vec![
            rule(&[], &[&[("nodeName", "{{.nodeName}}")]], true),
            rule(&[], &[&[("capability", "vl3")]], true),
            rule(&[], &[&[("autoscaler", "true")]], true),
        ]);
        let request = labels(&[("nodeName", "n")]);
        let scaler = endpoint("scaler", &[("autoscaler", "true")]);
        let near = endpoint("near", &[("nodeName", "n")]);
        assert_eq!(names(&match_endpoints(&service, &request, std::slice::from_ref(&scaler))), ["scaler"]);
        assert_eq!(names(&match_endpoints(&service, &request, &[scaler, near])), ["near"]);
    }

    #[test]
    fn metadata_without_routes_selects_all_and_labels_pick_forwarders() {
        let mut p2mp = rule(&[], &[], false);
        p2mp.metadata = Some(Metadata { labels: labels(&[("p2mp", "true")]) });
        let service = service(vec![p2mp]);
        let all = [endpoint("a", &[("p2p", "true")]), endpoint("b", &[("p2mp", "true")])];
        assert_eq!(names(&match_endpoints(&service, &labels(&[]), &all)), ["a", "b"]);
        // Conformance 69
        assert_eq!(names(&match_forwarders(&service, &labels(&[]), &all, "s")), ["b"]);
    }

    // Conformance 69
    #[test]
    fn forwarders_default_to_point_to_point() {
        let all = [endpoint("a", &[("p2p", "true")]), endpoint("b", &[("p2mp", "true")])];
        for metadata in [None, Some(Metadata::default())] {
            let service = service(vec![Match { metadata, ..rule(&[], &[], false) }]);
            assert_eq!(names(&match_forwarders(&service, &labels(&[]), &all, "s")), ["a"], "{service:?}");
        }
    }
}
