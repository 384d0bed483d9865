//! Rules within the objects of a configuration: those of the original's webhooks.

use std::collections::BTreeSet;

use crate::values::MAX_TARGETS_LIMIT;
use crate::{Configuration, Fault, PortNat, PortRange};

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
    /// The faults of a configuration that was built from values; empty for one that was parsed. What its objects are to each other
    /// is not looked at, see [`Configuration::resolve`].
    pub fn validate(&self) -> Vec<Fault> {
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
            let mut names = BTreeSet::new();
            for name in list {
                if let Err(reason) = object_name(name) {
                    faults.push(Fault::new(format!("{kind} {name}"), format!("name {reason}")));
                }
                if !names.insert(name) {
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
        faults.extend(self.check());
        faults
    }

    /// The rules between the values of an object.
    pub(crate) fn check(&self) -> Vec<Fault> {
        let mut faults = Vec::new();
        self.check_conduits(&mut faults);
        self.check_flows(&mut faults);
        faults
    }

    fn check_conduits(&self, faults: &mut Vec<Fault>) {
        for conduit in &self.conduits {
            let object = format!("conduit {}", conduit.name);
            for (i, a) in conduit.port_nats.iter().enumerate() {
                for (j, b) in conduit.port_nats.iter().enumerate().skip(i + 1) {
                    if let Some(reason) = nat_conflict(i, a, j, b) {
                        faults.push(Fault::new(object.clone(), reason));
                    }
                }
            }
        }
    }

    fn check_flows(&self, faults: &mut Vec<Fault>) {
        for flow in &self.flows {
            let object = format!("flow {}", flow.name);
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
