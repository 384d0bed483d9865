//! Why a packet goes where it goes: every flow's answer, the row, the target, or the reason for dropping it.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use meridio_decision::layout::*;
use meridio_decision::packet::Kind;
use meridio_decision::{Decision, Matched, NONE, Reason, Scratch, Verdict, matched};

use crate::image::{Bytes, Image};
use crate::table::Table;

/// What the load balancer makes of a packet, and why.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// The decision itself.
    pub decision: Decision,
    /// What the packet would be counted as; [`Reason::None`]: it is none of the load balancer's business. A fragment without its first one
    /// is held at first; what becomes of it then depends on packets that are not asked about.
    pub outcome: Reason,
    /// What was read of the packet; `None`: not even a network header.
    pub headers: Option<Headers>,
    /// The most specific prefix around the destination that flows can tell apart; `None`: no VIP.
    pub vip: Option<IpNet>,
    /// Every flow in order of priority; empty when the headers cannot be used.
    pub flows: Vec<Candidate>,
    /// The stream of the flow that won.
    pub stream: Option<StreamState>,
    /// The target.
    pub target: Option<Chosen>,
}

/// Headers as the flow is looked up by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// Source of the packet.
    pub src: IpAddr,
    /// Destination of the packet.
    pub dst: IpAddr,
    /// IP protocol; for an ICMP error that of the quoted packet.
    pub protocol: u8,
    /// What it is to the classifier.
    pub kind: Kind,
    /// Source port, or identifier of an ICMP echo.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Length from the network header on.
    pub bytes: u32,
    /// An ICMP error about a packet to this address.
    pub quoted_to: Option<IpAddr>,
}

/// How a flow stands to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It wins.
    Chosen,
    /// It matches, but one of higher priority wins.
    Shadowed,
    /// It does not match.
    Missed,
}

/// One flow's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Name.
    pub name: String,
    /// Its stream.
    pub stream: String,
    /// How it stands.
    pub standing: Standing,
    /// Whether the flow is about the packet's destination at all.
    pub same_destination: bool,
    /// What does not match, one clause each.
    pub misses: Vec<String>,
}

/// The stream of a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamState {
    /// Name.
    pub name: String,
    /// Identifiers of ready targets.
    pub ready: Vec<u32>,
    /// Identifiers are 1 to this.
    pub max_targets: u32,
    /// Rows of its table.
    pub rows: u32,
}

/// The target of a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Its identifier.
    pub identifier: u32,
    /// Row; `None` for a later fragment, which follows the first one.
    pub row: Option<u32>,
    /// Identifier that the row belongs to when everybody is ready.
    pub owner: Option<u32>,
    /// Next hops.
    pub entry: TargetEntry,
}

fn address(bytes: [u8; 16]) -> IpAddr {
    Ipv6Addr::from(bytes).to_canonical()
}

/// The prefix of a key.
fn prefix(key: &PrefixKey) -> Option<IpNet> {
    let length = u8::try_from(key.bits.checked_sub(PREFIX_KEY_BITS)?).ok()?;
    let v6 = Ipv6Addr::from(key.address);
    if key.space & IPV4_SPACE != 0 {
        return Ipv4Net::new(v6.to_ipv4_mapped()?, length.checked_sub(96)?).ok().map(IpNet::V4);
    }
    Ipv6Net::new(v6, length).ok().map(IpNet::V6)
}

fn has(vector: Option<&Vector>, flow: u32) -> bool {
    vector.is_some_and(|v| v.word(flow as usize / 64) & (1 << (flow % 64)) != 0)
}

fn protocol_name(number: u8) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        132 => "sctp".to_owned(),
        other => format!("protocol {other}"),
    }
}

