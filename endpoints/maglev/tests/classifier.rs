//! What the classifier holds for each prefix and port, compared with the definition, prefix by prefix and flow by flow; and that
//! many prefixes take no time.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use meridio_decision::layout::{
    DPORT_BASE, DST_BASE, IPV4_SPACE, NOT_A_VIP, NatKey, PORT_CLASS, PREFIX_KEY_BITS, PrefixKey, SPORT_BASE, SRC_BASE,
    Vector,
};
use meridio_maglev::classifier::{Classifier, compile};
use meridio_maglev::config::mapped_address;
use meridio_maglev::{Config, Flow, Nat, Protocol};
use proptest::prelude::*;

type Set = BTreeSet<usize>;

fn compiled(config: &Config) -> Classifier {
    compile(config, &|_| 0, &mut |_| 0).unwrap()
}

fn members(vector: &Vector) -> Set {
    (0..vector.words.len() * 64).filter(|n| vector.words[n / 64] >> (n % 64) & 1 == 1).collect()
}

fn key(net: &IpNet) -> PrefixKey {
    let (space, length) = match net {
        IpNet::V4(net) => (IPV4_SPACE, net.prefix_len() + 96),
        IpNet::V6(net) => (0, net.prefix_len()),
    };
    PrefixKey { bits: PREFIX_KEY_BITS + u32::from(length), space, address: mapped_address(net.network()) }
}

/// Flows in the order of their bits.
fn ordered(config: &Config) -> Vec<&Flow> {
    let mut flows: Vec<&Flow> = config.flows.iter().collect();
    flows.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.name.cmp(&b.name)));
    flows
}

/// Flows that a condition holds for.
fn which(flows: &[&Flow], holds: impl Fn(&Flow) -> bool) -> Set {
    (0..flows.len()).filter(|n| holds(flows[*n])).collect()
}

/// The definition of sources: every prefix of a flow that is constrained, with the flows that have no constraint or a prefix around it.
fn sources(config: &Config) -> BTreeMap<PrefixKey, Set> {
    let flows = ordered(config);
    let any = |flow: &Flow| flow.sources.iter().all(|net| net.prefix_len() == 0);
    let nets = flows.iter().filter(|flow| !any(flow)).flat_map(|flow| &flow.sources);
    let around = |net: &IpNet| which(&flows, |flow| any(flow) || flow.sources.iter().any(|other| other.contains(net)));
    nets.map(|net| (key(&net.trunc()), around(net))).collect()
}

/// The definition of destinations: flows of each prefix within a VIP, nothing for one that is not.
fn destinations(config: &Config) -> BTreeMap<PrefixKey, Option<Set>> {
    let flows = ordered(config);
    let vip = |net: &IpNet| config.vips.iter().any(|vip| vip.contains(net));
    let nats = config.nats.iter().flat_map(|nat| &nat.vips).filter(|net| vip(net));
    let nets = config.vips.iter().chain(flows.iter().flat_map(|flow| &flow.destinations)).chain(nats);
    let around = |net: &IpNet| {
        which(&flows, |flow| flow.destinations.is_empty() || flow.destinations.iter().any(|other| other.contains(net)))
    };
    nets.map(|net| (key(&net.trunc()), vip(net).then(|| around(net)))).collect()
}

/// The definition of translations: both directions, for each destination prefix within one of theirs.
fn translations(config: &Config, classes: &BTreeMap<PrefixKey, u32>) -> BTreeMap<NatKey, u16> {
    let mut found = BTreeMap::new();
    for nat in &config.nats {
        for (prefix, class) in classes.iter().filter(|(_, class)| **class != NOT_A_VIP) {
            let net = net(prefix);
            if nat.vips.iter().any(|vip| vip.contains(&net)) {
                for (direction, from, to) in [(0, nat.port, nat.target_port), (1, nat.target_port, nat.port)] {
                    let protocol = u16::from(nat.protocol.number());
                    found.insert(NatKey { generation: 0, class: *class, protocol, direction, port: from.into() }, to);
                }
            }
        }
    }
    found
}

fn net(key: &PrefixKey) -> IpNet {
    let length = u8::try_from(key.bits - PREFIX_KEY_BITS).unwrap();
    let address = Ipv6Addr::from(key.address);
    match address.to_ipv4_mapped().filter(|_| key.space == IPV4_SPACE) {
        Some(v4) => Ipv4Net::new(v4, length - 96).unwrap().into(),
        None => Ipv6Net::new(address, length).unwrap().into(),
    }
}

