//! The model that is obviously right: one packet, all flows in order, the table row by row. Slow, and written apart from
//! the decision that it checks.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;
use meridio_decision::hash;
use meridio_decision::layout::CHUNK_ROWS;

use crate::Reason;
use crate::config::{Config, Flow, Protocol, Targets, any_port, any_source, mapped_address, ordered};
use crate::table::{PROBES, rows_for};

const _: () = assert!(CHUNK_ROWS > 0);

/// What should happen to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Not ours.
    Pass,
    /// Dropped.
    Drop(Reason),
    /// To the target of this flow, stream and identifier, with a translated port.
    Forward {
        /// Flow name.
        flow: String,
        /// Target.
        identifier: u32,
        /// Translated port, 0: none.
        nat_port: u16,
    },
}

#[derive(Clone, Debug)]
struct Key {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    ports: Option<(u16, u16)>,
    ping: Option<u16>,
    quote: bool,
    first_fragment: bool,
    l4: usize,
}

struct Header {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    l4: usize,
    end: usize,
    later_fragment: bool,
    first_fragment: bool,
}

fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*b.get(at)?, *b.get(at + 1)?]))
}

fn addresses(b: &[u8], v6: bool) -> Option<(IpAddr, IpAddr)> {
    if v6 {
        let a: [u8; 16] = b.get(8..24)?.try_into().ok()?;
        let d: [u8; 16] = b.get(24..40)?.try_into().ok()?;
        (b[0] >> 4 == 6).then(|| (Ipv6Addr::from(a).into(), Ipv6Addr::from(d).into()))
    } else {
        let a: [u8; 4] = b.get(12..16)?.try_into().ok()?;
        let d: [u8; 4] = b.get(16..20)?.try_into().ok()?;
        (b[0] >> 4 == 4).then(|| (Ipv4Addr::from(a).into(), Ipv4Addr::from(d).into()))
    }
}

/// Walks the headers of `b`; `whole` is false for a quoted packet, which may be cut off. Offsets are within `b`.
fn header(b: &[u8], v6: bool, whole: bool) -> Result<Header, Reason> {
    let (src, dst) = addresses(b, v6).ok_or(Reason::Truncated)?;
    if !v6 {
        let ihl = (b[0] & 15) as usize * 4;
        let total = u16_at(b, 2).unwrap_or(0) as usize;
        if ihl < 20 || total < ihl || (whole && total > b.len()) {
            return Err(Reason::Malformed);
        }
        let fragment = u16_at(b, 6).unwrap_or(0);
        let offset = fragment & 0x1fff;
        return Ok(Header {
            src,
            dst,
            protocol: b[9],
            l4: ihl,
            end: total,
            later_fragment: offset != 0,
            first_fragment: offset == 0 && fragment & 0x2000 != 0,
        });
    }
    let payload = u16_at(b, 4).unwrap_or(0) as usize;
    let end = 40 + payload;
    if whole && end > b.len() {
        return Err(Reason::Malformed);
    }
    let (mut protocol, mut at) = (b[6], 40);
    let mut h = Header { src, dst, protocol, l4: at, end, later_fragment: false, first_fragment: false };
    let mut steps = 0;
    while [0, 43, 44, 51, 60].contains(&protocol) {
        if steps == 8 {
            return Err(Reason::Extensions);
        }
        steps += 1;
        let needed = if protocol == 44 { 8 } else { 2 };
        let bytes = b.get(at..at + needed).ok_or(Reason::Truncated)?;
        let next = bytes[0];
        match protocol {
            44 => {
                let field = u16::from_be_bytes([bytes[2], bytes[3]]);
                at += 8;
                h.first_fragment = field & 1 != 0 && field >> 3 == 0;
                if field >> 3 != 0 {
                    (h.protocol, h.l4, h.later_fragment) = (next, at, true);
                    return Ok(h);
                }
            }
            51 => at += (bytes[1] as usize + 2) * 4,
            _ => at += (bytes[1] as usize + 1) * 8,
        }
        protocol = next;
    }
    (h.protocol, h.l4) = (protocol, at);
    Ok(h)
}

fn is_echo(v6: bool, t: u8) -> bool {
    if v6 { t == 128 || t == 129 } else { t == 0 || t == 8 }
}

