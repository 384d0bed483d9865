//! What a user wants from the load balancer: VIPs, streams, flows and port translations, as parsed values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use meridio_decision::layout::{ByteMatch, MAX_BYTE_LISTS, MAX_BYTE_MATCHES, MAX_FLOWS, MAX_STREAMS, MAX_TARGETS};

use crate::error::Error;
use crate::table::rows_for;

/// An L4 protocol that flows can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// IP protocol number.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }

    /// Length of the fixed header, bytes.
    pub const fn header(self) -> u16 {
        match self {
            Protocol::Tcp => 20,
            Protocol::Udp => 8,
            Protocol::Sctp => 12,
        }
    }

    /// The protocol of a name (`tcp`, `udp`, `sctp`; any case).
    pub fn parse(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "tcp" => Some(Protocol::Tcp),
            "udp" => Some(Protocol::Udp),
            "sctp" => Some(Protocol::Sctp),
            _ => None,
        }
    }
}

/// A load-balanced group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stream {
    /// Unique name.
    pub name: String,
    /// Identifiers are 1..=max_targets.
    pub max_targets: u32,
    /// SCTP hashes on ports only (multihoming).
    pub sctp_ports_only: bool,
}

/// Which packets belong to a stream. An empty list matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Flow {
    /// Unique name.
    pub name: String,
    /// Name of the stream; empty: it is not known (yet), and what belongs to the flow is dropped as if no target were ready.
    pub stream: String,
    /// Higher wins; equal priorities are ordered by name.
    pub priority: i32,
    /// Destination prefixes.
    pub destinations: Vec<IpNet>,
    /// Source prefixes.
    pub sources: Vec<IpNet>,
    /// Protocols.
    pub protocols: Vec<Protocol>,
    /// Destination ports, inclusive ranges.
    pub destination_ports: Vec<(u16, u16)>,
    /// Source ports, inclusive ranges.
    pub source_ports: Vec<(u16, u16)>,
    /// Statements about bytes of the L4 header, all of which must hold.
    pub byte_matches: Vec<Bytes>,
}

/// `protocol[offset:size] & mask = value`, big-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes {
    /// The protocol whose header is meant.
    pub protocol: Protocol,
    /// Offset in the L4 header.
    pub offset: u16,
    /// 1, 2 or 4.
    pub size: u8,
    /// Mask applied before comparing.
    pub mask: u32,
    /// Value expected.
    pub value: u32,
}

impl Bytes {
    /// Reads the notation of flows, e.g. `tcp[2:2] & 0xff00 = 0x0f00`.
    ///
    /// # Errors
    /// A sentence about what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let fault = || format!("byte match {text:?} is not of the form tcp[2:2] & 0xff00 = 4002");
        let (left, value) = text.split_once('=').ok_or_else(fault)?;
        let (place, mask) = match left.split_once('&') {
            Some((place, mask)) => (place, Some(mask)),
            None => (left, None),
        };
        let (protocol, rest) = place.trim().split_once('[').ok_or_else(fault)?;
        let (offset, size) = rest.strip_suffix(']').and_then(|r| r.split_once(':')).ok_or_else(fault)?;
        let protocol = Protocol::parse(protocol.trim()).ok_or_else(fault)?;
        let offset: u16 = offset.trim().parse().map_err(|_| fault())?;
        let size: u8 = size.trim().parse().map_err(|_| fault())?;
        if !matches!(size, 1 | 2 | 4) {
            return Err(format!("byte match {text:?}: size must be 1, 2 or 4"));
        }
        let full = u32::MAX >> (32 - 8 * size as u32);
        let number = |t: &str| -> Result<u32, String> {
            let t = t.trim();
            let parsed = match t.strip_prefix("0x").or_else(|| t.strip_prefix("0X")) {
                Some(hex) => u32::from_str_radix(hex, 16),
                None => t.parse(),
            };
            parsed
                .ok()
                .filter(|n| *n <= full)
                .ok_or_else(|| format!("byte match {text:?}: {t:?} is not a {size}-byte number"))
        };
        let mask = mask.map(number).transpose()?.unwrap_or(full);
        let bytes = Bytes { protocol, offset, size, mask, value: number(value)? };
        bytes.fault().map_or(Ok(bytes), Err)
    }

    /// Why the program cannot ask this of packets. Only the fixed header is sure to be there, and to be a header.
    pub(crate) fn fault(&self) -> Option<String> {
        if !matches!(self.size, 1 | 2 | 4) {
            return Some(format!("byte match \"{self}\": size must be 1, 2 or 4"));
        }
        let header = self.protocol.header();
        (self.offset as u32 + self.size as u32 > header as u32)
            .then(|| format!("byte match \"{self}\" reaches beyond the {header}-byte header of {:?}", self.protocol))
    }

    pub(crate) fn entry(&self) -> ByteMatch {
        ByteMatch {
            protocol: self.protocol.number(),
            size: self.size,
            offset: self.offset,
            mask: self.mask,
            value: self.value,
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        };
        write!(f, "{protocol}[{}:{}] & {:#x} = {:#x}", self.offset, self.size, self.mask, self.value)
    }
}

