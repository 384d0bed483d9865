//! From flows to bit vectors: the classifier of one generation.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ipnet::IpNet;
use meridio_decision::layout::*;

use crate::config::{Config, Flow, Protocol, any_port, any_source, mapped_address, ordered};
use crate::error::Error;

/// A compiled configuration; keys carry generation 0.
#[derive(Clone, Debug)]
pub struct Classifier {
    /// See [`flag`].
    pub flags: u32,
    /// Prefix to destination class or [`NOT_A_VIP`].
    pub vips: BTreeMap<PrefixKey, u32>,
    /// Prefix to source class.
    pub sources: BTreeMap<PrefixKey, u32>,
    /// Class of each destination port.
    pub dports: Box<PortMap>,
    /// Class of each source port.
    pub sports: Box<PortMap>,
    /// Vectors in use: position in the generation and vector.
    pub vectors: BTreeMap<u32, Vector>,
    /// Flows in order of priority.
    pub flows: Vec<FlowEntry>,
    /// Lists of byte matches.
    pub byte_lists: Vec<ByteList>,
    /// Names of the flows, same order.
    pub names: Vec<String>,
    /// Translated ports.
    pub nats: BTreeMap<NatKey, u16>,
}

type Bits = [u64; WORDS];

/// Prefixes of VIPs. One place of the map stays free, because kernels refuse even to replace an entry of a full one.
const PREFIXES: usize = VIP_PREFIXES - 1;
const _: () = assert!(PREFIXES <= DST_CLASSES);
/// Source prefixes; see [`PREFIXES`].
const SOURCES: usize = SOURCE_PREFIXES - 1;

fn set(bits: &mut Bits, flow: usize) {
    bits[flow / 64] |= 1 << (flow % 64);
}

fn clear(bits: &mut Bits, flow: usize) {
    bits[flow / 64] &= !(1 << (flow % 64));
}

fn key(net: &IpNet) -> PrefixKey {
    let (space, length) = match net {
        IpNet::V4(net) => (IPV4_SPACE, net.prefix_len() + 96),
        IpNet::V6(net) => (0, net.prefix_len()),
    };
    PrefixKey { bits: PREFIX_KEY_BITS + length as u32, space, address: mapped_address(net.network()) }
}

/// Compiles a configuration. `slot` and `counter` give the places of a stream and of a flow's counter.
///
/// # Errors
/// What the maps cannot hold, by name.
pub fn compile(
    config: &Config,
    slot: &dyn Fn(&str) -> u32,
    counter: &mut dyn FnMut(&str) -> u32,
) -> Result<Classifier, Error> {
    let flows = ordered(&config.flows);
    let mut c = Classifier {
        flags: 0,
        vips: BTreeMap::new(),
        sources: BTreeMap::new(),
        dports: boxed_ports(),
        sports: boxed_ports(),
        vectors: BTreeMap::new(),
        flows: Vec::with_capacity(flows.len()),
        byte_lists: Vec::new(),
        names: flows.iter().map(|f| f.name.clone()).collect(),
        nats: BTreeMap::new(),
    };
    for flow in &flows {
        c.flows.push(FlowEntry { slot: slot(&flow.stream), counter: counter(&flow.name) });
    }
    byte_lists(&mut c, &flows)?;
    protocols(&mut c, &flows);
    destinations(&mut c, config, &flows)?;
    sources(&mut c, &flows)?;
    let dports: Vec<&[(u16, u16)]> = flows.iter().map(|f| f.destination_ports.as_slice()).collect();
    let mut map = boxed_ports();
    ports(&mut c, &dports, &mut map, DPORT_BASE, "destination ports")?;
    for key in c.nats.keys() {
        map[key.port as usize & 0xffff] |= PORT_TRANSLATED[key.direction as usize & 1];
    }
    c.dports = map;
    let sports: Vec<&[(u16, u16)]> = flows.iter().map(|f| f.source_ports.as_slice()).collect();
    let mut map = boxed_ports();
    ports(&mut c, &sports, &mut map, SPORT_BASE, "source ports")?;
    c.sports = map;
    if sports.iter().any(|r| !any_port(r)) {
        c.flags |= flag::SOURCE_PORTS;
    }
    Ok(c)
}

