//! Reads and writes what `plan` speaks of, and tells when something about it changes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::{StreamExt, TryStreamExt};
use ipnet::IpNet;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::link::{LinkFlags, LinkMessage};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteNextHop, RouteNextHopFlags, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, IpVersion, MulticastGroup, RouteMessageBuilder};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::plan::{Actual, Hop, Origin, Route, Rule, Step};
use crate::error::Error;
use crate::gateway::Family;

/// The external interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// It exists.
    pub exists: bool,
    /// It is up and has carrier.
    pub carrier: bool,
}

/// Requests to the kernel of the namespace in which this was made.
#[derive(Clone, Debug)]
pub struct Kernel {
    handle: Handle,
    table: u32,
}

impl Kernel {
    /// Opens the sockets. News about links and about routes of `table` arrive at the receiver; the text says what
    /// changed. The tasks that carry it are in `tasks`.
    pub fn open(table: u32, tasks: &mut JoinSet<()>) -> Result<(Self, mpsc::Receiver<String>), Error> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(Error::NetlinkSocket)?;
        tasks.spawn(connection);
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Ipv4Ifaddr,
        ];
        let (monitor, monitor_handle, messages) =
            rtnetlink::new_multicast_connection(&groups).map_err(Error::NetlinkSocket)?;
        tasks.spawn(monitor);
        // One waiting message is enough: it says "look again", and a look sees everything.
        let (sender, receiver) = mpsc::channel(1);
        tasks.spawn(messages.for_each(move |(message, _)| {
            // The connection ends with its last handle.
            let _alive = &monitor_handle;
            if let Some(news) = news(&message.payload, table) {
                let _ = sender.try_send(news);
            }
            std::future::ready(())
        }));
        Ok((Self { handle, table }, receiver))
    }

    /// State of an interface, by name: its index may change.
    pub async fn link(&self, name: &str) -> Result<Link, Error> {
        match self.link_message(name).await? {
            None => Ok(Link::default()),
            Some(link) => {
                Ok(Link { exists: true, carrier: link.header.flags.contains(LinkFlags::LowerUp | LinkFlags::Up) })
            }
        }
    }

    /// First IPv4 address of an interface, `None` too while the interface is missing.
    pub async fn ipv4_of(&self, name: &str) -> Result<Option<Ipv4Addr>, Error> {
        let Some(link) = self.link_message(name).await? else { return Ok(None) };
        let addresses = self.handle.address().get().set_link_index_filter(link.header.index).execute();
        let fail = |cause| Error::Netlink { object: format!("addresses of {name}"), cause };
        // Read to its end: the kernel refuses another dump while this one goes on.
        let addresses: Vec<_> = addresses.try_collect().await.map_err(fail)?;
        Ok(addresses.into_iter().flat_map(|address| address.attributes).find_map(|attribute| match attribute {
            rtnetlink::packet_route::address::AddressAttribute::Address(IpAddr::V4(ip)) => Some(ip),
            _ => None,
        }))
    }

    async fn link_message(&self, name: &str) -> Result<Option<LinkMessage>, Error> {
        match self.handle.link().get().match_name(name.to_owned()).execute().try_next().await {
            Ok(link) => Ok(link),
            Err(error) if code(&error) == Some(libc_errno::ENODEV) => Ok(None),
            Err(cause) => Err(Error::Netlink { object: format!("interface {name}"), cause }),
        }
    }

    /// Default routes of both tables, and rules that lead to them.
    pub async fn read(&self) -> Result<Actual, Error> {
        let mut actual = Actual::default();
        for family in Family::BOTH {
            let filter = match family {
                Family::V4 => RouteMessageBuilder::<Ipv4Addr>::new().build(),
                Family::V6 => RouteMessageBuilder::<Ipv6Addr>::new().build(),
            };
            let mut routes = self.handle.route().get(filter).execute();
            let fail = |cause| Error::Netlink { object: format!("{family} routes"), cause };
            while let Some(message) = routes.try_next().await.map_err(fail)? {
                actual.routes.extend(route_of(&message, self.table));
            }
            let version = match family {
                Family::V4 => IpVersion::V4,
                Family::V6 => IpVersion::V6,
            };
            let mut rules = self.handle.rule().get(version).execute();
            let fail = |cause| Error::Netlink { object: format!("{family} rules"), cause };
            while let Some(message) = rules.try_next().await.map_err(fail)? {
                actual.rules.extend(rule_of(&message, self.table));
            }
        }
        Ok(actual)
    }

    /// Takes one step. What is already so is no error.
    pub async fn apply(&self, step: &Step) -> Result<(), Error> {
        let done = match step {
            Step::SetRoute(route) => self.handle.route().add(message_of(route)).replace().execute().await,
            Step::DeleteRoute(route) => self.handle.route().del(message_of(route)).execute().await,
            Step::AddRule(rule) => {
                let mut request = self.handle.rule().add();
                *request.message_mut() = rule_message(rule);
                request.execute().await
            }
            Step::DeleteRule(rule) => self.handle.rule().del(rule_message(rule)).execute().await,
        };
        let harmless: &[i32] = match step {
            Step::AddRule(_) => &[libc_errno::EEXIST],
            Step::DeleteRoute(_) | Step::DeleteRule(_) => &[libc_errno::ESRCH, libc_errno::ENOENT],
            Step::SetRoute(_) => &[],
        };
        match done {
            Err(error) if code(&error).is_some_and(|code| harmless.contains(&code)) => Ok(()),
            done => done.map_err(|cause| Error::Netlink { object: format!("{step:?}"), cause }),
        }
    }
}

