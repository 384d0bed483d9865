//! What is allowed in a configuration but surely not meant.

use ipnet::IpNet;

use crate::{Configuration, Fault, Flow, PortRange};

/// Name lengths from the original's documentation: beyond them the names of generated Kubernetes objects do not fit 63 characters.
const NAME_LENGTHS: [(&str, usize); 3] = [("trench", 42), ("attractor", 41), ("conduit", 57)];

/// Warnings about a configuration without faults, one for each object and cause.
pub fn warnings(configuration: &Configuration) -> Vec<Fault> {
    let mut warnings = Vec::new();
    names(configuration, &mut warnings);
    vips(configuration, &mut warnings);
    flows(configuration, &mut warnings);
    shadowed(configuration, &mut warnings);
    nats(configuration, &mut warnings);
    warnings
}

fn names(configuration: &Configuration, warnings: &mut Vec<Fault>) {
    let trench = std::iter::once(("trench", &configuration.trench.name));
    let attractors = configuration.attractors.iter().map(|a| ("attractor", &a.name));
    let conduits = configuration.conduits.iter().map(|c| ("conduit", &c.name));
    for (kind, name) in trench.chain(attractors).chain(conduits) {
        let limit = NAME_LENGTHS.iter().find(|(k, _)| *k == kind).map_or(63, |(_, limit)| *limit);
        if name.len() > limit {
            let reason = format!(
                "the name has {} characters; beyond {limit} the names of its Kubernetes objects are too long",
                name.len()
            );
            warnings.push(Fault::new(format!("{kind} {name}"), reason));
        }
    }
}

fn vips(configuration: &Configuration, warnings: &mut Vec<Fault>) {
    for (i, vip) in configuration.vips.iter().enumerate() {
        let object = format!("vip {}", vip.name);
        if vip.address.prefix_len() != vip.address.max_prefix_len() {
            let reason = format!("{} is not a single address (/{})", vip.address, vip.address.max_prefix_len());
            warnings.push(Fault::new(object.clone(), reason));
        }
        for other in configuration.vips.iter().skip(i + 1) {
            if covers(&vip.address, &other.address) || covers(&other.address, &vip.address) {
                let reason = format!("{} overlaps vip {} ({})", vip.address, other.name, other.address);
                warnings.push(Fault::new(object.clone(), reason));
            }
        }
        if !configuration.attractors.iter().any(|a| a.vips.contains(&vip.name)) {
            warnings.push(Fault::new(object.clone(), "no attractor lists it: it is never announced"));
        }
        if !configuration.flows.iter().any(|f| f.vips.contains(&vip.name)) {
            warnings.push(Fault::new(object, "no flow lists it: its packets are dropped"));
        }
    }
}

fn flows(configuration: &Configuration, warnings: &mut Vec<Fault>) {
    for flow in &configuration.flows {
        let object = format!("flow {}", flow.name);
        if flow.vips.is_empty() {
            warnings.push(Fault::new(object.clone(), "lists no vip: it matches nothing"));
        }
        let of_family = |net: &IpNet| flow.source_subnets.iter().any(|s| s.max_prefix_len() == net.max_prefix_len());
        for vip in flow.vips.iter().filter_map(|name| configuration.vip(name)) {
            if !any_source(&flow.source_subnets) && !of_family(&vip.address) {
                let reason =
                    format!("its source-subnets have none of the family of vip {}: it matches nothing there", vip.name);
                warnings.push(Fault::new(object.clone(), reason));
            }
        }
        for bytes in flow.byte_matches.iter().filter(|m| !flow.protocols.contains(&m.protocol)) {
            warnings.push(Fault::new(
                object.clone(),
                format!("byte match {bytes} is for a protocol that the flow does not match"),
            ));
        }
    }
    for stream in &configuration.streams {
        if !configuration.flows.iter().any(|f| f.stream == stream.name) {
            warnings
                .push(Fault::new(format!("stream {}", stream.name), "no flow leads to it: its targets get no traffic"));
        }
    }
}

