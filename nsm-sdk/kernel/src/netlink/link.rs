//! Interfaces: veth pairs, VXLAN devices, bridges, and what one changes on any of them.

use std::fmt;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoBridge, InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo,
    LinkMessage,
};

use super::{CREATE, Netlink};
use crate::{Error, Netns};

/// Kind of bridges in [`Link::kind`].
pub const BRIDGE: &str = "bridge";
/// Kind of VXLAN devices in [`Link::kind`].
pub const VXLAN: &str = "vxlan";

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    pub(crate) fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Mac)
    }
}

impl std::str::FromStr for Mac {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let bad = || Error::Invalid(format!("{s:?} is not an Ethernet address"));
        let bytes: Vec<u8> =
            s.split(':').map(|part| u8::from_str_radix(part, 16)).collect::<Result<_, _>>().map_err(|_| bad())?;
        Mac::from_slice(&bytes).ok_or_else(bad)
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A locally administered unicast address that is always the same for one seed, so that an interface that is made anew
/// under its old identity leaves nobody's neighbour cache stale. (FNV-1a, with a finalising mix of its bits.)
pub fn mac_from_seed(seed: &str) -> Mac {
    let mut hash =
        seed.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    let b = hash.to_be_bytes();
    Mac([(b[0] & 0xfc) | 0x02, b[1], b[2], b[3], b[4], b[5]])
}

/// Parameters of a point-to-point VXLAN device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanParameters {
    /// 24-bit network identifier.
    pub vni: u32,
    /// Own underlay address.
    pub local: IpAddr,
    /// Underlay address of the other node.
    pub remote: IpAddr,
    /// UDP port of both.
    pub port: u16,
}

/// An interface as read from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Index: per namespace, and given again to another interface some day.
    pub index: u32,
    /// Name, at most 15 bytes.
    pub name: String,
    /// Alias, empty if there is none.
    pub alias: String,
    /// Kind (`veth`, `vxlan`, `bridge` ...), empty for hardware and loopback.
    pub kind: String,
    /// Ethernet address.
    pub mac: Option<Mac>,
    /// Maximum transmission unit.
    pub mtu: u32,
    /// Set up by the administrator.
    pub up: bool,
    /// Can pass packets: up, and with a carrier.
    pub running: bool,
    /// Index of the bridge that it is a port of.
    pub master: Option<u32>,
    /// Index of the other end of a veth pair, in the other end's namespace.
    pub peer: Option<u32>,
    /// Id of the other end's namespace, as this one knows it; none if it is the same namespace.
    pub peer_nsid: Option<i32>,
    /// Of VXLAN devices with a unicast remote.
    pub vxlan: Option<VxlanParameters>,
}

pub(crate) fn parse_link(message: &LinkMessage) -> Option<Link> {
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        alias: String::new(),
        kind: String::new(),
        mac: None,
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        running: flags.contains(LinkFlags::Running) && flags.contains(LinkFlags::LowerUp),
        master: None,
        peer: None,
        peer_nsid: None,
        vxlan: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::IfAlias(alias) => link.alias.clone_from(alias),
            LinkAttribute::Address(bytes) => link.mac = Mac::from_slice(bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|i| *i != 0),
            LinkAttribute::Link(index) => link.peer = Some(*index),
            LinkAttribute::LinkNetNsId(id) => link.peer_nsid = Some(*id),
            LinkAttribute::LinkInfo(infos) => parse_info(&mut link, infos),
            _ => {}
        }
    }
    (!link.name.is_empty()).then_some(link)
}

fn parse_info(link: &mut Link, infos: &[LinkInfo]) {
    for info in infos {
        match info {
            LinkInfo::Kind(kind) => link.kind = kind.to_string(),
            LinkInfo::Data(InfoData::Vxlan(data)) => link.vxlan = parse_vxlan(data),
            _ => {}
        }
    }
}

fn parse_vxlan(data: &[InfoVxlan]) -> Option<VxlanParameters> {
    let (mut vni, mut local, mut remote, mut port) = (None, None, None, 0);
    for item in data {
        match item {
            InfoVxlan::Id(id) => vni = Some(*id),
            InfoVxlan::Local(a) => local = Some(IpAddr::from(*a)),
            InfoVxlan::Local6(a) => local = Some(IpAddr::from(*a)),
            InfoVxlan::Group(a) => remote = Some(IpAddr::from(*a)),
            InfoVxlan::Group6(a) => remote = Some(IpAddr::from(*a)),
            InfoVxlan::Port(p) => port = *p,
            _ => {}
        }
    }
    Some(VxlanParameters { vni: vni?, local: local?, remote: remote?, port })
}

