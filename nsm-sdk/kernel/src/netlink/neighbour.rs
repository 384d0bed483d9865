//! Neighbour entries (ARP, ND) and bridge forwarding entries.

use std::net::IpAddr;

use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState as State,
};
use rtnetlink::packet_route::route::RouteType;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::family;
use super::link::Mac;
use super::{Netlink, REPLACE};
use crate::Error;

/// What the kernel believes of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NeighbourState {
    /// Set by hand, never probed.
    Permanent,
    /// Confirmed lately.
    Reachable,
    /// Usable, to be confirmed on next use.
    Stale,
    /// Being resolved or confirmed.
    Probing,
    /// Did not answer.
    Failed,
    /// Anything else.
    Other,
}

/// One neighbour of one interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Neighbour {
    /// Interface index.
    pub index: u32,
    /// Address of the neighbour.
    pub ip: IpAddr,
    /// Its link-layer address, if known.
    pub mac: Option<Mac>,
    /// State.
    pub state: NeighbourState,
}

fn ip_of(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(a) => Some((*a).into()),
        NeighbourAddress::Inet6(a) => Some((*a).into()),
        _ => None,
    }
}

fn address_of(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(a) => NeighbourAddress::Inet(a),
        IpAddr::V6(a) => NeighbourAddress::Inet6(a),
    }
}

pub(crate) fn parse_neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(a) => ip = ip_of(a),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Mac::from_slice(bytes),
            _ => {}
        }
    }
    let state = match message.header.state {
        State::Permanent => NeighbourState::Permanent,
        State::Reachable => NeighbourState::Reachable,
        State::Stale => NeighbourState::Stale,
        State::Delay | State::Probe | State::Incomplete => NeighbourState::Probing,
        State::Failed => NeighbourState::Failed,
        _ => NeighbourState::Other,
    };
    Some(Neighbour { index: message.header.ifindex, ip: ip?, mac, state })
}

fn message(index: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(&ip);
    message.header.ifindex = index;
    message.header.kind = RouteType::Unspec;
    message.attributes.push(NeighbourAttribute::Destination(address_of(ip)));
    message
}

impl Netlink {
    /// All IP neighbours, or those of one interface.
    pub async fn neighbours(&self, index: Option<u32>) -> Result<Vec<Neighbour>, Error> {
        // Without a family the kernel lists all of them in one go.
        let mut message = NeighbourMessage::default();
        message.attributes.extend(index.map(NeighbourAttribute::IfIndex));
        let answer = self.dump("list neighbours", RouteNetlinkMessage::GetNeighbour(message)).await?;
        let ip = |m: &&NeighbourMessage| matches!(m.header.family, AddressFamily::Inet | AddressFamily::Inet6);
        let neighbours = answer.iter().filter_map(|m| match m {
            RouteNetlinkMessage::NewNeighbour(n) => Some(n),
            _ => None,
        });
        let mut found: Vec<Neighbour> = neighbours.filter(ip).filter_map(parse_neighbour).collect();
        found.retain(|n| index.is_none_or(|i| i == n.index));
        Ok(found)
    }

    /// Sets a neighbour entry, permanent or just known to be reachable now.
    pub async fn neighbour_replace(&self, index: u32, ip: IpAddr, mac: Mac, permanent: bool) -> Result<(), Error> {
        let mut message = message(index, ip);
        message.header.state = if permanent { State::Permanent } else { State::Reachable };
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        let what = || format!("set neighbour {ip} of interface {index}");
        self.change(what, RouteNetlinkMessage::NewNeighbour(message), REPLACE).await
    }

    /// Forgets a neighbour: the next packet resolves it anew.
    pub async fn neighbour_delete(&self, index: u32, ip: IpAddr) -> Result<(), Error> {
        let what = || format!("delete neighbour {ip} of interface {index}");
        self.change(what, RouteNetlinkMessage::DelNeighbour(message(index, ip)), 0).await
    }

    /// Deletes a learnt entry of a bridge's forwarding table: `mac` behind port `index`.
    pub async fn fdb_delete(&self, index: u32, mac: Mac) -> Result<(), Error> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = index;
        message.header.flags = NeighbourFlags::Controller;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        let what = || format!("delete forwarding entry {mac} of port {index}");
        self.change(what, RouteNetlinkMessage::DelNeighbour(message), 0).await
    }
}