/// A destination port that targets know by another number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nat {
    /// VIP prefixes.
    pub vips: Vec<IpNet>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port that clients address.
    pub port: u16,
    /// Port that targets listen on.
    pub target_port: u16,
}

impl fmt::Display for Nat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vips: Vec<String> = self.vips.iter().map(ToString::to_string).collect();
        write!(f, "port-nat {}->{} {:?} of {}", self.port, self.target_port, self.protocol, vips.join(", "))
    }
}

/// Everything but the targets.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Config {
    /// Prefixes that are ours: what matches no flow is dropped.
    pub vips: Vec<IpNet>,
    /// Streams.
    pub streams: Vec<Stream>,
    /// Flows.
    pub flows: Vec<Flow>,
    /// Port translations.
    pub nats: Vec<Nat>,
}

/// A target as the table needs it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// IPv4 next hop and the interface towards it.
    pub v4: Option<(Ipv4Addr, u32)>,
    /// IPv6 next hop and the interface towards it.
    pub v6: Option<(Ipv6Addr, u32)>,
    /// MTU towards it, for kernels that cannot be asked; 0: not known.
    pub mtu: u32,
    /// The interfaces are ends of veth pairs whose other ends are in other network namespaces: packets may be put straight
    /// into the other end. Where this is not so it must not be said: the kernel drops them.
    pub direct: bool,
}

/// Ready targets of a stream by identifier.
pub type Targets = BTreeMap<u32, Target>;

/// The address as the decision sees it.
pub fn mapped_address(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

/// Flows in the order in which they win.
pub(crate) fn ordered(flows: &[Flow]) -> Vec<&Flow> {
    let mut ordered: Vec<&Flow> = flows.iter().collect();
    ordered.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.name.cmp(&b.name)));
    ordered
}

/// Whether a port list is no constraint.
pub(crate) fn any_port(ranges: &[(u16, u16)]) -> bool {
    ranges.is_empty() || ranges.contains(&(0, u16::MAX))
}

/// Whether a source prefix list is no constraint: the original leaves the sources out when all of them are of length 0, of whichever
/// IP version.
pub(crate) fn any_source(nets: &[IpNet]) -> bool {
    nets.iter().all(|net| net.prefix_len() == 0)
}

impl Config {
    /// Every fault of the configuration; none: it can be compiled.
    pub fn faults(&self) -> Vec<Error> {
        let mut faults = Vec::new();
        self.stream_faults(&mut faults);
        self.flow_faults(&mut faults);
        self.nat_faults(&mut faults);
        faults
    }

    fn stream_faults(&self, faults: &mut Vec<Error>) {
        let mut names = BTreeSet::new();
        let mut sum = 0usize;
        for stream in &self.streams {
            let object = format!("stream {:?}", stream.name);
            if stream.name.is_empty() || stream.name.len() > 127 {
                faults.push(Error::config(&object, "name must have 1 to 127 bytes"));
            }
            if !names.insert(&stream.name) {
                faults.push(Error::config(&object, "defined twice"));
            }
            if rows_for(stream.max_targets).is_none() {
                faults.push(Error::config(&object, format!("max-targets {} is not in 1..10000", stream.max_targets)));
            }
            sum += stream.max_targets as usize + 1;
        }
        if self.streams.len() > MAX_STREAMS {
            faults.push(Error::config("streams", format!("{} are more than {MAX_STREAMS}", self.streams.len())));
        }
        if sum > MAX_TARGETS {
            faults.push(Error::config("streams", format!("max-targets of all together exceed {MAX_TARGETS}")));
        }
    }