fn boxed_ports() -> Box<PortMap> {
    match vec![0u16; 65_536].into_boxed_slice().try_into() {
        Ok(map) => map,
        Err(_) => Box::new([0; 65_536]),
    }
}

fn byte_lists(c: &mut Classifier, flows: &[&Flow]) -> Result<(), Error> {
    let mut users: BTreeMap<&[crate::config::Bytes], Bits> = BTreeMap::new();
    for (n, flow) in flows.iter().enumerate().filter(|(_, f)| !f.byte_matches.is_empty()) {
        set(users.entry(&flow.byte_matches).or_insert([0; WORDS]), n);
    }
    if users.len() > MAX_BYTE_LISTS {
        let reason = format!("{} different lists of byte matches are more than {MAX_BYTE_LISTS}", users.len());
        return Err(Error::config("flows", reason));
    }
    c.flags |= (users.len() as u32) << flag::BYTE_LISTS_SHIFT;
    for (n, (list, bits)) in users.into_iter().enumerate() {
        let mut entry = ByteList::default();
        for (to, from) in entry.statements.iter_mut().zip(list) {
            *to = from.entry();
        }
        c.byte_lists.push(entry);
        c.vectors.insert(BYTES_BASE + n as u32, Vector::new(bits));
    }
    Ok(())
}

fn protocols(c: &mut Classifier, flows: &[&Flow]) {
    let classes = [
        (class::OTHER, None),
        (class::TCP, Some(Protocol::Tcp)),
        (class::UDP, Some(Protocol::Udp)),
        (class::SCTP, Some(Protocol::Sctp)),
    ];
    for (class, protocol) in classes {
        let mut bits = [0; WORDS];
        for (n, flow) in flows.iter().enumerate() {
            let named = protocol.is_some_and(|p| flow.protocols.contains(&p));
            if named || flow.protocols.is_empty() {
                set(&mut bits, n);
            }
        }
        c.vectors.insert(PROTO_BASE + class, Vector::new(bits));
    }
    let mut all = [0; WORDS];
    (0..flows.len()).for_each(|n| set(&mut all, n));
    c.vectors.insert(PROTO_BASE + class::PING, Vector::new(all));
}

fn destinations(c: &mut Classifier, config: &Config, flows: &[&Flow]) -> Result<(), Error> {
    let vips: BTreeSet<IpNet> = config.vips.iter().map(IpNet::trunc).collect();
    let per_flow: Vec<Vec<IpNet>> = flows.iter().map(|f| f.destinations.iter().map(IpNet::trunc).collect()).collect();
    let mut prefixes = vips.clone();
    prefixes.extend(per_flow.iter().flatten());
    let within = |net: &IpNet| vips.iter().any(|vip| vip.contains(net));
    prefixes.extend(config.nats.iter().flat_map(|nat| &nat.vips).map(IpNet::trunc).filter(within));
    if prefixes.len() > PREFIXES {
        let reason = format!("{} prefixes of VIPs, flows and port-nats are more than {PREFIXES}", prefixes.len());
        return Err(Error::config("VIPs", reason));
    }
    let mut next = 0u32;
    for prefix in &prefixes {
        if !within(prefix) {
            c.vips.insert(key(prefix), NOT_A_VIP);
            continue;
        }
        let mut bits = [0; WORDS];
        for (n, nets) in per_flow.iter().enumerate() {
            if nets.is_empty() || nets.iter().any(|net| net.contains(prefix)) {
                set(&mut bits, n);
            }
        }
        c.vectors.insert(DST_BASE + next, Vector::new(bits));
        c.vips.insert(key(prefix), next);
        for nat in &config.nats {
            if nat.vips.iter().any(|vip| vip.contains(prefix)) {
                let mut translate = |direction: u16, from: u16, to: u16| {
                    let protocol = nat.protocol.number() as u16;
                    let key = NatKey { generation: 0, class: next, protocol, direction, port: from as u32 };
                    c.nats.insert(key, to);
                };
                translate(0, nat.port, nat.target_port);
                translate(1, nat.target_port, nat.port);
            }
        }
        next += 1;
    }
    if !c.nats.is_empty() {
        c.flags |= flag::NAT;
    }
    if c.nats.len() > NAT_ENTRIES {
        let pairs = (c.nats.len() / 2, NAT_ENTRIES / 2);
        let reason = format!("{} translations (for each VIP prefix of each one) are more than {}", pairs.0, pairs.1);
        return Err(Error::config("port-nats", reason));
    }
    Ok(())
}

