//! From what is known to what the engine shall do: a pure function.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use meridio_maglev::config::Bytes;
use meridio_maglev::{Config, Flow, Nat, Protocol, Stream, Target, Targets};
use meridio_model as model;
use meridio_proto::nsp::v1 as nsp;

use crate::inputs::{Inputs, Subnet};

/// The desired state of the engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Desired {
    /// VIPs, streams, flows, port translations: what could be read of them.
    pub(crate) config: Config,
    /// Faults of the configuration, one line each; with one the previous configuration stays.
    pub(crate) faults: Vec<String>,
    /// What keeps flows from having targets, one line each.
    pub(crate) notes: Vec<String>,
    /// The targets of this configuration's streams.
    pub(crate) ready: Ready,
}

/// Which targets packets can be sent to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ready {
    /// Ready targets by stream.
    pub(crate) targets: BTreeMap<String, Targets>,
    /// What keeps registered targets out, one line each.
    pub(crate) notes: Vec<String>,
    /// How many enabled targets are kept out.
    pub(crate) missing: usize,
}

/// The desired state, once everything has been told at least once.
///
/// `sctp_ports_only`: streams whose SCTP packets are spread by their ports alone.
pub(crate) fn desired(inputs: &Inputs, sctp_ports_only: &[String]) -> Option<Desired> {
    let (conduits, streams) = (inputs.conduits.as_ref()?, inputs.streams.as_ref()?);
    let mut desired = configuration(inputs.vips.as_ref()?, conduits, streams, inputs.flows.as_ref()?, sctp_ports_only);
    let limits = desired.config.streams.iter().map(|s| (s.name.clone(), s.max_targets)).collect();
    desired.ready = ready(&limits, inputs)?;
    Some(desired)
}

/// The ready targets of streams with these max-targets, which need not be those that are configured.
pub(crate) fn ready(limits: &BTreeMap<String, u32>, inputs: &Inputs) -> Option<Ready> {
    let (messages, subnets) = (inputs.targets.as_ref()?, inputs.subnets.as_ref()?);
    Some(targets(limits, messages, subnets, &inputs.unreachable))
}

/// Everything but the targets.
pub(crate) fn configuration(
    vips: &[nsp::Vip],
    conduits: &[nsp::Conduit],
    streams: &[nsp::Stream],
    flows: &[nsp::Flow],
    sctp_ports_only: &[String],
) -> Desired {
    let mut desired = Desired::default();
    add_vips(&mut desired, vips);
    for stream in streams {
        let stream = model::Stream::from_nsp(stream);
        let sctp_ports_only = sctp_ports_only.contains(&stream.name);
        let stream = Stream { name: stream.name, max_targets: stream.max_targets, sctp_ports_only };
        desired.config.streams.push(stream);
    }
    desired.config.streams.sort();
    for flow in flows {
        add_flow(&mut desired, flow);
    }
    desired.config.flows.sort();
    for conduit in conduits {
        nats(&mut desired, conduit);
    }
    desired.faults.extend(desired.config.faults().iter().map(ToString::to_string));
    desired
}

fn add_vips(desired: &mut Desired, vips: &[nsp::Vip]) {
    for vip in vips {
        match model::Vip::from_nsp(vip) {
            Ok(vip) => desired.config.vips.push(vip.address),
            Err(faults) => desired.faults.extend(faults.lines()),
        }
    }
    desired.config.vips.sort();
    desired.config.vips.dedup();
}

fn addresses(vips: &[nsp::Vip]) -> Vec<IpNet> {
    // A VIP that cannot be read is a fault of its own list.
    let mut nets: Vec<IpNet> = vips.iter().filter_map(|vip| Some(vip.address.parse::<IpNet>().ok()?.trunc())).collect();
    nets.sort();
    nets.dedup();
    nets
}

fn protocol(protocol: model::Protocol) -> Protocol {
    match protocol {
        model::Protocol::Tcp => Protocol::Tcp,
        model::Protocol::Udp => Protocol::Udp,
        model::Protocol::Sctp => Protocol::Sctp,
    }
}