    fn flow_faults(&self, faults: &mut Vec<Error>) {
        let streams: BTreeSet<&String> = self.streams.iter().map(|s| &s.name).collect();
        let mut names = BTreeSet::new();
        for flow in &self.flows {
            let object = format!("flow {:?}", flow.name);
            let mut fault = |reason: String| faults.push(Error::config(&object, reason));
            if flow.name.is_empty() || flow.name.len() > 127 {
                fault("name must have 1 to 127 bytes".into());
            }
            if !names.insert(&flow.name) {
                fault("defined twice".into());
            }
            if !flow.stream.is_empty() && !streams.contains(&flow.stream) {
                fault(format!("names the unknown stream {:?}", flow.stream));
            }
            let ports = !any_port(&flow.destination_ports) || !any_port(&flow.source_ports);
            if ports && flow.protocols.is_empty() {
                fault("ports need a protocol".into());
            }
            for (low, high) in flow.destination_ports.iter().chain(&flow.source_ports) {
                if low > high {
                    fault(format!("port range {low}-{high} is empty"));
                }
            }
            if flow.byte_matches.len() > MAX_BYTE_MATCHES {
                fault(format!("has more than {MAX_BYTE_MATCHES} byte matches"));
            }
            flow.byte_matches.iter().filter_map(Bytes::fault).for_each(fault);
        }
        if self.flows.len() > MAX_FLOWS {
            faults.push(Error::config("flows", format!("{} are more than {MAX_FLOWS}", self.flows.len())));
        }
        let lists: BTreeSet<&Vec<Bytes>> =
            self.flows.iter().map(|f| &f.byte_matches).filter(|m| !m.is_empty()).collect();
        if lists.len() > MAX_BYTE_LISTS {
            let reason = format!(
                "{} different lists of byte matches are more than {MAX_BYTE_LISTS}, all flows of this load balancer together",
                lists.len()
            );
            faults.push(Error::config("flows", reason));
        }
    }

    fn nat_faults(&self, faults: &mut Vec<Error>) {
        for (n, nat) in self.nats.iter().enumerate() {
            if nat.port == 0 || nat.target_port == 0 {
                faults.push(Error::config(nat.to_string(), "port 0"));
            }
            for other in &self.nats[..n] {
                let port = match (nat.port == other.port, nat.target_port == other.target_port) {
                    _ if nat.protocol != other.protocol => continue,
                    (true, _) => format!("port {}", nat.port),
                    (_, true) => format!("to port {}", nat.target_port),
                    _ => continue,
                };
                let overlap = nat.vips.iter().find_map(|vip| {
                    let wider = other.vips.iter().find(|o| o.contains(vip) || vip.contains(*o))?;
                    Some(if wider.prefix_len() > vip.prefix_len() { wider } else { vip })
                });
                if let Some(vip) = overlap {
                    // Either would do for some packets, and nothing says which.
                    let reason = format!("overlaps {other}: both translate {port} of {vip}");
                    faults.push(Error::config(nat.to_string(), reason));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_matches_stay_within_the_fixed_header() {
        assert_eq!(Bytes::parse("tcp[16:4] = 1").unwrap().to_string(), "tcp[16:4] & 0xffffffff = 0x1");
        for (text, header) in [
            ("tcp[20:4] = 0x47455420", "20-byte header of Tcp"),
            ("tcp[65535:4] = 1", "20-byte header of Tcp"),
            ("udp[7:2] = 1", "8-byte header of Udp"),
            ("sctp[12:1] = 1", "12-byte header of Sctp"),
        ] {
            let error = Bytes::parse(text).unwrap_err();
            assert!(error.ends_with(&format!("reaches beyond the {header}")), "{error}");
        }
        assert!(Bytes::parse("tcp[0:3] = 1").is_err() && Bytes::parse("tcp[0:0] = 1").is_err());
    }
}