/// `Ok(None)`: for the stack of this machine.
fn key(b: &[u8], v6: bool) -> Result<Option<Key>, Reason> {
    let h = header(b, v6, true)?;
    let mut k = Key {
        src: h.src,
        dst: h.dst,
        protocol: h.protocol,
        ports: None,
        ping: None,
        quote: false,
        first_fragment: h.first_fragment,
        l4: h.l4,
    };
    if h.l4 > h.end {
        return Err(Reason::Truncated);
    }
    if h.later_fragment {
        return Err(Reason::FragmentUnknown);
    }
    let need = |n: usize| if h.l4 + n > h.end { Err(Reason::Truncated) } else { Ok(()) };
    let ports = |at: usize| (u16_at(b, at).unwrap_or(0), u16_at(b, at + 2).unwrap_or(0));
    match (h.protocol, v6) {
        (6, _) => {
            need(20)?;
            let header = (b[h.l4 + 12] >> 4) as usize * 4;
            if header < 20 || (header > h.end - h.l4 && !h.first_fragment) {
                return Err(Reason::Malformed);
            }
            k.ports = Some(ports(h.l4));
        }
        (17, _) => {
            need(8)?;
            let length = u16_at(b, h.l4 + 4).unwrap_or(0) as usize;
            let short = length < 8 && !(v6 && length == 0);
            if short || (length > h.end - h.l4 && !h.first_fragment) {
                return Err(Reason::Malformed);
            }
            k.ports = Some(ports(h.l4));
        }
        (132, _) => {
            need(12)?;
            k.ports = Some(ports(h.l4));
        }
        (1, false) | (58, true) => {
            need(8)?;
            let t = b[h.l4];
            let is_error = if v6 { (1..=4).contains(&t) } else { [3, 4, 5, 11, 12].contains(&t) };
            if is_echo(v6, t) {
                k.ping = u16_at(b, h.l4 + 4);
            } else if v6 && (130..=143).contains(&t) {
                return Ok(None);
            } else if is_error {
                if h.first_fragment {
                    return Err(Reason::FragmentedError);
                }
                return quoted(b, v6, &h).map(Some);
            }
        }
        _ => {}
    }
    Ok(Some(k))
}

fn quoted(b: &[u8], v6: bool, outer: &Header) -> Result<Key, Reason> {
    let q = b.get(outer.l4 + 8..).unwrap_or(&[]);
    let end = outer.end - outer.l4 - 8;
    if addresses(q, v6).is_none() {
        return Err(Reason::Truncated);
    }
    // Order of refusals: contradictions first, then a stranger's packet.
    if !v6 {
        let (ihl, total) = ((q[0] & 15) as usize * 4, u16_at(q, 2).unwrap_or(0) as usize);
        if ihl < 20 || total < ihl {
            return Err(Reason::Malformed);
        }
    }
    if addresses(q, v6).map(|a| a.0) != Some(outer.dst) {
        return Err(Reason::QuoteMismatch);
    }
    let h = header(q, v6, false)?;
    if h.later_fragment {
        return Err(Reason::FragmentedError);
    }
    let mut k = Key {
        src: h.dst,
        dst: h.src,
        protocol: h.protocol,
        ports: None,
        ping: None,
        quote: true,
        first_fragment: false,
        l4: h.l4,
    };
    match h.protocol {
        6 | 17 | 132 => {
            if h.l4 + 4 > end {
                return Err(Reason::Truncated);
            }
            k.ports = Some((u16_at(q, h.l4 + 2).unwrap_or(0), u16_at(q, h.l4).unwrap_or(0)));
        }
        1 | 58 => {
            if h.l4 + 6 > end {
                return Err(Reason::Truncated);
            }
            if is_echo(v6, q[h.l4]) {
                k.ping = u16_at(q, h.l4 + 4);
            }
        }
        _ => {}
    }
    Ok(k)
}

fn in_ranges(ranges: &[(u16, u16)], port: Option<u16>) -> bool {
    any_port(ranges) || port.is_some_and(|p| ranges.iter().any(|(low, high)| (*low..=*high).contains(&p)))
}

fn matches(flow: &Flow, k: &Key, b: &[u8]) -> bool {
    let inside = |nets: &[IpNet], a: IpAddr| nets.iter().any(|n| n.contains(&a));
    if !(flow.destinations.is_empty() || inside(&flow.destinations, k.dst)) {
        return false;
    }
    if !(any_source(&flow.sources) || inside(&flow.sources, k.src)) {
        return false;
    }
    if k.ping.is_some() {
        return true;
    }
    let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| p.number() == k.protocol);
    if !(flow.protocols.is_empty() || protocol.is_some_and(|p| flow.protocols.contains(&p))) {
        return false;
    }
    in_ranges(&flow.destination_ports, k.ports.map(|p| p.1))
        && in_ranges(&flow.source_ports, k.ports.map(|p| p.0))
        && bytes_match(flow, k, b)
}

fn bytes_match(flow: &Flow, k: &Key, b: &[u8]) -> bool {
    flow.byte_matches.iter().filter(|m| m.protocol.number() == k.protocol).all(|m| {
        let (offset, size) = (m.offset as usize, m.size as usize);
        let turned: Vec<u8>;
        let header: &[u8] = if k.quote {
            if offset + size > 4 {
                return true;
            }
            let (s, d) = k.ports.unwrap_or_default();
            turned = [s.to_be_bytes(), d.to_be_bytes()].concat();
            &turned
        } else {
            &b[k.l4..]
        };
        let Some(bytes) = header.get(offset..offset + size) else { return false };
        let value = bytes.iter().fold(0u32, |v, b| (v << 8) | *b as u32);
        value & m.mask == m.value
    })
}