fn add_flow(desired: &mut Desired, message: &nsp::Flow) {
    let flow = match model::Flow::from_nsp(message) {
        Ok(flow) => flow,
        Err(faults) => return desired.faults.extend(faults.lines()),
    };
    let destinations = addresses(&message.vips);
    if destinations.is_empty() {
        return desired.notes.push(format!("flow {}: has no VIP, so it matches nothing", flow.name));
    }
    // The lists come one by one: the stream may be told in a moment, or the flow be gone in one. Without the flow another one
    // would send what belongs to it to targets that know nothing of it.
    let known = desired.config.streams.iter().any(|s| s.name == flow.stream);
    if !known {
        let line =
            format!("flow {}: its stream {} is not known (yet): what it matches is dropped", flow.name, flow.stream);
        desired.notes.push(line);
    }
    let ranges = |list: &[model::PortRange]| list.iter().map(|r| (r.first(), r.last())).collect();
    let bytes = |m: &model::ByteMatch| Bytes {
        protocol: protocol(m.protocol),
        offset: m.offset,
        size: m.size,
        mask: m.mask,
        value: m.value,
    };
    desired.config.flows.push(Flow {
        name: flow.name.clone(),
        stream: if known { flow.stream.clone() } else { String::new() },
        priority: flow.priority,
        destinations,
        sources: flow.source_subnets.clone(),
        protocols: flow.protocols.iter().copied().map(protocol).collect(),
        destination_ports: ranges(&flow.destination_ports),
        source_ports: ranges(&flow.source_ports),
        byte_matches: flow.byte_matches.iter().map(bytes).collect(),
    });
}

fn nats(desired: &mut Desired, message: &nsp::Conduit) {
    let conduit = match model::Conduit::from_nsp(message) {
        Ok(conduit) => conduit,
        Err(faults) => return desired.faults.extend(faults.lines()),
    };
    for (nat, message) in conduit.port_nats.iter().zip(&message.destination_port_nats) {
        desired.config.nats.push(Nat {
            vips: addresses(&message.vips),
            protocol: protocol(nat.protocol),
            port: nat.port,
            target_port: nat.target_port,
        });
    }
}

/// An address as targets register it, with or without a prefix length.
pub(crate) fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok().or_else(|| text.parse::<IpNet>().ok().map(|net| net.addr()))
}

/// The subnet of an address: the most specific one, and among equals the newest interface (a proxy that connects again
/// leaves the old interface behind for a moment).
fn subnet(subnets: &BTreeSet<Subnet>, address: IpAddr) -> Option<&Subnet> {
    let around = subnets.iter().filter(|s| s.net.contains(&address) && s.net.addr() != address);
    around.max_by_key(|s| (s.net.prefix_len(), s.index))
}

fn targets(
    limits: &BTreeMap<String, u32>,
    messages: &[nsp::Target],
    subnets: &BTreeSet<Subnet>,
    unreachable: &BTreeSet<IpAddr>,
) -> Ready {
    let mut ready = Ready::default();
    let mut sorted: Vec<&nsp::Target> = messages.iter().collect();
    // All load balancers must choose the same one of two that claim one identifier.
    sorted.sort_by_cached_key(|target| target.ips.iter().map(|ip| (address(ip), ip)).collect::<Vec<_>>());
    for message in sorted {
        if message.status != nsp::target::Status::Enabled as i32 {
            continue;
        }
        let stream = message.stream.as_ref().map(|s| s.name.as_str()).unwrap_or_default();
        let name = format!("target {} of stream {stream}", message.ips.join(","));
        let Some(limit) = limits.get(stream) else { continue };
        let identifier = match identifier(message, *limit) {
            Ok(identifier) => identifier,
            Err(fault) => {
                ready.notes.push(format!("{name}: {fault}"));
                continue;
            }
        };
        match next_hops(message, subnets, unreachable) {
            Ok(target) => match ready.targets.entry(stream.to_owned()).or_default().entry(identifier) {
                Entry::Occupied(_) => {
                    ready.notes.push(format!("{name}: identifier {identifier} is taken by another target"));
                }
                Entry::Vacant(place) => _ = place.insert(target),
            },
            Err(reason) => {
                ready.missing += 1;
                ready.notes.push(format!("{name}: {reason}"));
            }
        }
    }
    ready
}