/// Error numbers of Linux that mean "already so".
mod libc_errno {
    pub(super) const ENOENT: i32 = 2;
    pub(super) const ESRCH: i32 = 3;
    pub(super) const EEXIST: i32 = 17;
    pub(super) const ENODEV: i32 = 19;
}

fn code(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| code.get().abs()),
        _ => None,
    }
}

fn news(payload: &NetlinkPayload<RouteNetlinkMessage>, table: u32) -> Option<String> {
    match payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_)) => {
            Some("link".into())
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)) => {
            let of_table = table_of(route);
            (of_table == table || of_table == table + 1).then(|| "route".into())
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_)) => {
            Some("rule".into())
        }
        // The socket's buffer ran over: whatever was missed is seen by a look.
        NetlinkPayload::Overrun(_) | NetlinkPayload::Error(_) => Some("overrun".into()),
        _ => None,
    }
}

fn table_of(message: &RouteMessage) -> u32 {
    let named = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    named.unwrap_or(u32::from(message.header.table))
}

fn family_of(family: AddressFamily) -> Option<Family> {
    match family {
        AddressFamily::Inet => Some(Family::V4),
        AddressFamily::Inet6 => Some(Family::V6),
        _ => None,
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// A default route of `first` or the table after it.
fn route_of(message: &RouteMessage, first: u32) -> Option<Route> {
    let family = family_of(message.header.address_family)?;
    let table = table_of(message);
    if message.header.destination_prefix_length != 0 || !(first..=first + 1).contains(&table) {
        return None;
    }
    let blackhole = match message.header.kind {
        RouteType::Unicast => false,
        RouteType::BlackHole => true,
        _ => return None,
    };
    let onlink = message.header.flags.contains(rtnetlink::packet_route::route::RouteFlags::Onlink);
    let mut route = Route { family, table, metric: 0, origin: origin_of(message.header.protocol), hops: vec![] };
    let mut single = Hop { gateway: None, interface: 0, onlink, weight: 0 };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Gateway(gateway) => single.gateway = ip_of(gateway),
            RouteAttribute::Oif(interface) => single.interface = *interface,
            RouteAttribute::MultiPath(hops) => route.hops = hops.iter().map(hop_of).collect(),
            _ => {}
        }
    }
    if route.hops.is_empty() && !blackhole {
        route.hops.push(single);
    }
    if blackhole {
        // IPv6 shows a blackhole as a route through lo.
        route.hops.clear();
    }
    Some(route)
}

fn origin_of(protocol: RouteProtocol) -> Origin {
    match protocol {
        RouteProtocol::Bird => Origin::Bird,
        RouteProtocol::Static => Origin::Own,
        _ => Origin::Other,
    }
}

fn hop_of(hop: &RouteNextHop) -> Hop {
    let gateway = hop.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(gateway) => ip_of(gateway),
        _ => None,
    });
    let onlink = hop.flags.contains(RouteNextHopFlags::Onlink);
    Hop { gateway, interface: hop.interface_index, onlink, weight: hop.hops }
}

fn next_hop(hop: &Hop) -> RouteNextHop {
    let mut next_hop = RouteNextHop::default();
    next_hop.interface_index = hop.interface;
    next_hop.hops = hop.weight;
    if hop.onlink {
        next_hop.flags |= RouteNextHopFlags::Onlink;
    }
    next_hop.attributes.extend(hop.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
    next_hop
}

fn message_of(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = match route.family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Universe;
    message.header.kind = if route.hops.is_empty() { RouteType::BlackHole } else { RouteType::Unicast };
    message.attributes.push(RouteAttribute::Table(route.table));
    message.attributes.push(RouteAttribute::Priority(route.metric));
    match route.hops.as_slice() {
        [] => {}
        [hop] => {
            message.attributes.extend(hop.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
            message.attributes.push(RouteAttribute::Oif(hop.interface));
            if hop.onlink {
                message.header.flags |= rtnetlink::packet_route::route::RouteFlags::Onlink;
            }
        }
        hops => message.attributes.push(RouteAttribute::MultiPath(hops.iter().map(next_hop).collect())),
    }
    message
}

fn rule_of(message: &RuleMessage, first: u32) -> Option<Rule> {
    family_of(message.header.family)?;
    let (mut source, mut priority, mut table) = (None, 0, u32::from(message.header.table));
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(ip) => source = Some(*ip),
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Table(value) => table = *value,
            _ => {}
        }
    }
    if !(first..=first + 1).contains(&table) {
        return None;
    }
    let source = IpNet::new(source?, message.header.src_len).ok()?;
    Some(Rule { source, priority, table })
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if rule.source.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.action = RuleAction::ToTable;
    message.header.src_len = rule.source.prefix_len();
    message.attributes.push(RuleAttribute::Source(rule.source.addr()));
    message.attributes.push(RuleAttribute::Priority(rule.priority));
    message.attributes.push(RuleAttribute::Table(rule.table));
    message
}
