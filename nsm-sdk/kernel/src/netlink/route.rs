//! Routes.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHop, RouteNextHopFlags, RouteProtocol, RouteScope,
    RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::family;
use super::rule::any;
use super::{Netlink, REPLACE};
use crate::Error;

/// The main table.
pub const TABLE_MAIN: u32 = 254;
/// Protocol number of routes set by an administrator (`RTPROT_STATIC`): ours.
pub(crate) const PROTOCOL_STATIC: u8 = 4;
/// The kernel stores IPv6 routes without a metric with this one.
const V6_METRIC: u32 = 1024;

/// What happens to a packet that matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteKind {
    /// It goes to a next hop.
    Unicast,
    /// It is dropped silently.
    Blackhole,
    /// Local, broadcast, multicast and other kinds: read, never written.
    Other,
}

/// Where a packet goes next.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NextHop {
    /// Neighbour to send to; none: the destination itself, on the link.
    pub gateway: Option<IpAddr>,
    /// Interface index.
    pub oif: Option<u32>,
    /// Believe that the gateway is on the link, whatever the connected routes say.
    pub onlink: bool,
}

/// One route of one table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Table number.
    pub table: u32,
    /// Destination prefix.
    pub destination: IpNet,
    /// Metric; 0 is the family's default.
    pub metric: u32,
    /// What happens.
    pub kind: RouteKind,
    /// Next hops, sorted; several are used by hash of the flow.
    pub hops: Vec<NextHop>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// Scope "link" (IPv4): the destination is on the link.
    pub link_scope: bool,
    /// Who set it (`RTPROT_*`); 4 is static.
    pub protocol: u8,
}

impl Route {
    /// A static unicast route without next hops yet.
    pub fn new(destination: IpNet, table: u32) -> Self {
        Route {
            table,
            destination: destination.trunc(),
            metric: 0,
            kind: RouteKind::Unicast,
            hops: Vec::new(),
            source: None,
            link_scope: false,
            protocol: PROTOCOL_STATIC,
        }
    }

    /// Default route of a family.
    pub fn default_of(v6: bool, table: u32) -> Self {
        Self::new(any(v6), table)
    }

    /// Drops what matches.
    pub fn blackhole(destination: IpNet, table: u32, metric: u32) -> Self {
        Route { kind: RouteKind::Blackhole, metric, ..Self::new(destination, table) }
    }

    /// Adds a next hop.
    pub fn via(mut self, gateway: Option<IpAddr>, oif: u32, onlink: bool) -> Self {
        self.hops.push(NextHop { gateway, oif: Some(oif), onlink });
        self
    }

    /// True for IPv6.
    pub fn is_v6(&self) -> bool {
        matches!(self.destination, IpNet::V6(_))
    }

    /// What identifies the route within its namespace: a replace with an equal key replaces.
    pub fn key(&self) -> (u32, IpNet, u32) {
        (self.table, self.destination, self.effective_metric())
    }

    fn effective_metric(&self) -> u32 {
        if self.is_v6() && self.metric == 0 { V6_METRIC } else { self.metric }
    }

    /// True if `existing`, as read back, is this route. Flags that the kernel drops (IPv6 has no scope and forgets ONLINK in some
    /// versions) do not count.
    pub fn same(&self, existing: &Route) -> bool {
        let hops = |r: &Route| {
            let mut hops: Vec<_> = r.hops.iter().map(|h| (h.gateway, h.oif)).collect();
            hops.sort();
            hops
        };
        let unicast = self.kind == RouteKind::Unicast;
        self.key() == existing.key()
            && self.kind == existing.kind
            && self.source == existing.source
            && (!unicast || hops(self) == hops(existing))
            && (self.is_v6() || !unicast || self.link_scope == existing.link_scope)
    }

    /// True if every next hop leaves by interface `index`.
    pub fn only_via(&self, index: u32) -> bool {
        !self.hops.is_empty() && self.hops.iter().all(|h| h.oif == Some(index))
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.kind == RouteKind::Blackhole {
            write!(f, "blackhole ")?;
        }
        write!(f, "{}", self.destination)?;
        for hop in &self.hops {
            if let Some(gateway) = hop.gateway {
                write!(f, " via {gateway}")?;
            }
            if let Some(oif) = hop.oif {
                write!(f, " dev {oif}")?;
            }
        }
        write!(f, " table {}", self.table)
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(a) => Some((*a).into()),
        RouteAddress::Inet6(a) => Some((*a).into()),
        _ => None,
    }
}

fn hop_of(hop: &RouteNextHop) -> NextHop {
    let gateway = hop.attributes.iter().find_map(|a| match a {
        RouteAttribute::Gateway(a) => ip_of(a),
        _ => None,
    });
    NextHop {
        gateway,
        oif: Some(hop.interface_index).filter(|i| *i != 0),
        onlink: hop.flags.contains(RouteNextHopFlags::Onlink),
    }
}