impl Image {
    /// Explains the decision about a packet (from its network header on).
    pub fn explain(&self, packet: &[u8], ethertype: u16) -> Explanation {
        let mut s = self.examine(packet, ethertype);
        let decision = s.decision;
        let version = packet.first().map(|byte| byte >> 4);
        let readable = match ethertype {
            meridio_decision::ETH_IPV4 => version == Some(4) && packet.len() >= 20,
            meridio_decision::ETH_IPV6 => version == Some(6) && packet.len() >= 40,
            _ => false,
        };
        let mut found = Explanation {
            decision,
            outcome: Reason::from_number(decision.reason).unwrap_or(Reason::Internal),
            headers: readable.then(|| headers(&s, packet.len() as u32)),
            vip: None,
            flows: Vec::new(),
            stream: None,
            target: None,
        };
        if !readable {
            return found;
        }
        found.vip = self.vip(&s);
        let looked_up = decision.flow != NONE || decision.reason == Reason::NoFlow as u32;
        if looked_up {
            found.flows = (0..self.classifier.flows.len() as u32).map(|n| self.candidate(packet, &mut s, n)).collect();
        }
        if found.outcome == Reason::FragmentUnknown && self.holds {
            found.outcome = Reason::FragmentHeld;
        }
        found.stream = self.stream_state(decision.slot);
        if decision.verdict == Verdict::Forward as u32 {
            found.target = self.chosen(&decision);
            found.outcome = found.target.map_or(Reason::Internal, |target| outcome(&s, packet.len() as u32, &target));
        }
        found
    }

    /// Name of a stream by its slot.
    pub fn stream_name(&self, slot: u32) -> Option<&str> {
        self.stream_names.get(slot as usize).map(String::as_str)
    }

    fn vip(&self, s: &Scratch) -> Option<IpNet> {
        let dst = address(s.network.dst);
        let around = self.classifier.vips.iter().filter_map(|(key, class)| Some((prefix(key)?, *class)));
        let longest = around.filter(|(net, _)| net.contains(&dst)).max_by_key(|(net, _)| net.prefix_len())?;
        (longest.1 != NOT_A_VIP).then_some(longest.0)
    }

    fn candidate(&self, packet: &[u8], s: &mut Scratch, flow: u32) -> Candidate {
        let matched = matched(&Bytes(packet), self, s, flow).unwrap_or_default();
        let standing = if s.decision.flow == flow {
            Standing::Chosen
        } else if matched.all() {
            Standing::Shadowed
        } else {
            Standing::Missed
        };
        let slot = self.classifier.flows.get(flow as usize).map_or(NONE, |f| f.slot);
        Candidate {
            name: self.flow_name(flow).unwrap_or_default().to_owned(),
            stream: self.stream_name(slot).unwrap_or_default().to_owned(),
            standing,
            same_destination: matched.destination,
            misses: if matched.all() { Vec::new() } else { self.misses(s, matched, flow) },
        }
    }

    fn misses(&self, s: &Scratch, matched: Matched, flow: u32) -> Vec<String> {
        let t = &s.transport;
        let ports = matches!(t.kind, Kind::Ports);
        let mut misses = Vec::new();
        if !matched.destination {
            let list = self.prefixes(&self.classifier.vips, DST_BASE, flow);
            misses.push(format!("destination {} is not in {list}", address(s.network.dst)));
        }
        if !matched.protocol {
            misses.push(format!("{} is not in {}", protocol_name(t.protocol), self.protocols(flow)));
        }
        if !matched.source {
            let list = self.prefixes(&self.classifier.sources, SRC_BASE, flow);
            let source = if t.quote != 0 { s.quoted.dst } else { s.network.src };
            misses.push(format!("source {} is not in {list}", address(source)));
        }
        for (met, name, port, base, map) in [
            (matched.destination_port, "destination port", t.dport, DPORT_BASE, &self.classifier.dports),
            (matched.source_port, "source port", t.sport, SPORT_BASE, &self.classifier.sports),
        ] {
            if !met {
                let list = self.ports(map, base, flow);
                misses.push(if ports {
                    format!("{name} {port} is not in {list}")
                } else {
                    format!("{name} wanted: {list}")
                });
            }
        }
        if !matched.bytes {
            misses.push(format!("bytes: {} does not hold", self.byte_matches(flow)));
        }
        misses
    }

    fn protocols(&self, flow: u32) -> String {
        let named = [(class::TCP, "tcp"), (class::UDP, "udp"), (class::SCTP, "sctp")];
        let ours = named.iter().filter(|(class, _)| has(self.classifier.vectors.get(&(PROTO_BASE + class)), flow));
        ours.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    }

