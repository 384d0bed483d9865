//! Generated configurations and packets, and the question whether the reference and the host's build agree about them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use meridio_maglev::config::Bytes as ByteMatch;
use meridio_maglev::reference::{Answer, Reference};
use meridio_maglev::{
    Config, Decision, ETH_IPV4, ETH_IPV6, Flow, Image, Nat, Protocol, Reason, Stream, Target, Targets, Verdict,
};

/// A decision in the words of the reference.
pub(crate) fn answer(decision: &Decision, image: &Image) -> Answer {
    if decision.verdict == Verdict::Pass as u32 {
        return Answer::Pass;
    }
    if decision.verdict == Verdict::Drop as u32 {
        let reason = Reason::ALL.into_iter().find(|r| *r as u32 == decision.reason).unwrap();
        return Answer::Drop(reason);
    }
    Answer::Forward {
        flow: image.flow_name(decision.flow).unwrap_or("").to_owned(),
        identifier: decision.identifier,
        nat_port: decision.nat_port as u16,
    }
}

/// One configuration, in the reference and compiled for the host.
pub(crate) struct Pair {
    pub(crate) reference: Reference,
    pub(crate) image: Image,
}

impl Pair {
    pub(crate) fn new(config: &Config, targets: &BTreeMap<String, Targets>) -> Self {
        let image = Image::new(config, targets).unwrap();
        Pair { reference: Reference::new(config.clone(), targets.clone()), image }
    }

    /// The reference's answer about a packet, if the host's build gives the same one. Both remember first fragments.
    pub(crate) fn agree(&self, packet: &[u8], v6: bool) -> Result<Answer, String> {
        let expected = self.reference.answer(packet, v6);
        let host = answer(&self.image.decide(packet, if v6 { ETH_IPV6 } else { ETH_IPV4 }), &self.image);
        if host == expected { Ok(expected) } else { Err(format!("the host says {host:?}, the reference {expected:?}")) }
    }

    /// Forgets where first fragments went.
    pub(crate) fn forget(&self) {
        self.reference.forget_fragments();
        self.image.forget_fragments();
    }
}

/// Small deterministic generator (SplitMix64): a seed reproduces a failure.
#[derive(Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize].clone()
    }
}

const VIPS: [&str; 6] =
    ["20.0.0.1/32", "20.0.0.0/24", "40.0.0.128/25", "2000::1/128", "2000::/64", "4000:0:0:8000::/49"];
const SOURCES: [&str; 8] =
    ["10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "192.168.0.0/17", "0.0.0.0/0", "fd00::/8", "fd00:1::/32", "::/0"];
const PORTS: [u16; 12] = [1, 80, 443, 999, 1000, 1001, 4000, 4001, 5555, 40_000, 65_534, 65_535];

fn ports(rng: &mut Rng) -> Vec<(u16, u16)> {
    (0..rng.below(4))
        .map(|_| {
            let (a, b) = (rng.pick(&PORTS), rng.pick(&PORTS));
            if rng.chance(40) { (a, a) } else { (a.min(b), a.max(b)) }
        })
        .collect()
}

fn some<T: Clone + Ord>(rng: &mut Rng, items: &[T], at_most: u64) -> Vec<T> {
    let mut out: Vec<T> = (0..rng.below(at_most + 1)).map(|_| rng.pick(items)).collect();
    out.sort();
    out.dedup();
    out
}

fn byte_match(rng: &mut Rng) -> ByteMatch {
    let texts = [
        "tcp[2:2] = 4000",
        "udp[0:2] & 0x0f00 = 0x0300",
        "tcp[13:1] & 0x02 = 0x02",
        "tcp[0:4] & 0xffff = 80",
        "udp[4:2] & 1 = 0",
        "sctp[8:4] = 0",
        "tcp[19:1] = 0",
        // Across the borders of words.
        "tcp[3:2] & 0xfff0 = 0xa000",
        "udp[3:4] & 0x00ffff00 = 0x00000800",
        "sctp[1:2] & 0x00ff = 0x0f",
    ];
    ByteMatch::parse(rng.pick(&texts)).unwrap()
}

/// Up to as many as a flow can have, most likely one: all of many hold for few packets.
fn byte_matches(rng: &mut Rng) -> Vec<ByteMatch> {
    let most = rng.pick(&[1, 1, 2, 2, 3, 4]);
    (0..most).map(|_| byte_match(rng)).collect()
}

/// A configuration with its ready targets.
pub(crate) fn config(rng: &mut Rng) -> (Config, BTreeMap<String, Targets>) {
    let nets = |texts: &[&str]| -> Vec<IpNet> { texts.iter().map(|t| t.parse().unwrap()).collect() };
    let (all_vips, all_sources) = (nets(&VIPS), nets(&SOURCES));
    let mut config = Config { vips: some(rng, &all_vips, 8), ..Config::default() };
    let mut targets = BTreeMap::new();
    for n in 0..1 + rng.below(3) {
        let max_targets = rng.pick(&[1, 2, 10, 100, 100, 700]);
        let name = format!("stream-{n}");
        let mut ready = Targets::new();
        for _ in 0..rng.below(6) {
            let id = 1 + rng.below(max_targets as u64) as u32;
            ready.insert(id, target(id));
        }
        targets.insert(name.clone(), ready);
        config.streams.push(Stream { name, max_targets, sctp_ports_only: rng.chance(30) });
    }
    let protocols = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let flows = if rng.chance(10) { 60 + rng.below(140) } else { rng.below(12) };
    for n in 0..flows {
        let named = some(rng, &protocols, 3);
        let with_ports = !named.is_empty();
        let sources = if rng.chance(40) { some(rng, &all_sources, 3) } else { vec![] };
        config.flows.push(Flow {
            name: format!("flow-{n}"),
            stream: if rng.chance(5) { String::new() } else { rng.pick(&config.streams).name },
            priority: rng.below(5) as i32 - 2,
            destinations: if config.vips.is_empty() || rng.chance(20) {
                some(rng, &all_vips, 2)
            } else {
                vec![rng.pick(&config.vips)]
            },
            sources,
            destination_ports: if with_ports { ports(rng) } else { vec![] },
            source_ports: if with_ports && rng.chance(30) { ports(rng) } else { vec![] },
            protocols: named,
            byte_matches: if n < 40 && rng.chance(15) { byte_matches(rng) } else { vec![] },
        });
    }
    for _ in 0..if config.vips.is_empty() { 0 } else { rng.below(6) } {
        config.nats.push(Nat {
            vips: some(rng, &config.vips.clone(), 2),
            protocol: rng.pick(&protocols),
            port: rng.pick(&[80, 443, 1000, 4000]),
            target_port: rng.pick(&[80, 4000, 4001, 5555]),
        });
        // What is at odds with another one.
        if !config.faults().is_empty() {
            config.nats.pop();
        }
    }
    (config, targets)
}

/// A target on the loopback interface, whose MTU lets everything through.
pub(crate) fn target(id: u32) -> Target {
    Target {
        v4: Some((Ipv4Addr::new(172, 16, (id >> 8) as u8, id as u8), 1)),
        v6: Some((Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, id as u16), 1)),
        mtu: 0,
        direct: false,
    }
}

