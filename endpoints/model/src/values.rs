//! The objects of a trench.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::{ByteMatch, PortRange, Protocol};

/// Targets of a stream that does not say how many.
pub const DEFAULT_MAX_TARGETS: u32 = 100;
/// Largest `max-targets`.
pub const MAX_TARGETS_LIMIT: u32 = 10_000;

/// An isolated external network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trench {
    /// Name, unique in its namespace.
    pub name: String,
}

/// What carries traffic of some streams to the nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conduit {
    /// Name.
    pub name: String,
    /// Port translations at the load balancer.
    pub port_nats: Vec<PortNat>,
}

/// Packets to a VIP's `port` arrive at the target's `target_port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortNat {
    /// Port that clients use.
    pub port: u16,
    /// Port that targets listen on.
    pub target_port: u16,
    /// Names of VIPs.
    pub vips: Vec<String>,
    /// Protocol.
    pub protocol: Protocol,
}

/// A load-balanced group of targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// Name.
    pub name: String,
    /// Name of its conduit.
    pub conduit: String,
    /// Identifiers that targets can have: 1 to this.
    pub max_targets: u32,
}

/// A classifier: which packets belong to a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Name.
    pub name: String,
    /// Source addresses; none means any.
    pub source_subnets: Vec<IpNet>,
    /// Destination ports; none means any.
    pub destination_ports: Vec<PortRange>,
    /// Source ports; none means any.
    pub source_ports: Vec<PortRange>,
    /// Protocols, at least one.
    pub protocols: Vec<Protocol>,
    /// Names of VIPs.
    pub vips: Vec<String>,
    /// The highest matching priority wins.
    pub priority: i32,
    /// Name of its stream.
    pub stream: String,
    /// Bytes of the transport header; all must match.
    pub byte_matches: Vec<ByteMatch>,
}

/// A virtual address that gateways route to the trench.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vip {
    /// Name.
    pub name: String,
    /// Address, usually of full length.
    pub address: IpNet,
}

/// Where traffic is attracted: VIPs announced to gateways.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attractor {
    /// Name.
    pub name: String,
    /// Names of VIPs.
    pub vips: Vec<String>,
    /// Names of gateways, in the order of BIRD's configuration.
    pub gateways: Vec<String>,
}

/// A router of the external network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Name.
    pub name: String,
    /// Its address on the external network.
    pub address: IpAddr,
    /// How it is spoken to.
    pub protocol: GatewayProtocol,
    /// Bidirectional forwarding detection; none means off.
    pub bfd: Option<Bfd>,
}

/// How a gateway is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GatewayProtocol {
    /// A BGP session. Ports and hold time of 0 mean the frontend's own defaults.
    Bgp {
        /// AS number of the gateway.
        remote_asn: u32,
        /// AS number of the frontend.
        local_asn: u32,
        /// Port of the gateway.
        remote_port: u16,
        /// Port of the frontend.
        local_port: u16,
        /// Seconds.
        hold_time: u32,
        /// TCP MD5 secret.
        auth: Option<BgpAuth>,
    },
    /// A static default route.
    Static,
}

/// Parameters of BFD; 0 means the routing daemon's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bfd {
    /// Milliseconds.
    pub min_tx: u32,
    /// Milliseconds.
    pub min_rx: u32,
    /// Missed packets until the session is down.
    pub multiplier: u32,
}

/// Where the secret of a BGP session is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BgpAuth {
    /// Key within the Secret.
    pub key: String,
    /// Name of the Secret.
    pub source: String,
}

/// Everything that is configured in one trench; lists sorted by name. From [`Configuration::parse`] it is free of faults and
/// all its references lead somewhere; one built from values can be asked with [`Configuration::validate`] and [`Configuration::resolve`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Configuration {
    /// The trench.
    pub trench: Trench,
    /// Its conduits.
    pub conduits: Vec<Conduit>,
    /// Its streams.
    pub streams: Vec<Stream>,
    /// Its flows.
    pub flows: Vec<Flow>,
    /// Its VIPs.
    pub vips: Vec<Vip>,
    /// Its attractors.
    pub attractors: Vec<Attractor>,
    /// Its gateways.
    pub gateways: Vec<Gateway>,
}

impl Configuration {
    /// The VIP of that name.
    pub fn vip(&self, name: &str) -> Option<&Vip> {
        self.vips.iter().find(|vip| vip.name == name)
    }

    /// The stream of that name.
    pub fn stream(&self, name: &str) -> Option<&Stream> {
        self.streams.iter().find(|stream| stream.name == name)
    }

    /// The conduit of that name.
    pub fn conduit(&self, name: &str) -> Option<&Conduit> {
        self.conduits.iter().find(|conduit| conduit.name == name)
    }

    pub(crate) fn sort(&mut self) {
        self.conduits.sort_by(|a, b| a.name.cmp(&b.name));
        self.streams.sort_by(|a, b| a.name.cmp(&b.name));
        self.flows.sort_by(|a, b| a.name.cmp(&b.name));
        self.vips.sort_by(|a, b| a.name.cmp(&b.name));
        self.attractors.sort_by(|a, b| a.name.cmp(&b.name));
        self.gateways.sort_by(|a, b| a.name.cmp(&b.name));
    }
}
