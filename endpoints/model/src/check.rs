//! Rules between the objects of a configuration: the rules of the original's webhooks, and references that lead nowhere, which the
//! original drops in silence.

use std::collections::BTreeMap;

use crate::parse::NameSet;
use crate::values::MAX_TARGETS_LIMIT;
use crate::{Configuration, Fault, PortNat, PortRange};

/// Names that exist, by kind (`vip`, `stream` ...).
#[derive(Debug, Default)]
pub(crate) struct Names(BTreeMap<&'static str, NameSet>);

impl Names {
    /// Names of one kind.
    pub(crate) fn of(&mut self, kind: &'static str) -> &mut NameSet {
        self.0.entry(kind).or_default()
    }

    fn has(&self, kind: &str, name: &str) -> bool {
        self.0.get(kind).is_some_and(|names| names.contains(name))
    }
}

/// Names of Kubernetes objects: RFC 1123 subdomains.
pub(crate) fn object_name(name: &str) -> Result<String, String> {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let label = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|b| inner(b) || b == b'-')
            && part.bytes().next().is_some_and(inner)
            && part.bytes().last().is_some_and(inner)
    };
    if name.len() > 253 || !name.split('.').all(label) {
        return Err(format!("{name:?} is not a valid name (lower-case letters, digits, '-' and '.', at most 253)"));
    }
    Ok(name.to_owned())
}

impl Configuration {
    /// The faults of a configuration that was built from values; empty for one that was parsed.
    pub fn validate(&self) -> Vec<Fault> {
        let mut names = Names::default();
        let mut faults = Vec::new();
        let objects = [
            ("conduit", self.conduits.iter().map(|o| &o.name).collect::<Vec<_>>()),
            ("stream", self.streams.iter().map(|o| &o.name).collect()),
            ("flow", self.flows.iter().map(|o| &o.name).collect()),
            ("vip", self.vips.iter().map(|o| &o.name).collect()),
            ("attractor", self.attractors.iter().map(|o| &o.name).collect()),
            ("gateway", self.gateways.iter().map(|o| &o.name).collect()),
        ];
        if let Err(reason) = object_name(&self.trench.name) {
            faults.push(Fault::new("trench", format!("name {reason}")));
        }
        for (kind, list) in objects {
            for name in list {
                if let Err(reason) = object_name(name) {
                    faults.push(Fault::new(format!("{kind} {name}"), format!("name {reason}")));
                }
                if !names.of(kind).insert(name.clone()) {
                    faults.push(Fault::new(
                        format!("{kind} {name}"),
                        format!("the name is used by more than one {kind}"),
                    ));
                }
            }
        }
        for vip in self.vips.iter().filter(|vip| vip.address != vip.address.trunc()) {
            faults.push(Fault::new(format!("vip {}", vip.name), format!("address {} has host bits set", vip.address)));
        }
        for stream in self.streams.iter().filter(|s| !(1..=MAX_TARGETS_LIMIT).contains(&s.max_targets)) {
            let reason =
                format!("max-targets has to be a number from 1 to {MAX_TARGETS_LIMIT}, it is {}", stream.max_targets);
            faults.push(Fault::new(format!("stream {}", stream.name), reason));
        }
        for flow in &self.flows {
            let object = format!("flow {}", flow.name);
            if flow.priority < 0 {
                faults
                    .push(Fault::new(object.clone(), format!("priority has to be 0 or more, it is {}", flow.priority)));
            }
            if flow.protocols.is_empty() {
                faults.push(Fault::new(object, "protocols is missing or empty"));
            }
        }
        faults.extend(self.check(&names));
        faults
    }

    /// The rules between objects.
    pub(crate) fn check(&self, names: &Names) -> Vec<Fault> {
        let mut faults = Vec::new();
        self.check_conduits(names, &mut faults);
        for stream in self.streams.iter().filter(|s| !names.has("conduit", &s.conduit)) {
            faults.push(unknown("stream", &stream.name, "conduit", &stream.conduit));
        }
        self.check_flows(names, &mut faults);
        self.check_flow_conduits(&mut faults);
        self.check_attractors(names, &mut faults);
        faults
    }

    fn check_conduits(&self, names: &Names, faults: &mut Vec<Fault>) {
        for conduit in &self.conduits {
            let object = format!("conduit {}", conduit.name);
            for nat in &conduit.port_nats {
                references("conduit", &conduit.name, "vip", &nat.vips, names, faults);
            }
            for (i, a) in conduit.port_nats.iter().enumerate() {
                for (j, b) in conduit.port_nats.iter().enumerate().skip(i + 1) {
                    if let Some(reason) = nat_conflict(i, a, j, b) {
                        faults.push(Fault::new(object.clone(), reason));
                    }
                }
            }
        }
    }

