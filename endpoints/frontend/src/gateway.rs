//! What an attractor asks for, as validated values: VIPs to attract and gateways to attract them with.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use meridio_proto::nsp::v1 as nsp;

/// Longest symbol BIRD 2 takes, without its closing zero.
const SYMBOL_MAX: usize = 63;
/// Prefix of every protocol that stands for a gateway; no filter-language word starts so.
pub const PROTOCOL_PREFIX: &str = "NBR-";

/// One of the two address families of a trench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, in the order in which they are always handled.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Family::V4 } else { Family::V6 }
    }

    /// The family of a prefix.
    pub fn of_net(net: &IpNet) -> Self {
        Self::of(net.addr())
    }
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Family::V4 => "ipv4",
            Family::V6 => "ipv6",
        })
    }
}

/// Bidirectional forwarding detection with a gateway; 0 leaves BIRD's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bfd {
    /// Milliseconds between sent packets.
    pub min_tx: u32,
    /// Milliseconds between received packets that this side can handle.
    pub min_rx: u32,
    /// Packets missed until the session is down.
    pub multiplier: u32,
}

/// Where the TCP MD5 password of a session is found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AuthRef {
    /// Name of the secret.
    pub source: String,
    /// Key within the secret.
    pub key: String,
}

/// A BGP session with a gateway. 0 in a number means "the component's default".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bgp {
    /// The gateway's autonomous system.
    pub remote_asn: u32,
    /// Our autonomous system.
    pub local_asn: u32,
    /// TCP port of the gateway.
    pub remote_port: u16,
    /// Our TCP port.
    pub local_port: u16,
    /// Hold time in seconds.
    pub hold_time: u32,
    /// TCP MD5 authentication, if any.
    pub auth: Option<AuthRef>,
}

/// How VIPs are attracted from a gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// A BGP session that announces VIPs and learns the default route.
    Bgp(Bgp),
    /// A static default route; the gateway routes VIPs by its own configuration.
    Static,
}

/// One gateway of the attractor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Name of the gateway resource.
    pub name: String,
    /// Its address on the external network.
    pub address: IpAddr,
    /// BGP or static.
    pub protocol: Protocol,
    /// BFD, when switched on.
    pub bfd: Option<Bfd>,
}

impl Gateway {
    /// Name of the BIRD protocol of this gateway.
    pub fn protocol_name(&self) -> String {
        format!("{PROTOCOL_PREFIX}{}", self.name)
    }

    /// Where the password of its session is found, if it wants one.
    pub fn auth(&self) -> Option<&AuthRef> {
        match &self.protocol {
            Protocol::Bgp(bgp) => bgp.auth.as_ref(),
            Protocol::Static => None,
        }
    }

    /// The one address family of this gateway's session.
    pub fn family(&self) -> Family {
        Family::of(self.address)
    }
}

/// VIPs and gateways of one attractor, in the order of the resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attraction {
    /// Prefixes to announce and to route back.
    pub vips: Vec<IpNet>,
    /// Gateways to peer with.
    pub gateways: Vec<Gateway>,
}

impl Attraction {
    /// Families that have at least one gateway.
    pub fn families(&self) -> BTreeSet<Family> {
        self.gateways.iter().map(Gateway::family).collect()
    }

    /// Reads an attractor as the NSP tells it; every fault is named, with the object it is in.
    pub fn parse(attractor: &nsp::Attractor) -> Result<Self, Vec<String>> {
        let mut faults = Vec::new();
        let mut vips = Vec::new();
        for vip in &attractor.vips {
            match vip.address.parse::<IpNet>() {
                Ok(net) if net.trunc() == net => {
                    if !vips.contains(&net) {
                        vips.push(net);
                    }
                }
                Ok(net) => faults.push(format!("vip {:?}: address {net} has host bits set", vip.name)),
                Err(_) => faults.push(format!("vip {:?}: address {:?} is no CIDR", vip.name, vip.address)),
            }
        }
        let mut gateways: Vec<Gateway> = Vec::new();
        for gateway in &attractor.gateways {
            match parse_gateway(gateway) {
                Ok(parsed) if gateways.iter().any(|known| known.name == parsed.name) => {
                    faults.push(format!("gateway {:?}: listed twice", parsed.name));
                }
                Ok(parsed) => gateways.push(parsed),
                Err(found) => faults.extend(found),
            }
        }
        if faults.is_empty() { Ok(Self { vips, gateways }) } else { Err(faults) }
    }
}