/// Flows of which another one takes every packet first.
fn shadowed(configuration: &Configuration, warnings: &mut Vec<Fault>) {
    for flow in &configuration.flows {
        let shadow = configuration.flows.iter().find(|other| {
            other.name != flow.name
                && (other.priority > flow.priority
                    || (other.priority == flow.priority && other.name < flow.name && !same(other, flow)))
                && takes_all(other, flow)
        });
        if let Some(other) = shadow.filter(|other| other.stream != flow.stream) {
            let reason = format!(
                "never matches: flow {} with priority {} takes all its packets to stream {}",
                other.name, other.priority, other.stream
            );
            warnings.push(Fault::new(format!("flow {}", flow.name), reason));
        }
        let rival = configuration.flows.iter().find(|other| {
            other.name > flow.name
                && other.priority == flow.priority
                && other.stream != flow.stream
                && meets(other, flow)
        });
        if let Some(other) = rival.filter(|_| shadow.is_none()) {
            let reason = format!(
                "has the same priority ({}) as flow {} and matches packets of it: which one wins is not defined",
                flow.priority, other.name
            );
            warnings.push(Fault::new(format!("flow {}", flow.name), reason));
        }
    }
}

/// Equal in what they match.
fn same(a: &Flow, b: &Flow) -> bool {
    takes_all(a, b) && takes_all(b, a)
}

fn covers(outer: &IpNet, inner: &IpNet) -> bool {
    outer.contains(inner)
}

fn any_port(ranges: &[PortRange]) -> bool {
    ranges.is_empty() || ranges.contains(&PortRange::ANY)
}

/// Whether every packet of `inner` also matches `outer` (sufficient, not necessary: ranges are not joined).
fn takes_all(outer: &Flow, inner: &Flow) -> bool {
    let ports = |outer: &[PortRange], inner: &[PortRange]| {
        any_port(outer) || (!any_port(inner) && inner.iter().all(|i| outer.iter().any(|o| o.contains(*i))))
    };
    !inner.vips.is_empty()
        && inner.vips.iter().all(|vip| outer.vips.contains(vip))
        && inner.protocols.iter().all(|p| outer.protocols.contains(p))
        && ports(&outer.destination_ports, &inner.destination_ports)
        && ports(&outer.source_ports, &inner.source_ports)
        && subnets_cover(&outer.source_subnets, &inner.source_subnets)
        && outer.byte_matches.iter().all(|m| inner.byte_matches.contains(m))
}

/// Whether sources are no constraint: there are none, or all are of length 0, of whichever IP version.
fn any_source(subnets: &[IpNet]) -> bool {
    subnets.iter().all(|subnet| subnet.prefix_len() == 0)
}

fn subnets_cover(outer: &[IpNet], inner: &[IpNet]) -> bool {
    any_source(outer) || (!any_source(inner) && inner.iter().all(|i| outer.iter().any(|o| covers(o, i))))
}

/// Whether some packet matches both.
fn meets(a: &Flow, b: &Flow) -> bool {
    let ports = |a: &[PortRange], b: &[PortRange]| {
        any_port(a) || any_port(b) || a.iter().any(|x| b.iter().any(|y| x.overlaps(*y)))
    };
    let subnets = any_source(&a.source_subnets)
        || any_source(&b.source_subnets)
        || a.source_subnets.iter().any(|x| b.source_subnets.iter().any(|y| covers(x, y) || covers(y, x)));
    a.vips.iter().any(|vip| b.vips.contains(vip))
        && a.protocols.iter().any(|p| b.protocols.contains(p))
        && ports(&a.destination_ports, &b.destination_ports)
        && ports(&a.source_ports, &b.source_ports)
        && subnets
        && a.byte_matches == b.byte_matches
}

fn nats(configuration: &Configuration, warnings: &mut Vec<Fault>) {
    for conduit in &configuration.conduits {
        for (i, nat) in conduit.port_nats.iter().enumerate() {
            let mut warn = |reason: String| {
                warnings.push(Fault::new(
                    format!("conduit {}", conduit.name),
                    format!("destination-port-nats[{i}] {reason}"),
                ));
            };
            if nat.port == nat.target_port {
                warn(format!("translates port {} to itself", nat.port));
            }
            let reached = |vip: &String| {
                configuration.flows.iter().any(|flow| {
                    let here = configuration.stream(&flow.stream).is_some_and(|s| s.conduit == conduit.name);
                    let port = PortRange::new(nat.port, nat.port);
                    here && flow.vips.contains(vip)
                        && flow.protocols.contains(&nat.protocol)
                        && (any_port(&flow.destination_ports)
                            || port.is_ok_and(|p| flow.destination_ports.iter().any(|r| r.contains(p))))
                })
            };
            for vip in nat.vips.iter().filter(|vip| !reached(vip)) {
                warn(format!(
                    "has no effect on vip {vip}: no flow of the conduit matches {} port {} there",
                    nat.protocol, nat.port
                ));
            }
        }
    }
}