fn address(rng: &mut Rng, v6: bool, vip: bool) -> IpAddr {
    let v4s = if vip { ["20.0.0.1", "20.0.0.77", "40.0.0.200"] } else { ["10.1.2.3", "10.9.9.9", "192.168.3.4"] };
    let v6s = if vip { ["2000::1", "2000::77", "4000:0:0:8000::5"] } else { ["fd00:1::1", "fd00:2::1", "3000::1"] };
    rng.pick(if v6 { &v6s } else { &v4s }).parse().unwrap()
}

fn l4(rng: &mut Rng, protocol: u8, ports: (u16, u16)) -> Vec<u8> {
    let mut b = Vec::new();
    b.extend(ports.0.to_be_bytes());
    b.extend(ports.1.to_be_bytes());
    match protocol {
        6 => {
            b.extend([0; 8]);
            b.extend([0x50, rng.next() as u8, 0, 0, 0, 0, 0, 0]);
        }
        17 => {
            let payload = rng.below(20) as u16;
            b.extend((8 + payload).to_be_bytes());
            b.extend([0; 2]);
            b.extend(vec![0; payload as usize]);
        }
        _ => b.extend([0; 8]),
    }
    match protocol {
        6 => noise(rng, &mut b, 16, 2),
        17 => noise(rng, &mut b, 6, 2),
        _ => noise(rng, &mut b, 8, 4),
    }
    b
}

/// A checksum that is 0 or anything: whether it is right plays no part in what becomes of it.
fn noise(rng: &mut Rng, b: &mut [u8], at: usize, length: usize) {
    if rng.chance(70) {
        b[at..at + length].fill_with(|| rng.next() as u8);
    }
}

fn ttl(rng: &mut Rng) -> u8 {
    rng.pick(&[64, 64, 64, 64, 64, 255, 2, 1, 0])
}

