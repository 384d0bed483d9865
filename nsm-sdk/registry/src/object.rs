//! What a registry holds: network services and network service endpoints, seen alike.

use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// An object of a registry. The same chains, stores and clients serve every kind of it.
pub trait Object: prost::Message + Clone + Default + PartialEq + fmt::Debug + Send + Sync + 'static {
    /// How messages and stores call this kind.
    const KIND: &'static str;
    /// Its key.
    fn name(&self) -> &str;
    /// Replaces its key.
    fn set_name(&mut self, name: String);
    /// SPIFFE ids of those who registered it, the owner first.
    fn path_ids(&self) -> &[String];
    /// The same, to be changed.
    fn path_ids_mut(&mut self) -> &mut Vec<String>;
    /// Whether `object` is what this template describes: what the template leaves unset is a wildcard.
    fn selects(&self, object: &Self) -> bool;
    /// Whether registering `other` instead would change nothing that a reader could tell.
    fn equivalent(&self, other: &Self) -> bool;
    /// When it ends by itself.
    fn expiration(&self) -> Option<SystemTime> {
        None
    }
    /// Sets when it ends; objects that do not end ignore it.
    fn set_expiration(&mut self, _at: Option<SystemTime>) {}
    /// Some registries announce a removal by a negative expiration instead of the `deleted` flag.
    fn marked_deleted(&self) -> bool {
        false
    }
}

impl Object for NetworkService {
    const KIND: &'static str = "network service";

    fn name(&self) -> &str {
        &self.name
    }
    fn set_name(&mut self, name: String) {
        self.name = name;
    }
    fn path_ids(&self) -> &[String] {
        &self.path_ids
    }
    fn path_ids_mut(&mut self) -> &mut Vec<String> {
        &mut self.path_ids
    }
    fn selects(&self, object: &Self) -> bool {
        (self.name.is_empty() || self.name == object.name)
            && (self.payload.is_empty() || self.payload == object.payload)
            && (self.matches.is_empty() || self.matches == object.matches)
    }
    fn equivalent(&self, other: &Self) -> bool {
        fn payload(service: &NetworkService) -> &str {
            if service.payload.is_empty() { "IP" } else { &service.payload }
        }
        self.name == other.name && payload(self) == payload(other) && self.matches == other.matches
    }
}

impl Object for NetworkServiceEndpoint {
    const KIND: &'static str = "network service endpoint";

    fn name(&self) -> &str {
        &self.name
    }
    fn set_name(&mut self, name: String) {
        self.name = name;
    }
    fn path_ids(&self) -> &[String] {
        &self.path_ids
    }
    fn path_ids_mut(&mut self) -> &mut Vec<String> {
        &mut self.path_ids
    }
    fn selects(&self, object: &Self) -> bool {
        (self.name.is_empty() || self.name == object.name)
            && self.network_service_labels.iter().all(|(service, wanted)| {
                wanted.labels.is_empty()
                    || object
                        .network_service_labels
                        .get(service)
                        .is_some_and(|own| contains(&own.labels, &wanted.labels))
            })
            && self.expiration_time.is_none_or(|at| object.expiration_time.is_some_and(|own| own.seconds == at.seconds))
            && self.network_service_names.iter().all(|name| object.network_service_names.contains(name))
            && (self.url.is_empty() || object.url.contains(&self.url))
    }
    fn equivalent(&self, other: &Self) -> bool {
        self == other
    }
    fn expiration(&self) -> Option<SystemTime> {
        let at = self.expiration_time?;
        let seconds = u64::try_from(at.seconds).ok()?;
        let nanos = u32::try_from(at.nanos).ok()?;
        UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
    }
    fn set_expiration(&mut self, at: Option<SystemTime>) {
        self.expiration_time = at.map(prost_types::Timestamp::from);
    }
    fn marked_deleted(&self) -> bool {
        self.expiration_time.is_some_and(|at| at.seconds < 0)
    }
}

fn contains(all: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| all.get(key) == Some(value))
}

/// What a reader asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Query<T> {
    /// The template; unset fields are wildcards.
    pub template: T,
    /// Whether to go on with live events after the current objects.
    pub watch: bool,
}

impl<T: Object> Query<T> {
    /// The current objects like `template`.
    pub fn list(template: T) -> Self {
        Self { template, watch: false }
    }
    /// The current objects like `template`, then every change to them.
    pub fn watch(template: T) -> Self {
        Self { template, watch: true }
    }
}

/// One answer of a find: an object is there (or was registered again), or it is gone.
#[derive(Clone, Debug, PartialEq)]
pub struct Event<T> {
    /// The object; for a removal what it last was.
    pub object: T,
    /// Whether it was removed.
    pub deleted: bool,
}

impl<T> Event<T> {
    /// The object is there.
    pub fn present(object: T) -> Self {
        Self { object, deleted: false }
    }
    /// The object is gone.
    pub fn gone(object: T) -> Self {
        Self { object, deleted: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_proto::registry::NetworkServiceLabels;

    fn endpoint(name: &str, services: &[&str], url: &str) -> NetworkServiceEndpoint {
        NetworkServiceEndpoint {
            name: name.into(),
            network_service_names: services.iter().map(ToString::to_string).collect(),
            url: url.into(),
            ..Default::default()
        }
    }

    fn labelled(mut endpoint: NetworkServiceEndpoint, service: &str, key: &str, value: &str) -> NetworkServiceEndpoint {
        let labels = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        endpoint.network_service_labels.insert(service.into(), NetworkServiceLabels { labels });
        endpoint
    }

    // Conformance 61
    #[test]
    fn endpoints_match_by_name_services_labels_and_part_of_the_url() {
        let object = labelled(endpoint("a", &["x", "y"], "tcp://10.0.0.1:5001"), "x", "colour", "red");
        for (template, expected) in [
            (endpoint("", &[], ""), true),
            (endpoint("a", &[], ""), true),
            (endpoint("b", &[], ""), false),
            (endpoint("", &["y"], ""), true),
            (endpoint("", &["y", "z"], ""), false),
            (endpoint("", &[], "10.0.0.1"), true),
            (endpoint("", &[], "10.0.0.2"), false),
            (labelled(endpoint("", &[], ""), "x", "colour", "red"), true),
            (labelled(endpoint("", &[], ""), "x", "colour", "blue"), false),
            (labelled(endpoint("", &[], ""), "y", "colour", "red"), false),
        ] {
            assert_eq!(template.selects(&object), expected, "{template:?}");
        }
    }

    // Conformance 61
    #[test]
    fn services_match_by_name_and_payload() {
        let object = NetworkService { name: "s".into(), payload: "IP".into(), ..Default::default() };
        assert!(NetworkService::default().selects(&object));
        assert!(!NetworkService { payload: "ETHERNET".into(), ..Default::default() }.selects(&object));
        assert!(object.equivalent(&NetworkService { name: "s".into(), ..Default::default() }));
    }

    #[test]
    fn a_negative_expiration_is_a_removal_and_no_time() {
        let mut endpoint = endpoint("a", &[], "");
        endpoint.expiration_time = Some(prost_types::Timestamp { seconds: -1, nanos: 0 });
        assert!(endpoint.marked_deleted());
        assert_eq!(endpoint.expiration(), None);
    }
}