/// The identifier in a row, straight from the definition in [`crate::table`].
pub fn row_owner(base: &[u16], max_targets: u32, ready: &[u32], row: u32) -> Option<u32> {
    let m = rows_for(max_targets)? as u64;
    for k in 0..PROBES as u64 {
        let offset = if k == 0 { 0 } else { hash::pair(0x0070_726f_6265, k) % m };
        let id = *base.get(((row as u64 + offset) % m) as usize)? as u32;
        if ready.contains(&id) {
            return Some(id);
        }
    }
    ready.iter().copied().max_by_key(|id| (hash::pair(*id as u64, row as u64) & !0xffff) | *id as u64)
}

/// The base table of a stream: textbook Maglev, one preference at a time.
pub fn base_table(max_targets: u32) -> Vec<u16> {
    let Some(m) = rows_for(max_targets) else { return Vec::new() };
    let m = m as u64;
    let mut table = vec![0u16; m as usize];
    let mut next = vec![0u64; max_targets as usize];
    let mut left = m;
    while left > 0 {
        for id in 1..=max_targets as u64 {
            let (offset, skip) = (hash::pair(1, id) % m, hash::pair(2, id) % (m - 1) + 1);
            let j = &mut next[id as usize - 1];
            while table[((offset + *j * skip) % m) as usize] != 0 {
                *j += 1;
            }
            table[((offset + *j * skip) % m) as usize] = id as u16;
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    table
}

/// The model.
pub struct Reference {
    config: Config,
    targets: BTreeMap<String, Targets>,
    bases: BTreeMap<u32, Arc<Vec<u16>>>,
}

/// The base table of a stream; made once, because it depends on nothing else.
fn shared_base(max_targets: u32) -> Arc<Vec<u16>> {
    static TABLES: Mutex<BTreeMap<u32, Arc<Vec<u16>>>> = Mutex::new(BTreeMap::new());
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    tables.entry(max_targets).or_insert_with(|| Arc::new(base_table(max_targets))).clone()
}

impl Reference {
    /// A model of a faultless configuration.
    pub fn new(config: Config, targets: BTreeMap<String, Targets>) -> Self {
        let bases = config.streams.iter().map(|s| (s.max_targets, shared_base(s.max_targets))).collect();
        Reference { config, targets, bases }
    }

    /// What should happen to a packet (from its network header on). Later fragments answer as if their first one had not
    /// been seen.
    pub fn answer(&self, b: &[u8], v6: bool) -> Answer {
        let Some((_, dst)) = addresses(b, v6) else { return Answer::Pass };
        if !self.config.vips.iter().any(|vip| vip.contains(&dst)) {
            return Answer::Pass;
        }
        let k = match key(b, v6) {
            Ok(Some(k)) => k,
            Ok(None) => return Answer::Pass,
            Err(reason) => return Answer::Drop(reason),
        };
        let flows = ordered(&self.config.flows);
        let Some(flow) = flows.into_iter().find(|f| matches(f, &k, b)) else { return Answer::Drop(Reason::NoFlow) };
        let nat_port = self.nat(&k);
        match self.target(flow, &k) {
            Some(_) if nat_port != 0 && k.protocol == 132 && k.first_fragment => Answer::Drop(Reason::Untranslatable),
            Some(identifier) => Answer::Forward { flow: flow.name.clone(), identifier, nat_port },
            None => Answer::Drop(Reason::NoTarget),
        }
    }

    fn target(&self, flow: &Flow, k: &Key) -> Option<u32> {
        let stream = self.config.streams.iter().find(|s| s.name == flow.stream)?;
        let ready: Vec<u32> = self.targets.get(&stream.name)?.keys().copied().collect();
        let (src, dst) = (mapped_address(k.src), mapped_address(k.dst));
        let (sport, dport) = k.ports.unwrap_or((k.ping.unwrap_or(0), 0));
        let h = hash::key(&src, &dst, k.protocol, sport, dport, stream.sctp_ports_only);
        let row = hash::row(h, rows_for(stream.max_targets)?);
        row_owner(self.bases.get(&stream.max_targets)?, stream.max_targets, &ready, row)
    }

    fn nat(&self, k: &Key) -> u16 {
        let Some((_, dport)) = k.ports else { return 0 };
        let nat = self.config.nats.iter().find(|n| {
            n.protocol.number() == k.protocol && n.port == dport && n.vips.iter().any(|v| v.contains(&k.dst))
        });
        nat.map_or(0, |n| n.target_port)
    }
}