/// One end of a veth pair that is to be made.
#[derive(Clone, Debug)]
pub struct VethEnd {
    /// Namespace that the end is made in.
    pub netns: Netns,
    /// Final name.
    pub name: String,
    /// Ethernet address.
    pub mac: Mac,
}

/// What to change of an interface; `None` leaves it alone.
#[derive(Clone, Debug, Default)]
pub struct LinkChange {
    /// Set up or down.
    pub up: Option<bool>,
    /// New alias.
    pub alias: Option<String>,
    /// New MTU.
    pub mtu: Option<u32>,
    /// New Ethernet address.
    pub mac: Option<Mac>,
    /// Index of the bridge to become a port of, 0 for none.
    pub master: Option<u32>,
    /// Namespace to move to, with the name there.
    pub move_to: Option<(Netns, String)>,
}

fn named(index: u32, name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    if !name.is_empty() {
        message.attributes.push(LinkAttribute::IfName(name.to_string()));
    }
    message
}

fn veth_end(end: &VethEnd, mtu: Option<u32>) -> LinkMessage {
    let mut message = named(0, &end.name);
    message.attributes.push(LinkAttribute::NetNsFd(end.netns.fd().as_raw_fd()));
    message.attributes.push(LinkAttribute::Address(end.mac.0.to_vec()));
    message.attributes.extend(mtu.map(LinkAttribute::Mtu));
    message
}

fn kind(kind: InfoKind, data: InfoData) -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)])
}

fn vxlan_data(parameters: &VxlanParameters) -> Vec<InfoVxlan> {
    let mut data = vec![InfoVxlan::Id(parameters.vni)];
    match parameters.remote {
        IpAddr::V4(a) => data.push(InfoVxlan::Group(a)),
        IpAddr::V6(a) => data.push(InfoVxlan::Group6(a)),
    }
    match parameters.local {
        IpAddr::V4(a) => data.push(InfoVxlan::Local(a)),
        IpAddr::V6(a) => data.push(InfoVxlan::Local6(a)),
    }
    // One remote for ever: nothing is to be learnt, and a forged frame cannot teach anything.
    data.push(InfoVxlan::Learning(false));
    data.push(InfoVxlan::Port(parameters.port));
    if parameters.remote.is_ipv4() {
        // RFC 7348, 4.1: the outer checksum over IPv4 should be zero, the inner packet has its own.
        data.push(InfoVxlan::UDPCsum(false));
    }
    data
}

impl Netlink {
    /// All interfaces.
    pub async fn links(&self) -> Result<Vec<Link>, Error> {
        let mut message = LinkMessage::default();
        // Statistics are most of an answer and nobody here reads them.
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let found = self.dump("list interfaces", RouteNetlinkMessage::GetLink(message)).await?;
        Ok(links_in(&found))
    }

    /// One interface by name.
    pub async fn link_by_name(&self, name: &str) -> Result<Option<Link>, Error> {
        self.one_link(named(0, name), &format!("look up interface {name}")).await
    }

    /// One interface by index.
    pub async fn link_by_index(&self, index: u32) -> Result<Option<Link>, Error> {
        self.one_link(named(index, ""), &format!("look up interface {index}")).await
    }