    /// The prefixes of a flow, without those within others.
    fn prefixes(&self, map: &std::collections::BTreeMap<PrefixKey, u32>, base: u32, flow: u32) -> String {
        let ours =
            map.iter().filter(|(_, class)| has(self.classifier.vectors.get(&(base.saturating_add(**class))), flow));
        let nets: Vec<IpNet> = ours.filter_map(|(key, _)| prefix(key)).collect();
        let outer = nets.iter().filter(|net| !nets.iter().any(|other| other != *net && other.contains(*net)));
        shortened(outer.map(ToString::to_string).collect())
    }

    fn ports(&self, map: &PortMap, base: u32, flow: u32) -> String {
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for (port, class) in map.iter().enumerate() {
            if has(self.classifier.vectors.get(&(base + (*class as u32 & PORT_CLASS))), flow) {
                match ranges.last_mut() {
                    Some(last) if last.1 + 1 == port => last.1 = port,
                    _ => ranges.push((port, port)),
                }
            }
        }
        shortened(ranges.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") }).collect())
    }

    fn byte_matches(&self, flow: u32) -> String {
        let lists = flag::byte_lists(self.classifier.flags);
        let ours = (0..lists).find(|n| has(self.classifier.vectors.get(&(BYTES_BASE + n)), flow));
        let list = ours.and_then(|n| self.classifier.byte_lists.get(n as usize)).copied().unwrap_or_default();
        let used = list.statements.iter().filter(|s| s.protocol != UNUSED);
        let text = |s: &ByteMatch| {
            let protocol = protocol_name(s.protocol);
            format!("{protocol}[{}:{}] & {:#x} = {:#x}", s.offset, s.size, s.mask, s.value)
        };
        used.map(text).collect::<Vec<_>>().join(" and ")
    }

    fn stream_state(&self, slot: u32) -> Option<StreamState> {
        let entry = self.streams.get(slot as usize).filter(|entry| entry.rows != 0)?;
        let ready = (1..=entry.max_targets)
            .filter(|id| self.targets.contains_key(&meridio_decision::target_index(entry.target_base, *id, 0)));
        Some(StreamState {
            name: self.stream_name(slot)?.to_owned(),
            ready: ready.collect(),
            max_targets: entry.max_targets,
            rows: entry.rows,
        })
    }

    fn chosen(&self, decision: &Decision) -> Option<Chosen> {
        let entry = *self.targets.get(&decision.target)?;
        let row = (decision.row != NONE).then_some(decision.row);
        let max_targets = self.streams.get(decision.slot as usize)?.max_targets;
        let owner = row.and_then(|row| Table::new(max_targets)?.owner(row));
        Some(Chosen { identifier: decision.identifier, row, owner, entry })
    }
}

/// What becomes of a packet that has a target: as the program does it, with the MTU that the table holds.
fn outcome(s: &Scratch, bytes: u32, target: &Chosen) -> Reason {
    let ifindex = if s.network.v6 { target.entry.ifindex6 } else { target.entry.ifindex4 };
    if ifindex == 0 {
        Reason::NoAddress
    } else if s.network.options {
        Reason::SlowOptions
    } else if s.network.ttl <= 1 {
        Reason::SlowTtl
    } else if target.entry.mtu != 0 && bytes > target.entry.mtu {
        Reason::SlowMtu
    } else {
        Reason::Redirected
    }
}

fn headers(s: &Scratch, bytes: u32) -> Headers {
    let t = &s.transport;
    Headers {
        src: address(s.network.src),
        dst: address(s.network.dst),
        protocol: t.protocol,
        kind: t.kind,
        sport: t.sport,
        dport: t.dport,
        ttl: s.network.ttl,
        bytes,
        quoted_to: (t.quote != 0).then(|| address(s.quoted.dst)),
    }
}

/// A list for a person: the first few.
fn shortened(mut items: Vec<String>) -> String {
    const SHOWN: usize = 8;
    let more = items.len().saturating_sub(SHOWN);
    items.truncate(SHOWN);
    let list = items.join(", ");
    match more {
        0 if list.is_empty() => "its list, which is empty".to_owned(),
        0 => list,
        more => format!("{list} and {more} more"),
    }
}