fn parse_gateway(gateway: &nsp::Gateway) -> Result<Gateway, Vec<String>> {
    let mut faults = Vec::new();
    let mut fault = |text: String| faults.push(format!("gateway {:?}: {text}", gateway.name));
    if gateway.name.is_empty() || !gateway.name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c)) {
        fault("the name may only have letters, digits and \"-._\"".into());
    }
    if gateway.name.len() + PROTOCOL_PREFIX.len() > SYMBOL_MAX {
        fault(format!("the name is longer than {} characters", SYMBOL_MAX - PROTOCOL_PREFIX.len()));
    }
    let address = gateway.address.parse::<IpAddr>();
    match &address {
        Err(_) => fault(format!("address {:?} is no IP address", gateway.address)),
        // BIRD refuses the first and would wait for ever for the others.
        Ok(ip) if ip.is_unspecified() || ip.is_multicast() || *ip == IpAddr::V4(Ipv4Addr::BROADCAST) => {
            fault(format!("address {ip} is not that of one machine"));
        }
        Ok(_) => {}
    }
    let protocol = match gateway.protocol.to_ascii_lowercase().as_str() {
        "bgp" | "" => parse_bgp(gateway, &mut fault).map(Protocol::Bgp),
        "static" => Some(Protocol::Static),
        other => {
            fault(format!("unknown protocol {other:?}"));
            None
        }
    };
    let spec = gateway.bfd_spec.unwrap_or_default();
    // A detection time of zero or of minutes is a typing error, BIRD would take it.
    if gateway.bfd && (spec.min_tx > 60_000 || spec.min_rx > 60_000 || spec.multiplier > 255) {
        fault("bfd: min-tx and min-rx are at most 60000 ms, multiplier at most 255".into());
    }
    let bfd = gateway.bfd.then_some(Bfd { min_tx: spec.min_tx, min_rx: spec.min_rx, multiplier: spec.multiplier });
    match (address, protocol) {
        (Ok(address), Some(protocol)) if faults.is_empty() => {
            Ok(Gateway { name: gateway.name.clone(), address, protocol, bfd })
        }
        _ => Err(faults),
    }
}

fn parse_bgp(gateway: &nsp::Gateway, fault: &mut impl FnMut(String)) -> Option<Bgp> {
    let mut port = |what: &str, value: u32| {
        u16::try_from(value).map_err(|_| fault(format!("{what} {value} is no TCP port"))).unwrap_or_default()
    };
    let remote_port = port("remote-port", gateway.remote_port);
    let local_port = port("local-port", gateway.local_port);
    if matches!(gateway.hold_time, 1 | 2) || gateway.hold_time > 65_535 {
        fault(format!("hold-time {} s is not within 3..65535", gateway.hold_time));
    }
    let auth = gateway.bgp_auth.as_ref().filter(|auth| !auth.key_name.is_empty() || !auth.key_source.is_empty());
    for part in auth.iter().flat_map(|auth| [&auth.key_name, &auth.key_source]) {
        // Both become one path component each.
        if part.is_empty()
            || part.starts_with('.')
            || !part.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
        {
            fault(format!("bgp auth: {part:?} is no name of a secret or key"));
        }
    }
    Some(Bgp {
        remote_asn: gateway.remote_asn,
        local_asn: gateway.local_asn,
        remote_port,
        local_port,
        hold_time: gateway.hold_time,
        auth: auth.map(|auth| AuthRef { source: auth.key_source.clone(), key: auth.key_name.clone() }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gateway(name: &str, address: &str) -> nsp::Gateway {
        nsp::Gateway { name: name.into(), address: address.into(), protocol: "bgp".into(), ..Default::default() }
    }

    #[test]
    fn every_fault_is_named_with_its_object() {
        let attractor = nsp::Attractor {
            vips: vec![
                nsp::Vip { name: "a".into(), address: "20.0.0.1".into(), trench: None },
                nsp::Vip { name: "b".into(), address: "20.0.0.1/24".into(), trench: None },
            ],
            gateways: vec![
                gateway("x\"y", "1.2.3.4"),
                gateway("g", "1.2.3"),
                nsp::Gateway { local_port: 70_000, hold_time: 2, ..gateway("h", "::1") },
                nsp::Gateway { protocol: "ospf".into(), ..gateway("i", "::1") },
            ],
            ..Default::default()
        };
        let faults = Attraction::parse(&attractor).expect_err("faulty");
        assert_eq!(faults.len(), 7, "{faults:#?}");
        for (fault, object) in
            faults.iter().zip(["vip \"a\"", "vip \"b\"", "gateway \"x", "gateway \"g\"", "gateway \"h\""])
        {
            assert!(fault.starts_with(object), "{fault}");
        }
    }

    #[test]
    fn a_gateway_is_one_machine() {
        let parse = |address: &str| {
            let gateways = vec![gateway("good", "169.254.100.150"), gateway("odd", address)];
            Attraction::parse(&nsp::Attractor { gateways, ..Default::default() })
        };
        for address in ["::", "0.0.0.0", "224.0.0.5", "ff02::1", "255.255.255.255"] {
            let faults = parse(address).expect_err(address);
            assert_eq!(faults, [format!("gateway \"odd\": address {address} is not that of one machine")]);
        }
        for address in ["100:100::150", "fe80::1", "10.0.0.1"] {
            assert!(parse(address).is_ok(), "{address}");
        }
    }

    #[test]
    fn a_secret_cannot_point_outside_its_directory() {
        let mut faulty = gateway("g", "::1");
        faulty.bgp_auth = Some(nsp::gateway::BgpAuth { key_name: "key".into(), key_source: "../etc".into() });
        let attractor = nsp::Attractor { gateways: vec![faulty], ..Default::default() };
        assert!(Attraction::parse(&attractor).is_err());
    }
}