    fn check_flows(&self, names: &Names, faults: &mut Vec<Fault>) {
        for flow in &self.flows {
            let object = format!("flow {}", flow.name);
            if !names.has("stream", &flow.stream) {
                faults.push(unknown("flow", &flow.name, "stream", &flow.stream));
            }
            references("flow", &flow.name, "vip", &flow.vips, names, faults);
            let mut clash = |field: &str, a: String, b: String| {
                faults.push(Fault::new(object.clone(), format!("{field} overlap: {a} and {b}")));
            };
            for (i, a) in flow.source_subnets.iter().enumerate() {
                for b in flow.source_subnets.iter().skip(i + 1).filter(|b| a.contains(*b) || b.contains(a)) {
                    clash("source-subnets", a.to_string(), b.to_string());
                }
            }
            for (field, ranges) in
                [("destination-port-ranges", &flow.destination_ports), ("source-port-ranges", &flow.source_ports)]
            {
                for (a, b) in overlaps(ranges) {
                    clash(field, a.to_string(), b.to_string());
                }
            }
            for (i, a) in flow.protocols.iter().enumerate() {
                if flow.protocols.iter().skip(i + 1).any(|b| a == b) {
                    faults.push(Fault::new(object.clone(), format!("protocols lists {a} more than once")));
                }
            }
        }
    }

    /// Flows of streams in different conduits must not share a VIP: the packet could only go one way.
    fn check_flow_conduits(&self, faults: &mut Vec<Fault>) {
        let conduit = |flow: &crate::Flow| self.stream(&flow.stream).map(|s| s.conduit.as_str());
        for (i, a) in self.flows.iter().enumerate() {
            for b in self.flows.iter().skip(i + 1) {
                let (Some(conduit_a), Some(conduit_b)) = (conduit(a), conduit(b)) else { continue };
                if conduit_a == conduit_b {
                    continue;
                }
                for vip in a.vips.iter().filter(|vip| b.vips.contains(vip)) {
                    let reason = format!(
                        "shares vip {vip} with flow {}, whose stream is in conduit {conduit_b} and not in {conduit_a}",
                        b.name
                    );
                    faults.push(Fault::new(format!("flow {}", a.name), reason));
                }
            }
        }
    }

    fn check_attractors(&self, names: &Names, faults: &mut Vec<Fault>) {
        for (i, attractor) in self.attractors.iter().enumerate() {
            references("attractor", &attractor.name, "vip", &attractor.vips, names, faults);
            references("attractor", &attractor.name, "gateway", &attractor.gateways, names, faults);
            for other in self.attractors.iter().skip(i + 1) {
                for vip in attractor.vips.iter().filter(|vip| other.vips.contains(vip)) {
                    let reason = format!("vip {vip} is also listed by attractor {}", other.name);
                    faults.push(Fault::new(format!("attractor {}", attractor.name), reason));
                }
            }
        }
    }
}

fn unknown(kind: &str, name: &str, target: &str, missing: &str) -> Fault {
    Fault::new(format!("{kind} {name}"), format!("names {target} {missing:?}, which does not exist"))
}

fn references(kind: &str, name: &str, target: &str, listed: &[String], names: &Names, faults: &mut Vec<Fault>) {
    faults.extend(
        listed.iter().filter(|missing| !names.has(target, missing)).map(|missing| unknown(kind, name, target, missing)),
    );
}

fn overlaps(ranges: &[PortRange]) -> Vec<(PortRange, PortRange)> {
    let pairs = ranges.iter().enumerate().flat_map(|(i, a)| ranges.iter().skip(i + 1).map(move |b| (*a, *b)));
    pairs.filter(|(a, b)| a.overlaps(*b)).collect()
}

/// Rules (a) and (b) of spec 2.6.
fn nat_conflict(i: usize, a: &PortNat, j: usize, b: &PortNat) -> Option<String> {
    if a.protocol != b.protocol {
        return None;
    }
    let pair = format!("destination-port-nats[{i}] and [{j}]");
    if (a.port, a.target_port) == (b.port, b.target_port) {
        return Some(format!(
            "{pair} must be merged: both translate {} port {} to {}",
            a.protocol, a.port, a.target_port
        ));
    }
    let vip = a.vips.iter().find(|vip| b.vips.contains(vip))?;
    let collision = if a.port == b.port {
        format!("both translate port {}", a.port)
    } else if a.target_port == b.target_port {
        format!("both translate to port {}", a.target_port)
    } else if a.port == b.target_port {
        format!("port {} of the first is the target-port of the second", a.port)
    } else if b.port == a.target_port {
        format!("port {} of the second is the target-port of the first", b.port)
    } else {
        return None;
    };
    Some(format!("{pair} are colliding for {} on vip {vip}: {collision}", a.protocol))
}
