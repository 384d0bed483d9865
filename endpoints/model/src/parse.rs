//! The ConfigMap of a trench, read strictly.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_yaml_ng::{Mapping, Value};

use crate::read::{Item, from_str};
use crate::values::{DEFAULT_MAX_TARGETS, MAX_TARGETS_LIMIT};
use crate::{
    Attractor, Bfd, BgpAuth, Conduit, Configuration, Fault, Faults, Flow, Gateway, GatewayProtocol, PortNat, Stream,
    Vip, canonical_subnet,
};

/// The seven keys.
pub(crate) const KEYS: [&str; 7] = ["trench", "conduits", "streams", "flows", "vips", "attractors", "gateways"];
/// What else a ConfigMap document may hold.
const DOCUMENT_FIELDS: [&str; 5] = ["apiVersion", "kind", "metadata", "data", "immutable"];
/// RFC 4271: two octets.
const HOLD_TIME_MAX: u32 = 65_535;

impl Configuration {
    /// Reads a ConfigMap: a YAML document with `data:`, or the bare mapping of the seven keys. The value of a key is a text that is a
    /// YAML document itself, as in the original, or the same structure in place. Absent list keys are empty lists.
    ///
    /// # Errors
    /// All faults at once: syntax, unknown fields and bad values. References that lead nowhere are none, see
    /// [`Configuration::parse_with_warnings`].
    pub fn parse(text: &str) -> Result<Self, Faults> {
        Self::parse_with_warnings(text).map(|(configuration, _)| configuration)
    }

    /// As [`Configuration::parse`], and tells what of the text was left out ([`Configuration::resolve`]).
    ///
    /// # Errors
    /// As [`Configuration::parse`].
    pub fn parse_with_warnings(text: &str) -> Result<(Self, Vec<Fault>), Faults> {
        let document: Value =
            serde_yaml_ng::from_str(text).map_err(|e| Faults(vec![Fault::new("document", e.to_string())]))?;
        let Value::Mapping(document) = document else {
            return Err(Faults(vec![Fault::new("document", "has to be a ConfigMap or a mapping of its seven keys")]));
        };
        let mut faults = Vec::new();
        let data = match document.get("data") {
            Some(Value::Mapping(data)) => {
                unknown_keys(&document, &DOCUMENT_FIELDS, "document", &mut faults);
                data
            }
            Some(_) => return Err(Faults(vec![Fault::new("key \"data\"", "has to be a mapping of the seven keys")])),
            None => &document,
        };
        unknown_keys(data, &KEYS, "configuration", &mut faults);
        let mut reader = Reader { trench: String::new(), faults };
        let mut configuration = reader.read(data);
        let Reader { mut faults, .. } = reader;
        faults.extend(configuration.check());
        if !faults.is_empty() {
            return Err(Faults(faults));
        }
        let warnings = configuration.resolve();
        Ok((configuration, warnings))
    }
}

fn unknown_keys(mapping: &Mapping, known: &[&str], object: &str, faults: &mut Vec<Fault>) {
    for key in mapping.keys() {
        let name = key.as_str().unwrap_or_default();
        if !known.contains(&name) {
            faults.push(Fault::new(object, format!("unknown key {name:?} (known: {})", known.join(", "))));
        }
    }
}

struct Reader {
    trench: String,
    faults: Vec<Fault>,
}

impl Reader {
    fn read(&mut self, data: &Mapping) -> Configuration {
        let mut configuration = Configuration::default();
        if let Some(value) = self.document(data, "trench") {
            let place = "key \"trench\"".to_owned();
            if let Some(mut item) = Item::new("trench", place, &value, &mut self.faults) {
                configuration.trench.name = item.required("name").unwrap_or_default();
                item.finish();
            }
        } else if !self.faults.iter().any(|f| f.object == "key \"trench\"") {
            self.faults.push(Fault::new("key \"trench\"", "is missing"));
        }
        self.trench.clone_from(&configuration.trench.name);
        configuration.conduits = self.items(data, "conduits", "conduit", conduit);
        configuration.streams = self.items(data, "streams", "stream", stream);
        configuration.flows = self.items(data, "flows", "flow", flow);
        configuration.vips = self.items(data, "vips", "vip", vip);
        configuration.attractors = self.items(data, "attractors", "attractor", attractor);
        configuration.gateways = self.items(data, "gateways", "gateway", gateway);
        configuration.sort();
        configuration
    }

