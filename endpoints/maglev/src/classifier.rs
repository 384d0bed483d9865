//! From flows to bit vectors: the classifier of one generation.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ipnet::IpNet;
use meridio_decision::layout::*;

use crate::config::{Config, Flow, Nat, Protocol, any_port, any_source, mapped_address, ordered};
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

/// Compiles a configuration. `slot` and `counter` give the places of a stream ([`NONE`](meridio_decision::NONE): there is no such
/// stream) and of a flow's counter.
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

/// Visits prefixes in order, each with what it takes from itself and from all that it lies within: `outside` is what a prefix in
/// no other begins with, `join` adds what a prefix has of its own.
///
/// A prefix is visited before those within it, so the ones around the present one are a stack: the work grows with the
/// number of prefixes, not with its square.
fn nested<Own, Sum: Clone>(
    prefixes: &BTreeMap<IpNet, Own>,
    outside: &Sum,
    join: impl Fn(&mut Sum, &Own),
    mut visit: impl FnMut(&IpNet, &Own, &Sum) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut around: Vec<(&IpNet, Sum)> = Vec::new();
    for (prefix, own) in prefixes {
        while around.last().is_some_and(|(outer, _)| !outer.contains(prefix)) {
            around.pop();
        }
        let mut sum = around.last().map_or(outside, |(_, sum)| sum).clone();
        join(&mut sum, own);
        visit(prefix, own, &sum)?;
        around.push((prefix, sum));
    }
    Ok(())
}

/// What names a destination prefix.
#[derive(Default)]
struct Named {
    vip: bool,
    flows: Vec<usize>,
    nats: Vec<usize>,
}

/// What a destination belongs to.
#[derive(Clone)]
struct Within {
    vip: bool,
    flows: Bits,
    nats: Vec<usize>,
}

fn destinations(c: &mut Classifier, config: &Config, flows: &[&Flow]) -> Result<(), Error> {
    let mut prefixes: BTreeMap<IpNet, Named> = BTreeMap::new();
    config.vips.iter().for_each(|vip| prefixes.entry(vip.trunc()).or_default().vip = true);
    let mut outside = Within { vip: false, flows: [0; WORDS], nats: Vec::new() };
    for (n, flow) in flows.iter().enumerate() {
        flow.destinations.iter().for_each(|net| prefixes.entry(net.trunc()).or_default().flows.push(n));
        if flow.destinations.is_empty() {
            set(&mut outside.flows, n);
        }
    }
    for (n, nat) in config.nats.iter().enumerate() {
        nat.vips.iter().for_each(|vip| prefixes.entry(vip.trunc()).or_default().nats.push(n));
    }
    let join = |sum: &mut Within, own: &Named| {
        sum.vip |= own.vip;
        own.flows.iter().for_each(|flow| set(&mut sum.flows, *flow));
        sum.nats.extend(&own.nats);
    };
    let (mut count, mut next) = (0, 0u32);
    nested(&prefixes, &outside, join, |prefix, own, sum| {
        // Only a port-nat names it, and it is no VIP's.
        if !sum.vip && own.flows.is_empty() {
            return Ok(());
        }
        count += 1;
        if count > PREFIXES {
            return Ok(());
        }
        if !sum.vip {
            c.vips.insert(key(prefix), NOT_A_VIP);
            return Ok(());
        }
        c.vectors.insert(DST_BASE + next, Vector::new(sum.flows));
        c.vips.insert(key(prefix), next);
        let nats: BTreeSet<usize> = sum.nats.iter().copied().collect();
        nats.iter().filter_map(|n| config.nats.get(*n)).for_each(|nat| translate(c, nat, next));
        next += 1;
        Ok(())
    })?;
    if count > PREFIXES {
        let reason = format!("{count} prefixes of VIPs, flows and port-nats are more than {PREFIXES}");
        return Err(Error::config("VIPs", reason));
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

/// Both directions of a port translation, for one class of destinations.
fn translate(c: &mut Classifier, nat: &Nat, class: u32) {
    let protocol = nat.protocol.number() as u16;
    for (direction, from, to) in [(0, nat.port, nat.target_port), (1, nat.target_port, nat.port)] {
        c.nats.insert(NatKey { generation: 0, class, protocol, direction, port: from as u32 }, to);
    }
}

fn sources(c: &mut Classifier, flows: &[&Flow]) -> Result<(), Error> {
    let mut unconstrained = [0; WORDS];
    let mut prefixes: BTreeMap<IpNet, Vec<usize>> = BTreeMap::new();
    for (n, flow) in flows.iter().enumerate() {
        match any_source(&flow.sources) {
            true => set(&mut unconstrained, n),
            false => flow.sources.iter().for_each(|net| prefixes.entry(net.trunc()).or_default().push(n)),
        }
    }
    c.vectors.insert(SRC_BASE, Vector::new(unconstrained));
    if prefixes.is_empty() {
        return Ok(());
    }
    if prefixes.len() > SOURCES {
        let reason = format!("{} of all flows together are more than {SOURCES}", prefixes.len());
        return Err(Error::config("source prefixes", reason));
    }
    c.flags |= flag::SOURCES;
    let join = |sum: &mut Bits, own: &Vec<usize>| own.iter().for_each(|flow| set(sum, *flow));
    let mut classes: HashMap<Bits, u32> = HashMap::from([(unconstrained, 0)]);
    nested(&prefixes, &unconstrained, join, |prefix, _, bits| {
        let next = classes.len() as u32;
        let class = *classes.entry(*bits).or_insert(next);
        if class as usize >= SRC_CLASSES {
            return Err(Error::config("source prefixes", format!("more than {SRC_CLASSES} different sets of flows")));
        }
        if class == next {
            c.vectors.insert(SRC_BASE + class, Vector::new(*bits));
        }
        c.sources.insert(key(prefix), class);
        Ok(())
    })
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