    async fn one_link(&self, message: LinkMessage, what: &str) -> Result<Option<Link>, Error> {
        match self.get(what, RouteNetlinkMessage::GetLink(message)).await {
            Ok(found) => Ok(links_in(&found).into_iter().next()),
            Err(e) if e.is_missing() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Makes a veth pair, down, with both ends directly in their namespaces and under their final names: one request, where
    /// moving an interface waits for the kernel to be done with it.
    pub async fn veth_create(&self, a: &VethEnd, b: &VethEnd, mtu: Option<u32>) -> Result<(), Error> {
        let mut message = veth_end(a, mtu);
        let peer = InfoData::Veth(InfoVeth::Peer(veth_end(b, mtu)));
        message.attributes.push(kind(InfoKind::Veth, peer));
        let what = || format!("make veth pair {} in {}, {} in {}", a.name, a.netns.id(), b.name, b.netns.id());
        self.change(what, RouteNetlinkMessage::NewLink(message), CREATE).await
    }

    /// Makes a VXLAN device, down, in this namespace. Wherever it is moved, its underlay socket stays here.
    pub async fn vxlan_create(&self, name: &str, parameters: &VxlanParameters, mac: Mac) -> Result<(), Error> {
        let mut message = named(0, name);
        message.attributes.push(LinkAttribute::Address(mac.0.to_vec()));
        message.attributes.push(kind(InfoKind::Vxlan, InfoData::Vxlan(vxlan_data(parameters))));
        let what = || format!("make vxlan {name} vni {} to {}", parameters.vni, parameters.remote);
        self.change(what, RouteNetlinkMessage::NewLink(message), CREATE).await
    }

    /// Makes a bridge, down, without spanning tree, with a fixed address (a bridge without one takes the lowest of its ports).
    pub async fn bridge_create(&self, name: &str, mac: Mac) -> Result<(), Error> {
        let mut message = named(0, name);
        message.attributes.push(LinkAttribute::Address(mac.0.to_vec()));
        message.attributes.push(kind(
            InfoKind::Bridge,
            InfoData::Bridge(vec![InfoBridge::StpState(rtnetlink::packet_route::link::BridgeStpState::Disabled)]),
        ));
        self.change(|| format!("make bridge {name}"), RouteNetlinkMessage::NewLink(message), CREATE).await
    }

    /// Changes an interface.
    pub async fn link_change(&self, index: u32, change: &LinkChange) -> Result<(), Error> {
        let mut message = named(index, "");
        if let Some(up) = change.up {
            message.header.change_mask |= LinkFlags::Up;
            if up {
                message.header.flags |= LinkFlags::Up;
            }
        }
        let attributes = &mut message.attributes;
        attributes.extend(change.alias.clone().map(LinkAttribute::IfAlias));
        attributes.extend(change.mtu.map(LinkAttribute::Mtu));
        attributes.extend(change.mac.map(|m| LinkAttribute::Address(m.0.to_vec())));
        attributes.extend(change.master.map(LinkAttribute::Controller));
        if let Some((netns, name)) = &change.move_to {
            attributes.push(LinkAttribute::NetNsFd(netns.fd().as_raw_fd()));
            attributes.push(LinkAttribute::IfName(name.clone()));
        }
        let what = || format!("change interface {index}: {change:?}");
        self.change(what, RouteNetlinkMessage::SetLink(message), 0).await
    }

    /// Sets an interface up.
    pub async fn link_up(&self, index: u32) -> Result<(), Error> {
        self.link_change(index, &LinkChange { up: Some(true), ..Default::default() }).await
    }

    /// Renames an interface. Kernels before 6.2 rename only what is down: there it is down for an instant, and routes over it
    /// are lost.
    pub async fn link_rename(&self, index: u32, name: &str) -> Result<(), Error> {
        let what = || format!("rename interface {index} to {name}");
        let rename = || self.change(what, RouteNetlinkMessage::SetLink(named(index, name)), 0);
        match rename().await {
            Err(e) if e.errno() == Some(libc::EBUSY) => {
                self.link_change(index, &LinkChange { up: Some(false), ..Default::default() }).await?;
                let renamed = rename().await;
                self.link_up(index).await?;
                renamed
            }
            other => other,
        }
    }

    /// Deletes an interface (a veth pair dies with either end).
    pub async fn link_delete(&self, index: u32) -> Result<(), Error> {
        let what = || format!("delete interface {index}");
        self.change(what, RouteNetlinkMessage::DelLink(named(index, "")), 0).await
    }

    /// Deletes an interface in a namespace that this one knows by id (see [`nsid_of`](Self::nsid_of)), if it still carries
    /// `alias`: ids and indexes are given again. Deletes nothing if the namespace is gone.
    pub async fn link_delete_in(&self, nsid: i32, index: u32, alias: &str) -> Result<(), Error> {
        if self.link_in(nsid, index).await?.is_none_or(|link| link.alias != alias) {
            return Ok(());
        }
        let what = || format!("delete interface {index} ({alias}) in namespace {nsid}");
        let mut message = named(index, "");
        message.attributes.push(LinkAttribute::IfNetnsId(nsid));
        self.change(what, RouteNetlinkMessage::DelLink(message), 0).await
    }

    /// One interface in a namespace that this one knows by id (see [`nsid_of`](Self::nsid_of)); none if the namespace is gone.
    pub async fn link_in(&self, nsid: i32, index: u32) -> Result<Option<Link>, Error> {
        let mut message = named(index, "");
        message.attributes.push(LinkAttribute::IfNetnsId(nsid));
        match self.one_link(message, &format!("look up interface {index} in namespace {nsid}")).await {
            // An id without a namespace is an invalid argument.
            Err(e) if e.errno() == Some(libc::EINVAL) => Ok(None),
            found => found,
        }
    }
}

fn links_in(messages: &[RouteNetlinkMessage]) -> Vec<Link> {
    let links = messages.iter().filter_map(|m| match m {
        RouteNetlinkMessage::NewLink(l) => parse_link(l),
        _ => None,
    });
    links.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeded_mac_is_stable_local_unicast() {
        let a = mac_from_seed("server-abc");
        assert_eq!(a, mac_from_seed("server-abc"));
        assert_ne!(a, mac_from_seed("client-abc"));
        assert_eq!(a.0[0] & 3, 2);
        assert_eq!(a.to_string().parse::<Mac>().unwrap(), a);
        assert!("1:2".parse::<Mac>().is_err());
    }
}