/// IP header around a payload; IPv6 gets `extensions` (with their own next-header chain resolved here).
fn ip(rng: &mut Rng, src: IpAddr, dst: IpAddr, protocol: u8, payload: &[u8], extensions: &[u8]) -> Vec<u8> {
    match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let options = if extensions.contains(&0) { 1 } else { 0 };
            let fragment: u16 = match extensions.iter().find(|e| **e == 44) {
                Some(_) => rng.pick(&[0x2000, 0x2000, 0x0005, 0x2005, 0x4000]),
                None => 0,
            };
            let total = (20 + options * 4 + payload.len()) as u16;
            let mut b = vec![0x45 + options as u8, 0];
            b.extend(total.to_be_bytes());
            b.extend([1, rng.below(3) as u8]);
            b.extend(fragment.to_be_bytes());
            b.extend([ttl(rng), protocol, 0, 0]);
            noise(rng, &mut b, 10, 2);
            b.extend(s.octets());
            b.extend(d.octets());
            b.extend(vec![1; options * 4]);
            b.extend(payload);
            b
        }
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            let mut chain = Vec::new();
            for (n, kind) in extensions.iter().enumerate() {
                let next = extensions.get(n + 1).copied().unwrap_or(protocol);
                match kind {
                    44 => {
                        let field: u16 = rng.pick(&[0x0001, 0x0001, 0x0028, 0x0029, 0x0000]);
                        chain.extend([next, 0]);
                        chain.extend(field.to_be_bytes());
                        chain.extend([0, 0, 0, rng.below(3) as u8]);
                    }
                    51 => chain.extend([next, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
                    _ => {
                        let extra = rng.below(2) as usize;
                        chain.extend([next, extra as u8, 1, 4, 0, 0, 0, 0]);
                        chain.extend(vec![0; extra * 8]);
                    }
                }
            }
            let mut b = vec![0x60, 0, 0, 0];
            b.extend(((chain.len() + payload.len()) as u16).to_be_bytes());
            b.extend([extensions.first().copied().unwrap_or(protocol), ttl(rng)]);
            b.extend(s.octets());
            b.extend(d.octets());
            b.extend(chain);
            b.extend(payload);
            b
        }
        _ => unreachable!("one family per packet"),
    }
}

/// A packet from its network header on; `true`: IPv6.
pub(crate) fn packet(rng: &mut Rng) -> (Vec<u8>, bool) {
    let v6 = rng.chance(50);
    let to_vip = rng.chance(95);
    let (src, dst) = (address(rng, v6, false), address(rng, v6, to_vip));
    let protocol = rng.pick(&[6, 6, 6, 17, 17, 132, if v6 { 58 } else { 1 }, if v6 { 58 } else { 1 }, 47]);
    let sport = if rng.chance(50) { rng.pick(&PORTS) } else { rng.next() as u16 };
    let dport = if rng.chance(80) { rng.pick(&PORTS) } else { rng.next() as u16 };
    let extensions: Vec<u8> = if rng.chance(25) {
        let count = if rng.chance(5) { 10 } else { 1 + rng.below(4) };
        (0..count).map(|_| rng.pick(&[0, 43, 60, 44, 51])).collect()
    } else {
        vec![]
    };
    let payload = if protocol == 1 || protocol == 58 {
        let mut message = icmp(rng, v6, src, dst, (sport, dport));
        noise(rng, &mut message, 2, 2);
        message
    } else {
        l4(rng, protocol, (sport, dport))
    };
    let mut b = ip(rng, src, dst, protocol, &payload, &extensions);
    if rng.chance(8) {
        let at = rng.below(b.len() as u64) as usize;
        b[at] = rng.next() as u8;
    }
    if rng.chance(5) {
        let keep = rng.below(b.len() as u64) as usize;
        b.truncate(keep);
    } else if rng.chance(20) {
        b.extend(vec![0; rng.below(20) as usize]);
    }
    (b, v6)
}

fn icmp(rng: &mut Rng, v6: bool, src: IpAddr, dst: IpAddr, ports: (u16, u16)) -> Vec<u8> {
    let (echo, errors): (&[u8], &[u8]) =
        if v6 { (&[128, 129, 133, 135, 143], &[1, 2, 3, 4]) } else { (&[0, 8, 13], &[3, 4, 5, 11, 12]) };
    if rng.chance(50) {
        let mut b = vec![rng.pick(echo), 0, 0, 0];
        b.extend(ports.0.to_be_bytes());
        b.extend([0, 1]);
        return b;
    }
    let inner_protocol = rng.pick(&[6, 17, 132, if v6 { 58 } else { 1 }, 47]);
    let inner_src = if rng.chance(90) { dst } else { src };
    let inner_payload = if inner_protocol == 1 || inner_protocol == 58 {
        vec![if v6 { 129 } else { 0 }, 0, 0, 0, 1, 2, 0, 0]
    } else {
        l4(rng, inner_protocol, (ports.1, ports.0))
    };
    let extensions = if rng.chance(20) { vec![rng.pick(&[0, 44, 60])] } else { vec![] };
    let mut inner = ip(rng, inner_src, src, inner_protocol, &inner_payload, &extensions);
    if rng.chance(30) {
        let keep = rng.below(inner.len() as u64 + 1) as usize;
        inner.truncate(keep);
    }
    let mut b = vec![rng.pick(errors), 0, 0, 0, 0, 0, 0, 0];
    b.extend(inner);
    b
}

/// The packet with an Ethernet header addressed to the loopback interface, which test runs use.
pub(crate) fn frame(packet: &[u8], v6: bool) -> Vec<u8> {
    let mut b = vec![0; 12];
    b.extend(if v6 { [0x86, 0xdd] } else { [0x08, 0x00] });
    b.extend(packet);
    b
}
