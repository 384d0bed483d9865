//! Addresses of interfaces.

use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Netlink, REPLACE};
use crate::Error;

/// One address of one interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// Interface index.
    pub index: u32,
    /// Address with its prefix length (host bits kept).
    pub net: IpNet,
    /// False for link-local and host scope.
    pub global: bool,
    /// True while duplicate address detection has not finished.
    pub tentative: bool,
    /// When the interface got it, in hundredths of a second since the start of the machine.
    pub since: u32,
}

pub(crate) fn family(ip: &IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn message(index: u32, net: &IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(&net.addr());
    message.header.prefix_len = net.prefix_len();
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(net.addr()));
    message.attributes.push(AddressAttribute::Address(net.addr()));
    message
}

fn parse(message: &AddressMessage) -> Option<Address> {
    let (mut ip, mut since) = (None, 0);
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            // IFA_LOCAL is the address itself, IFA_ADDRESS is the peer's on point-to-point links.
            AddressAttribute::Local(a) => ip = Some(*a),
            AddressAttribute::Address(a) if ip.is_none() => ip = Some(*a),
            AddressAttribute::Flags(f) => flags = *f,
            AddressAttribute::CacheInfo(times) => since = times.cstamp,
            _ => {}
        }
    }
    Some(Address {
        index: message.header.index,
        net: IpNet::new(ip?, message.header.prefix_len).ok()?,
        global: message.header.scope == AddressScope::Universe,
        tentative: flags.contains(AddressFlags::Tentative),
        since,
    })
}

impl Netlink {
    /// All addresses, or those of one interface.
    pub async fn addresses(&self, index: Option<u32>) -> Result<Vec<Address>, Error> {
        let mut message = AddressMessage::default();
        message.header.index = index.unwrap_or(0);
        let found = self.dump("list addresses", RouteNetlinkMessage::GetAddress(message)).await?;
        let addresses = found.iter().filter_map(|m| match m {
            RouteNetlinkMessage::NewAddress(a) => parse(a),
            _ => None,
        });
        Ok(addresses.filter(|a| index.is_none_or(|i| i == a.index)).collect())
    }

    /// Adds an address, usable at once (no duplicate detection), with its connected route. An equal one is left as it is.
    pub async fn address_replace(&self, index: u32, net: IpNet) -> Result<(), Error> {
        let mut message = message(index, &net);
        let mut flags = AddressFlags::Permanent;
        if matches!(net, IpNet::V6(_)) {
            flags |= AddressFlags::Nodad;
            message.header.flags = AddressHeaderFlags::Nodad;
        }
        message.header.flags |= AddressHeaderFlags::Permanent;
        message.attributes.push(AddressAttribute::Flags(flags));
        if let IpNet::V4(v4) = net
            && v4.prefix_len() < 31
        {
            message.attributes.push(AddressAttribute::Broadcast(v4.broadcast()));
        }
        let what = || format!("add address {net} to interface {index}");
        self.change(what, RouteNetlinkMessage::NewAddress(message), REPLACE).await
    }

    /// Deletes an address.
    pub async fn address_delete(&self, index: u32, net: IpNet) -> Result<(), Error> {
        let what = || format!("delete address {net} of interface {index}");
        self.change(what, RouteNetlinkMessage::DelAddress(message(index, &net)), 0).await
    }
}