pub(crate) fn parse_route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    let v6 = match header.address_family {
        AddressFamily::Inet => false,
        AddressFamily::Inet6 => true,
        _ => return None,
    };
    let mut route = Route::default_of(v6, u32::from(header.table));
    route.protocol = header.protocol.into();
    route.link_scope = header.scope == RouteScope::Link && !v6;
    route.kind = match header.kind {
        RouteType::Unicast => RouteKind::Unicast,
        RouteType::BlackHole => RouteKind::Blackhole,
        _ => RouteKind::Other,
    };
    let (mut gateway, mut oif, mut hops) = (None, None, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(a) => {
                route.destination = IpNet::new(ip_of(a)?, header.destination_prefix_length).ok()?;
            }
            RouteAttribute::Table(t) => route.table = *t,
            RouteAttribute::Priority(p) => route.metric = *p,
            RouteAttribute::PrefSource(a) => route.source = ip_of(a),
            RouteAttribute::Gateway(a) => gateway = ip_of(a),
            RouteAttribute::Oif(i) => oif = Some(*i),
            RouteAttribute::MultiPath(list) => hops = list.iter().map(hop_of).collect(),
            _ => {}
        }
    }
    if hops.is_empty() && route.kind == RouteKind::Unicast && (gateway.is_some() || oif.is_some()) {
        hops.push(NextHop { gateway, oif, onlink: header.flags.contains(RouteFlags::Onlink) });
    }
    hops.sort();
    route.hops = hops;
    Some(route)
}

fn message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(&route.destination.addr());
    header.destination_prefix_length = route.destination.prefix_len();
    header.table = u8::try_from(route.table).unwrap_or(0);
    header.protocol = RouteProtocol::from(route.protocol);
    header.scope = if route.link_scope { RouteScope::Link } else { RouteScope::Universe };
    header.kind = if route.kind == RouteKind::Blackhole { RouteType::BlackHole } else { RouteType::Unicast };
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Table(route.table));
    attributes.push(RouteAttribute::Destination(RouteAddress::from(route.destination.network())));
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    if let Some(source) = route.source {
        attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    match route.hops.as_slice() {
        [] => {}
        [hop] => {
            if hop.onlink && hop.gateway.is_some() {
                header.flags = RouteFlags::Onlink;
            }
            attributes.extend(hop.gateway.map(|g| RouteAttribute::Gateway(g.into())));
            attributes.extend(hop.oif.map(RouteAttribute::Oif));
        }
        hops => attributes.push(RouteAttribute::MultiPath(hops.iter().map(hop_message).collect())),
    }
    message
}

fn hop_message(hop: &NextHop) -> RouteNextHop {
    let mut message = RouteNextHop::default();
    message.interface_index = hop.oif.unwrap_or(0);
    if hop.onlink {
        message.flags = RouteNextHopFlags::Onlink;
    }
    message.attributes.extend(hop.gateway.map(|g| RouteAttribute::Gateway(g.into())));
    message
}

impl Netlink {
    /// All routes of both families, or those of one table. A table that does not exist is empty.
    pub async fn routes(&self, table: Option<u32>) -> Result<Vec<Route>, Error> {
        self.routes_like(table, None).await
    }

    /// The routes of one table that leave by one interface. The kernel selects them: cheap among thousands of others.
    pub async fn routes_over(&self, table: u32, index: u32) -> Result<Vec<Route>, Error> {
        self.routes_like(Some(table), Some(index)).await
    }

    async fn routes_like(&self, table: Option<u32>, index: Option<u32>) -> Result<Vec<Route>, Error> {
        // Without a family the kernel lists all of them in one go.
        let mut message = RouteMessage::default();
        message.attributes.extend(table.map(RouteAttribute::Table));
        message.attributes.extend(index.map(RouteAttribute::Oif));
        let answer = match self.dump("list routes", RouteNetlinkMessage::GetRoute(message)).await {
            Err(e) if e.is_missing() => return Ok(Vec::new()),
            answer => answer?,
        };
        let ip = |m: &&RouteMessage| matches!(m.header.address_family, AddressFamily::Inet | AddressFamily::Inet6);
        let routes = answer.iter().filter_map(|m| match m {
            RouteNetlinkMessage::NewRoute(r) => Some(r),
            _ => None,
        });
        let mut found: Vec<Route> = routes.filter(ip).filter_map(parse_route).collect();
        found.retain(|r| table.is_none_or(|t| t == r.table));
        Ok(found)
    }

    /// Adds a route, or replaces the one with the same table, destination and metric in one step.
    pub async fn route_replace(&self, route: &Route) -> Result<(), Error> {
        let what = || format!("set route {route}");
        self.change(what, RouteNetlinkMessage::NewRoute(message(route)), REPLACE).await
    }

    /// Deletes a route (by table, destination, metric and next hops).
    pub async fn route_delete(&self, route: &Route) -> Result<(), Error> {
        let what = || format!("delete route {route}");
        let mut message = message(route);
        // Otherwise the scope has to be equal too, and is not known for every route.
        message.header.scope = RouteScope::NoWhere;
        self.change(what, RouteNetlinkMessage::DelRoute(message), 0).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_and_parse_agree() {
        for (destination, gateways) in [
            ("10.0.0.0/8", vec!["10.1.0.1"]),
            ("0.0.0.0/0", vec!["10.1.0.1", "10.1.0.2"]),
            ("::/0", vec!["fd00::1", "fd00::2"]),
        ] {
            let mut route = Route::new(destination.parse().unwrap(), 4096);
            for gateway in gateways {
                route = route.via(Some(gateway.parse().unwrap()), 3, true);
            }
            assert_eq!(parse_route(&message(&route)), Some(route.clone()));
            assert!(route.same(&route));
        }
    }

    #[test]
    fn metric_of_v6_is_normalised() {
        let wanted = Route::default_of(true, 1).via(Some("fd00::1".parse().unwrap()), 2, false);
        let read = Route { metric: 1024, ..wanted.clone() };
        assert!(wanted.same(&read));
        assert!(!wanted.same(&Route { metric: 9, ..wanted.clone() }));
    }
}