/// The identifier that a target has registered with, which lies in 1..`limit`.
fn identifier(message: &nsp::Target, limit: u32) -> Result<u32, String> {
    let Some(text) = message.context.get("identifier") else { return Err("has no identifier".to_owned()) };
    let identifier = text.parse().ok().filter(|id| (1..=limit).contains(id));
    identifier.ok_or_else(|| format!("identifier {text:?} is not in 1..{limit}"))
}

/// The next hops of a target: all of its addresses must be reachable. Its MTU is the smallest on the way to any of them.
fn next_hops(
    message: &nsp::Target,
    subnets: &BTreeSet<Subnet>,
    unreachable: &BTreeSet<IpAddr>,
) -> Result<Target, String> {
    let mut target = Target { direct: true, ..Target::default() };
    let mut result = Ok(());
    for text in &message.ips {
        let Some(ip) = address(text) else { return Err(format!("{text:?} is no address")) };
        if unreachable.contains(&ip) {
            result = Err(format!("{ip} does not answer on its link"));
        }
        let Some(subnet) = subnet(subnets, ip) else {
            result = Err(format!("{ip} is in no subnet of an NSM interface"));
            continue;
        };
        match ip {
            IpAddr::V4(v4) => target.v4 = target.v4.or(Some((v4, subnet.index))),
            IpAddr::V6(v6) => target.v6 = target.v6.or(Some((v6, subnet.index))),
        }
        target.mtu = if target.mtu == 0 { subnet.mtu } else { target.mtu.min(subnet.mtu) };
        target.direct &= subnet.direct;
    }
    result?;
    if target.v4.is_none() && target.v6.is_none() {
        return Err("has no address".to_owned());
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_targets_with_one_identifier_all_load_balancers_take_the_same_one() {
        let stream = nsp::Stream { name: "s".into(), max_targets: 10, ..Default::default() };
        let target = |ip: &str, identifier: &str| nsp::Target {
            ips: vec![ip.into()],
            context: [("identifier".to_owned(), identifier.to_owned())].into(),
            status: nsp::target::Status::Enabled as i32,
            stream: Some(stream.clone()),
            ..Default::default()
        };
        let (first, second, other) =
            (target("172.31.0.2/24", "3"), target("172.31.0.3/24", "3"), target("172.31.0.4/24", "4"));
        let subnet = Subnet { net: "172.31.0.1/24".parse().unwrap(), index: 7, mtu: 1500, direct: false };
        let seen = |messages: [&nsp::Target; 3]| {
            let inputs = Inputs {
                vips: Some(vec![]),
                conduits: Some(vec![]),
                streams: Some(vec![stream.clone()]),
                flows: Some(vec![]),
                targets: Some(messages.map(Clone::clone).to_vec()),
                subnets: Some(BTreeSet::from([subnet.clone()])),
                ..Inputs::default()
            };
            desired(&inputs, &[]).unwrap()
        };
        let one = seen([&first, &second, &other]);
        assert_eq!(one.ready.targets["s"].keys().copied().collect::<Vec<_>>(), [3, 4]);
        assert_eq!(one.ready.targets["s"][&3].v4.unwrap().0.to_string(), "172.31.0.2");
        assert_eq!(one.ready.notes, ["target 172.31.0.3/24 of stream s: identifier 3 is taken by another target"]);
        assert_eq!(seen([&other, &second, &first]), one, "in whatever order they were told");
    }

    #[test]
    fn a_flow_of_a_stream_that_is_not_told_yet_gives_nothing_to_others() {
        let flow = nsp::Flow {
            name: "web".into(),
            stream: Some(nsp::Stream { name: "s".into(), ..Default::default() }),
            vips: vec![nsp::Vip { address: "20.0.0.1/32".into(), ..Default::default() }],
            protocols: vec!["tcp".into()],
            priority: 7,
            ..Default::default()
        };
        let streams = [nsp::Stream { name: "s".into(), max_targets: 10, ..Default::default() }];
        let of = |streams: &[nsp::Stream]| configuration(&[], &[], streams, std::slice::from_ref(&flow), &[]);
        let (early, told) = (of(&[]), of(&streams));
        let flows = |desired: &Desired| -> Vec<(String, String, i32)> {
            desired.config.flows.iter().map(|f| (f.name.clone(), f.stream.clone(), f.priority)).collect()
        };
        assert_eq!(flows(&early), [("web".to_owned(), String::new(), 7)]);
        assert_eq!(flows(&told), [("web".to_owned(), "s".to_owned(), 7)]);
        assert_eq!(early.notes, ["flow web: its stream s is not known (yet): what it matches is dropped"]);
        assert_eq!((early.faults, told.faults, told.notes), (vec![], vec![], vec![]));
    }

    #[test]
    fn a_port_is_translated_from_what_clients_address_to_what_targets_listen_on() {
        let vip = |name: &str, address: &str| nsp::Vip { name: name.into(), address: address.into(), trench: None };
        let [v4, v6] = [vip("v4", "20.0.0.1/32"), vip("v6", "2000::1/128")];
        let nat = |port, target_port, protocol: &str, vips: &[&nsp::Vip]| nsp::conduit::PortNat {
            port,
            target_port,
            protocol: protocol.into(),
            vips: vips.iter().map(|vip| (*vip).clone()).collect(),
        };
        let mut conduit = nsp::Conduit {
            name: "c".into(),
            destination_port_nats: vec![nat(80, 8080, "tcp", &[&v6, &v4]), nat(53, 5353, "udp", &[&v4])],
            ..Default::default()
        };
        let of = |conduit: &nsp::Conduit| {
            configuration(&[v4.clone(), v6.clone()], std::slice::from_ref(conduit), &[], &[], &[])
        };
        let [net4, net6]: [IpNet; 2] = ["20.0.0.1/32", "2000::1/128"].map(|net| net.parse().unwrap());
        let good = of(&conduit);
        let expected = [
            Nat { vips: vec![net4, net6], protocol: Protocol::Tcp, port: 80, target_port: 8080 },
            Nat { vips: vec![net4], protocol: Protocol::Udp, port: 53, target_port: 5353 },
        ];
        assert_eq!((good.config.nats.as_slice(), good.faults.len()), (expected.as_slice(), 0));
        conduit.destination_port_nats.insert(0, nat(70_000, 1, "tcp", &[&v4]));
        let bad = of(&conduit);
        assert!(bad.faults.iter().any(|fault| fault.contains("70000")), "{:?}", bad.faults);
        assert_eq!(bad.config.nats, [], "none is taken for its neighbour");
    }

    #[test]
    fn the_mtu_of_a_target_is_the_smallest_of_its_links() {
        let stream = nsp::Stream { name: "s".into(), max_targets: 10, ..Default::default() };
        let target = nsp::Target {
            ips: vec!["172.31.0.2/24".into(), "fd00::2/64".into()],
            context: [("identifier".to_owned(), "1".to_owned())].into(),
            status: nsp::target::Status::Enabled as i32,
            stream: Some(stream),
            ..Default::default()
        };
        let subnet = |net: &str, index, mtu| Subnet { net: net.parse().unwrap(), index, mtu, direct: index == 7 };
        for (mtu4, mtu6) in [(1400, 1500), (1500, 1400)] {
            let subnets = BTreeSet::from([subnet("172.31.0.1/24", 7, mtu4), subnet("fd00::1/64", 8, mtu6)]);
            let inputs = Inputs { targets: Some(vec![target.clone()]), subnets: Some(subnets), ..Inputs::default() };
            let ready = ready(&BTreeMap::from([("s".to_owned(), 10)]), &inputs).unwrap();
            let known = ready.targets["s"][&1];
            assert_eq!((known.mtu, known.direct), (1400, false), "{mtu4} for IPv4, {mtu6} for IPv6");
        }
    }
}