fn check(config: &Config) {
    let c = compiled(config);
    let flows = ordered(config);
    let vector = |base: u32, class: u32| members(&c.vectors[&(base + class)]);
    let found: BTreeMap<PrefixKey, Set> =
        c.sources.iter().map(|(key, class)| (*key, vector(SRC_BASE, *class))).collect();
    assert_eq!(found, sources(config));
    let class = |class: u32| (class != NOT_A_VIP).then(|| vector(DST_BASE, class));
    let found: BTreeMap<PrefixKey, Option<Set>> = c.vips.iter().map(|(key, number)| (*key, class(*number))).collect();
    assert_eq!(found, destinations(config));
    assert_eq!(c.nats, translations(config, &c.vips));
    let any = |ranges: &[(u16, u16)]| ranges.is_empty() || ranges.contains(&(0, u16::MAX));
    let has = |ranges: &[(u16, u16)], port: u16| any(ranges) || ranges.iter().any(|r| (r.0..=r.1).contains(&port));
    for port in (0..=300).chain([301, 40_000, u16::MAX - 1, u16::MAX]) {
        let (d, s) = (u32::from(c.dports[port as usize]) & PORT_CLASS, u32::from(c.sports[port as usize]));
        assert_eq!(vector(DPORT_BASE, d), which(&flows, |flow| has(&flow.destination_ports, port)), "to port {port}");
        assert_eq!(vector(SPORT_BASE, s), which(&flows, |flow| has(&flow.source_ports, port)), "from port {port}");
    }
}

/// Prefixes of few networks and all lengths, so that many lie within others; host bits as users leave them.
fn prefix() -> impl Strategy<Value = IpNet> {
    let v4 =
        (prop::sample::select(vec![[10, 0, 0, 1], [10, 0, 0, 129], [10, 128, 3, 4], [0, 0, 0, 0], [255; 4]]), 0..=32u8)
            .prop_map(|(address, length)| Ipv4Net::new(Ipv4Addr::from(address), length).unwrap().into());
    let v6 = (prop::sample::select(vec![1u128 << 125 | 1, 1 << 125 | 1 << 70, 0, u128::MAX]), 0..=128u8)
        .prop_map(|(address, length)| Ipv6Net::new(Ipv6Addr::from(address), length).unwrap().into());
    prop_oneof![v4, v6]
}

fn prefixes(most: usize) -> impl Strategy<Value = Vec<IpNet>> {
    prop::collection::vec(prefix(), 0..=most)
}

fn ranges() -> impl Strategy<Value = Vec<(u16, u16)>> {
    let range = (0..300u16, 0..20u16).prop_map(|(low, more)| (low, low + more));
    prop::collection::vec(prop_oneof![9 => range, 1 => Just((0, u16::MAX)), 1 => Just((200, u16::MAX))], 0..4)
}

fn flow() -> impl Strategy<Value = Flow> {
    (0..3i32, prefixes(3), prefixes(4), ranges(), ranges()).prop_map(|(priority, to, from, dports, sports)| Flow {
        stream: "s".into(),
        priority,
        destinations: to,
        sources: from,
        protocols: vec![Protocol::Tcp],
        destination_ports: dports,
        source_ports: sports,
        ..Flow::default()
    })
}

fn nat() -> impl Strategy<Value = Nat> {
    (prefixes(3), 1..5u16, 1..5u16).prop_map(|(vips, port, target_port)| Nat {
        vips,
        protocol: Protocol::Tcp,
        port,
        target_port,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn prefixes_and_ports_are_compiled_as_defined(
        vips in prefixes(6),
        mut flows in prop::collection::vec(flow(), 0..12),
        nats in prop::collection::vec(nat(), 0..4),
    ) {
        flows.iter_mut().enumerate().for_each(|(n, flow)| flow.name = format!("f{n}"));
        check(&Config { vips, flows, nats, ..Config::default() });
    }
}

/// So many flows, each with so many prefixes and ranges of its own.
fn large(flows: u32, each: u32) -> Config {
    let source = |n: u32| Ipv4Net::new(Ipv4Addr::from(0x0a00_0000 + n * 256), 24).unwrap().into();
    let vip = |n: u32| Ipv4Net::new(Ipv4Addr::from(0x1400_0000 + n), 32).unwrap().into();
    let flow = |n: u32| Flow {
        name: format!("f{n}"),
        stream: "s".into(),
        destinations: vec![vip(n % 2_000)],
        sources: (0..each).map(|k| source(n * each + k)).collect(),
        protocols: vec![Protocol::Tcp],
        destination_ports: vec![(n as u16 * 20, n as u16 * 20 + 9)],
        ..Flow::default()
    };
    Config { vips: (0..2_000).map(vip).collect(), flows: (0..flows).map(flow).collect(), ..Config::default() }
}

#[test]
fn thousands_of_prefixes_are_compiled_in_no_time() {
    for each in [1, 8, 32] {
        let config = large(2_000, each);
        let begin = Instant::now();
        let c = compiled(&config);
        let took = begin.elapsed();
        println!("2,000 flows, {} source prefixes, 2,000 VIPs, 2,000 port ranges: {took:?}", c.sources.len());
        assert_eq!(c.sources.len(), 2_000 * each as usize);
        // Comparing each prefix with each takes minutes in a build without optimization.
        assert!(took < Duration::from_secs(10), "{took:?}");
    }
}