fn sources(c: &mut Classifier, flows: &[&Flow]) -> Result<(), Error> {
    let any: Vec<bool> = flows.iter().map(|f| any_source(&f.sources)).collect();
    let per_flow: Vec<Vec<IpNet>> = flows
        .iter()
        .zip(&any)
        .map(|(f, any)| if *any { Vec::new() } else { f.sources.iter().map(IpNet::trunc).collect() })
        .collect();
    let mut unconstrained = [0; WORDS];
    any.iter().enumerate().filter(|(_, any)| **any).for_each(|(n, _)| set(&mut unconstrained, n));
    c.vectors.insert(SRC_BASE, Vector::new(unconstrained));
    let prefixes: BTreeSet<IpNet> = per_flow.iter().flatten().copied().collect();
    if prefixes.is_empty() {
        return Ok(());
    }
    if prefixes.len() > SOURCES {
        let reason = format!("{} of all flows together are more than {SOURCES}", prefixes.len());
        return Err(Error::config("source prefixes", reason));
    }
    c.flags |= flag::SOURCES;
    let mut classes: HashMap<Bits, u32> = HashMap::from([(unconstrained, 0)]);
    for prefix in prefixes {
        let mut bits = unconstrained;
        for (n, nets) in per_flow.iter().enumerate() {
            if nets.iter().any(|net| net.contains(&prefix)) {
                set(&mut bits, n);
            }
        }
        let next = classes.len() as u32;
        let class = *classes.entry(bits).or_insert(next);
        if class as usize >= SRC_CLASSES {
            return Err(Error::config("source prefixes", format!("more than {SRC_CLASSES} different sets of flows")));
        }
        c.vectors.insert(SRC_BASE + class, Vector::new(bits));
        c.sources.insert(key(&prefix), class);
    }
    Ok(())
}

/// One sweep over the ports: at each border flows begin or end, and the set between two borders is a class.
fn ports(c: &mut Classifier, flows: &[&[(u16, u16)]], map: &mut PortMap, base: u32, what: &str) -> Result<(), Error> {
    let mut unconstrained = [0; WORDS];
    let mut begin: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    let mut end: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (n, ranges) in flows.iter().enumerate() {
        if any_port(ranges) {
            set(&mut unconstrained, n);
            continue;
        }
        for (low, high) in merged(ranges) {
            begin.entry(low as u32).or_default().push(n);
            end.entry(high as u32 + 1).or_default().push(n);
        }
    }
    c.vectors.insert(base, Vector::new(unconstrained));
    let mut classes: HashMap<Bits, u16> = HashMap::from([(unconstrained, 0)]);
    let borders: BTreeSet<u32> = begin.keys().chain(end.keys()).copied().collect();
    let mut bits = unconstrained;
    let mut from = 0u32;
    let mut class = 0u16;
    for border in borders.into_iter().chain([65_536]) {
        map[from as usize..border as usize].fill(class);
        for n in end.get(&border).into_iter().flatten() {
            clear(&mut bits, *n);
        }
        for n in begin.get(&border).into_iter().flatten() {
            set(&mut bits, *n);
        }
        let next = classes.len();
        if !classes.contains_key(&bits) && next >= PORT_CLASSES {
            return Err(Error::config(what, format!("more than {PORT_CLASSES} different sets of flows")));
        }
        class = *classes.entry(bits).or_insert(next as u16);
        c.vectors.insert(base + class as u32, Vector::new(bits));
        from = border.min(65_536);
    }
    Ok(())
}

/// Ranges of one flow without overlaps, so that the end of one does not end another.
fn merged(ranges: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut out: Vec<(u16, u16)> = Vec::new();
    for (low, high) in sorted {
        match out.last_mut() {
            Some(last) if low as u32 <= last.1 as u32 + 1 => last.1 = last.1.max(high),
            _ => out.push((low, high)),
        }
    }
    out
}