    /// The YAML document under a key; none if absent or empty.
    fn document(&mut self, data: &Mapping, key: &str) -> Option<Value> {
        let value = match data.get(key)? {
            Value::String(text) => match serde_yaml_ng::from_str(text) {
                Ok(value) => value,
                Err(error) => {
                    self.faults.push(Fault::new(format!("key {key:?}"), error.to_string()));
                    return None;
                }
            },
            value => value.clone(),
        };
        Some(value).filter(|value| !value.is_null())
    }

    fn items<T>(
        &mut self,
        data: &Mapping,
        key: &'static str,
        kind: &'static str,
        read: fn(&mut Item<'_>, String) -> Option<T>,
    ) -> Vec<T> {
        let Some(document) = self.document(data, key) else { return Vec::new() };
        let place = format!("key {key:?}");
        let list = match &document {
            Value::Mapping(fields) => {
                unknown_keys(fields, &["items"], &place, &mut self.faults);
                fields.get("items").cloned().unwrap_or(Value::Null)
            }
            _ => {
                self.faults.push(Fault::new(place, "has to be a mapping with the list \"items\""));
                return Vec::new();
            }
        };
        let list = match list {
            Value::Sequence(list) => list,
            Value::Null => return Vec::new(),
            _ => {
                self.faults.push(Fault::new(place, "\"items\" has to be a list"));
                return Vec::new();
            }
        };
        let (mut values, mut names) = (Vec::new(), BTreeSet::new());
        for (index, value) in list.iter().enumerate() {
            let place = format!("key {key:?}, item {}", index + 1);
            let Some(mut item) = Item::new(kind, place, value, &mut self.faults) else { continue };
            let name = item.parsed("name", crate::check::object_name).unwrap_or_default();
            if !name.is_empty() && !names.insert(name.clone()) {
                item.fault(format!("the name is used by more than one {kind}"));
            }
            if !matches!(kind, "stream" | "flow") {
                check_trench(&mut item, &self.trench);
            }
            values.extend(read(&mut item, name));
            item.finish();
        }
        values
    }
}

/// The original silently drops an object of another trench.
fn check_trench(item: &mut Item<'_>, trench: &str) {
    if let Some(named) = item.required("trench")
        && named != trench
        && !trench.is_empty()
    {
        item.fault(format!("trench {named:?} is not the trench of this configuration, {trench:?}"));
    }
}

fn conduit(item: &mut Item<'_>, name: String) -> Option<Conduit> {
    let mut port_nats = Vec::new();
    for (index, value) in item.values("destination-port-nats").iter().enumerate() {
        let nat = item.nested(&format!("destination-port-nats[{index}]"), value, |nat| {
            let port = nat.required_number("port", 1u16, u16::MAX);
            let target_port = nat.required_number("target-port", 1u16, u16::MAX);
            let vips = nat.texts("vips");
            let protocol = nat.parsed("protocol", from_str);
            Some(PortNat { port: port?, target_port: target_port?, vips, protocol: protocol? })
        });
        port_nats.extend(nat.flatten());
    }
    Some(Conduit { name, port_nats })
}

// A value with a fault gets a stand-in, so that the rules between its values still see the item: one pass finds everything.

fn stream(item: &mut Item<'_>, name: String) -> Option<Stream> {
    let conduit = item.required("conduit").unwrap_or_default();
    let max_targets = item.number("max-targets", 1, MAX_TARGETS_LIMIT).unwrap_or(DEFAULT_MAX_TARGETS);
    Some(Stream { name, conduit, max_targets })
}

fn flow(item: &mut Item<'_>, name: String) -> Option<Flow> {
    let flow = Flow {
        name,
        source_subnets: item.parsed_list("source-subnets", canonical_subnet),
        destination_ports: item.parsed_list("destination-port-ranges", from_str),
        source_ports: item.parsed_list("source-port-ranges", from_str),
        protocols: item.parsed_list("protocols", from_str),
        vips: item.texts("vips"),
        priority: item.required_number("priority", 0, i32::MAX).unwrap_or_default(),
        stream: item.required("stream").unwrap_or_default(),
        byte_matches: item.parsed_list("byte-matches", from_str),
    };
    if item.values("protocols").is_empty() {
        item.fault("protocols is missing or empty");
    }
    Some(flow)
}

fn vip(item: &mut Item<'_>, name: String) -> Option<Vip> {
    let address = item.parsed("address", canonical_subnet);
    Some(Vip { name, address: address? })
}

fn attractor(item: &mut Item<'_>, name: String) -> Option<Attractor> {
    Some(Attractor { name, vips: item.texts("vips"), gateways: item.texts("gateways") })
}

fn gateway(item: &mut Item<'_>, name: String) -> Option<Gateway> {
    let address = item.parsed("address", |text| {
        text.parse::<IpAddr>().map_err(|_| format!("{text:?} is not an IPv4 or IPv6 address (without prefix length)"))
    });
    if let (Some(family), Some(address)) = (item.text("ip-family"), address) {
        let expected = if address.is_ipv4() { "ipv4" } else { "ipv6" };
        if family != expected {
            item.fault(format!("ip-family {family:?} does not fit the address, which is {expected}"));
        }
    }
    let on = item.flag("bfd");
    let milliseconds = u32::MAX / 1000;
    let timers = [
        item.number("min-tx", 0, milliseconds),
        item.number("min-rx", 0, milliseconds),
        item.number("multiplier", 0, 255),
    ];
    if !on && ["min-tx", "min-rx", "multiplier"].iter().any(|field| item.has(field)) {
        item.fault("min-tx, min-rx and multiplier need bfd: true");
    }
    let [min_tx, min_rx, multiplier] = timers.map(Option::unwrap_or_default);
    let bfd = on.then_some(Bfd { min_tx, min_rx, multiplier });
    let protocol = match item.required("protocol").as_deref() {
        Some("bgp") => bgp(item),
        Some("static") => static_route(item),
        unknown => {
            if let Some(other) = unknown {
                item.fault(format!("protocol {other:?} is not one of bgp, static"));
            }
            // Without a protocol nobody can say which of these should be there.
            item.pass_over(&["remote-asn", "local-asn", "remote-port", "local-port", "hold-time", "bgp-auth"]);
            None
        }
    };
    Some(Gateway { name, address: address?, protocol: protocol?, bfd })
}

fn bgp(item: &mut Item<'_>) -> Option<GatewayProtocol> {
    let remote_asn = item.required_number("remote-asn", 1, u32::MAX);
    let local_asn = item.required_number("local-asn", 1, u32::MAX);
    let remote_port = item.number("remote-port", 1u16, u16::MAX).unwrap_or_default();
    let local_port = item.number("local-port", 1u16, u16::MAX).unwrap_or_default();
    let hold_time = item.number("hold-time", 3, HOLD_TIME_MAX).unwrap_or_default();
    let auth = item.nested_field("bgp-auth", |auth| {
        let key = auth.required("key");
        let source = auth.required("source");
        Some(BgpAuth { key: key?, source: source? })
    });
    Some(GatewayProtocol::Bgp {
        remote_asn: remote_asn?,
        local_asn: local_asn?,
        remote_port,
        local_port,
        hold_time,
        auth: auth.flatten(),
    })
}

fn static_route(item: &mut Item<'_>) -> Option<GatewayProtocol> {
    let mut clean = true;
    for field in ["remote-asn", "local-asn", "remote-port", "local-port", "hold-time"] {
        // A zero is how some writers spell "not set".
        if item.number::<u32>(field, 0, u32::MAX).is_some_and(|n| n != 0) {
            item.fault(format!("{field} must not be set when protocol is static"));
            clean = false;
        }
    }
    if item.nested_field("bgp-auth", |auth| (auth.text("key"), auth.text("source"))).is_some() {
        item.fault("bgp-auth must not be set when protocol is static");
        clean = false;
    }
    clean.then_some(GatewayProtocol::Static)
}
