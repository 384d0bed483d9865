//! Sets what the connection context says on the interfaces of a connection.
//!
//! Both elements work after `next`, when the answer holds the final context and the wire below has made the link. A refresh with
//! equal content writes nothing. A failure closes what `next` has made.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use nsm_chain::{
    CloseCall, Connection, ConnectionContext, Element, Error, IpContext, Key, Mechanism, Next, PolicyRoute,
    RequestCall, Route, Side, unwind,
};

use super::{Open, configurable, failed, interface_name, netns_of};
use crate::config::{self, InterfaceConfig, InterfaceNeighbour, InterfaceRoute, Policy};
use crate::netlink::PortRange;
use crate::{Netns, sysctl};

/// Payload of connections that carry IP and nothing else.
const PAYLOAD_IP: &str = "IP";

/// Key of a connection's extra context: a client that sets it to "true" wants that nothing which comes from the source of one of its
/// policy routes leaves its namespace by another way: also after the connection is gone, for as long as the namespace is there. For
/// namespaces that end with their only use, as a pod's do.
pub const GUARD_POLICIES: &str = "guardPolicies";

/// Configures the client's namespace: source addresses, routes to the destination, policy routes, neighbours, MTU.
#[derive(Debug)]
pub struct ServerContext(Key<bool>);

/// Configures the endpoint's namespace: destination addresses, routes to the source, neighbours, MTU.
#[derive(Debug)]
pub struct ClientContext(Key<bool>);

impl Default for ServerContext {
    fn default() -> Self {
        ServerContext(Key::new(Side::Server))
    }
}

impl Default for ClientContext {
    fn default() -> Self {
        ClientContext(Key::new(Side::Client))
    }
}

impl ServerContext {
    /// An element without connections.
    pub fn new() -> Self {
        Self::default()
    }
}

impl ClientContext {
    /// An element without connections.
    pub fn new() -> Self {
        Self::default()
    }
}

/// Addresses in CIDR form; a bare address is a host. What cannot be parsed is dropped, as everywhere in NSM.
fn nets(list: &[String]) -> Vec<IpNet> {
    let parse = |s: &String| s.parse().ok().or_else(|| s.parse::<IpAddr>().ok().map(IpNet::from));
    list.iter().filter_map(parse).collect()
}

/// One link route per address of the other side that is in none of our own networks.
fn link_routes(own: &[IpNet], other: &[IpNet]) -> Vec<InterfaceRoute> {
    let outside = other.iter().filter(|o| !own.iter().any(|n| n.contains(&o.addr())));
    outside.map(|o| InterfaceRoute { destination: o.trunc(), gateway: None }).collect()
}

/// Routes with their next hop. Without an explicit one it is the first address of the other side in the family, unless a network of
/// the other side holds the destination: then it is on the link. One of the other IP version is an error: the kernel's would name
/// neither.
fn gateway_routes(routes: &[Route], other: &[IpNet]) -> Result<Vec<InterfaceRoute>, crate::Error> {
    let with_hop = |route: &Route| {
        let destination = route.prefix.parse::<IpNet>().ok()?.trunc();
        let v6 = matches!(destination, IpNet::V6(_));
        let family: Vec<&IpNet> = other.iter().filter(|n| n.addr().is_ipv6() == v6).collect();
        let on_link = family.iter().any(|n| n.contains(&destination.addr()));
        let gateway = match route.next_hop.parse::<IpAddr>().ok() {
            Some(gateway) if gateway.is_ipv6() != v6 => {
                let text = format!("route {destination}: next hop {gateway} is of another IP version");
                return Some(Err(crate::Error::Invalid(text)));
            }
            Some(gateway) => Some(gateway),
            None if on_link => None,
            None => family.first().map(|n| n.addr()),
        };
        Some(Ok(InterfaceRoute { destination, gateway }))
    };
    let mut routes = routes.iter().filter_map(with_hop).collect::<Result<Vec<_>, _>>()?;
    routes.dedup();
    Ok(routes)
}

fn ports(text: &str) -> Result<Option<PortRange>, crate::Error> {
    let bad = || crate::Error::Invalid(format!("policy route: {text:?} is no port or range of ports"));
    let port = |s: &str| s.parse::<u16>().map_err(|_| bad());
    match text.split_once('-') {
        _ if text.is_empty() => Ok(None),
        None => port(text).map(|p| Some(PortRange { start: p, end: p })),
        Some((start, end)) => {
            let (start, end) = (port(start)?, port(end)?);
            if start <= end { Ok(Some(PortRange { start, end })) } else { Err(bad()) }
        }
    }
}

fn protocol(text: &str) -> Result<Option<u8>, crate::Error> {
    match text.to_ascii_lowercase().as_str() {
        "" => Ok(None),
        "icmp" => Ok(Some(1)),
        "tcp" => Ok(Some(6)),
        "udp" => Ok(Some(17)),
        "icmpv6" | "ipv6-icmp" => Ok(Some(58)),
        "sctp" => Ok(Some(132)),
        number => {
            let bad = |_| crate::Error::Invalid(format!("policy route: unknown protocol {text:?}"));
            number.parse().map(Some).map_err(bad)
        }
    }
}

/// A policy that names no routes takes everything of its source's IP version to the link.
fn policy(policy: &PolicyRoute) -> Result<Policy, crate::Error> {
    let bad = || crate::Error::Invalid(format!("policy route: source {:?} is no prefix", policy.from));
    let from = nets(std::slice::from_ref(&policy.from)).first().copied().ok_or_else(bad)?.trunc();
    let mut routes = gateway_routes(&policy.routes, &[])?;
    if policy.routes.is_empty() {
        let any = if from.addr().is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let destination = IpNet::new(any, 0).map_err(|_| bad())?;
        routes.push(InterfaceRoute { destination, gateway: None });
    }
    Ok(Policy {
        from,
        protocol: protocol(&policy.proto)?,
        sport: ports(&policy.src_port)?,
        dport: ports(&policy.dst_port)?,
        routes,
    })
}

fn neighbours(ip: &IpContext) -> Vec<InterfaceNeighbour> {
    let parse = |n: &nsm_proto::connectioncontext::IpNeighbor| {
        Some(InterfaceNeighbour { ip: n.ip.parse().ok()?, mac: n.hardware_address.parse().ok()?, permanent: false })
    };
    ip.ip_neighbors.iter().filter_map(parse).collect()
}

/// What a connection context wants on one side of the connection.
pub fn desired(context: &ConnectionContext, side: Side) -> Result<InterfaceConfig, crate::Error> {
    let default = IpContext::default();
    let ip = context.ip_context.as_ref().unwrap_or(&default);
    let (source, destination) = (nets(&ip.src_ip_addrs), nets(&ip.dst_ip_addrs));
    let (own, other, explicit) = match side {
        Side::Server => (source, destination, &ip.src_routes),
        Side::Client => (destination, source, &ip.dst_routes),
    };
    let mut routes = link_routes(&own, &other);
    for route in gateway_routes(explicit, &other)? {
        if !routes.iter().any(|r| r.destination == route.destination) {
            routes.push(route);
        }
    }
    let policies = match side {
        Side::Server => Some(ip.policies.iter().map(policy).collect::<Result<_, _>>()?),
        Side::Client => None,
    };
    Ok(InterfaceConfig {
        mtu: Some(context.mtu).filter(|m| *m > 0),
        addresses: Some(own).filter(|a| !a.is_empty()),
        routes,
        policies,
        guarded: context.extra_context.get(GUARD_POLICIES).is_some_and(|value| value == "true"),
        neighbours: neighbours(ip),
    })
}

/// Where only IP is carried nobody has to ask for the other side's link-layer address: it is that of the other end of the link.
/// What is at the other end of a tunnel is not known here, and is asked for.
async fn opposite(
    netns: &Netns,
    interface: &str,
    addresses: &[IpNet],
) -> Result<Vec<InterfaceNeighbour>, crate::Error> {
    let netlink = netns.netlink().await?;
    let link = netlink.link_by_name(interface).await?;
    let Some((peer, nsid)) = link.and_then(|link| link.peer.zip(link.peer_nsid)) else { return Ok(Vec::new()) };
    let Some(mac) = netlink.link_in(nsid, peer).await?.and_then(|peer| peer.mac) else { return Ok(Vec::new()) };
    Ok(addresses.iter().map(|net| InterfaceNeighbour { ip: net.addr(), mac, permanent: true }).collect())
}

async fn configure(
    mechanism: &Mechanism,
    connection: &Connection,
    side: Side,
    first: bool,
) -> Result<(), crate::Error> {
    let netns = netns_of(mechanism)?;
    let context = connection.context.clone().unwrap_or_default();
    let mut wanted = desired(&context, side)?;
    if connection.payload == PAYLOAD_IP {
        let ip = context.ip_context.unwrap_or_default();
        let others = nets(if side == Side::Server { &ip.dst_ip_addrs } else { &ip.src_ip_addrs });
        let opposite = opposite(&netns, interface_name(mechanism), &others).await?;
        let named: Vec<IpAddr> = wanted.neighbours.iter().map(|neighbour| neighbour.ip).collect();
        wanted.neighbours.extend(opposite.into_iter().filter(|neighbour| !named.contains(&neighbour.ip)));
    }
    let written = config::apply(&netns, interface_name(mechanism), &wanted).await?;
    if written > 0 {
        tracing::debug!(?netns, interface = interface_name(mechanism), changes = written, "interface configured");
    }
    // A convenience for liveness checks without privileges; whoever has them does not need it.
    if first && let Err(error) = sysctl::allow_ping(&netns).await {
        tracing::debug!(?netns, %error, "ping group range left as it is");
    }
    Ok(())
}

async fn request(name: &'static str, key: &Key<bool>, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
    let (postponed, id) = (call.ctx.postpone(), call.id().to_owned());
    // Until this operation is done, the namespaces that the elements below work in stay open.
    let open = match call.ctx.extension::<Open>() {
        Some(open) => open,
        None => {
            call.ctx.insert_extension(Open::default());
            call.ctx.extension::<Open>().unwrap_or_default()
        }
    };
    let metadata = call.ctx.metadata(name, &id)?.clone();
    let connection = next.request(call).await?;
    let Some(mechanism) = configurable(connection.mechanism.as_ref()) else { return Ok(connection) };
    let configured = configure(mechanism, &connection, key.side(), !metadata.contains(key)).await;
    drop(open);
    match configured {
        Ok(()) => {
            metadata.insert(key, true);
            Ok(connection)
        }
        Err(cause) => {
            let what = format!("interface {} cannot be configured", interface_name(mechanism));
            let error = failed(name, id, what, cause);
            // A refresh that fails leaves what works alone.
            if metadata.contains(key) {
                return Err(error);
            }
            Err(unwind(&next, connection, &postponed, error).await)
        }
    }
}

#[async_trait::async_trait]
impl Element for ServerContext {
    fn name(&self) -> &'static str {
        "connectioncontextkernel-server"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        request(self.name(), &self.0, call, next).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        // Addresses and routes go with the link; rules are found by the routes of their tables, so they have to go first.
        if let Some(mechanism) = configurable(call.message.mechanism.as_ref())
            && let Ok(netns) = netns_of(mechanism)
            && let Err(error) = config::clear_policies(&netns, interface_name(mechanism)).await
        {
            tracing::warn!(connection = call.id(), %error, "policy rules left behind");
        }
        next.close(call).await
    }
}

#[async_trait::async_trait]
impl Element for ClientContext {
    fn name(&self) -> &'static str {
        "connectioncontextkernel-client"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        request(self.name(), &self.0, call, next).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(prefix: &str, next_hop: &str) -> Route {
        Route { prefix: prefix.into(), next_hop: next_hop.into() }
    }

    #[test]
    fn routes_follow_the_rules_of_the_specification() {
        let own = nets(&["172.16.1.6/24".into(), "bad".into()]);
        let other = nets(&["172.16.1.5/24".into(), "10.0.0.1/32".into(), "fd00::1/64".into()]);
        let links: Vec<String> = link_routes(&own, &other).iter().map(|r| r.destination.to_string()).collect();
        assert_eq!(links, ["10.0.0.1/32", "fd00::/64"]);
        let routes = [
            route("20.0.0.0/8", ""),
            route("172.16.1.0/24", ""),
            route("0.0.0.0/0", "1.2.3.4"),
            route("::/0", ""),
            route("x", ""),
        ];
        let hops: Vec<_> =
            gateway_routes(&routes, &other).unwrap().into_iter().map(|r| r.gateway.map(|g| g.to_string())).collect();
        let some = |s: &str| Some(s.to_string());
        assert_eq!(hops, [some("172.16.1.5"), None, some("1.2.3.4"), some("fd00::1")]);
        for (prefix, hop) in [("20.0.0.0/8", "fd00::1"), ("2000::/64", "1.2.3.4")] {
            let error = gateway_routes(&[route("10.0.0.0/8", ""), route(prefix, hop)], &other).unwrap_err();
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
            let text = error.to_string();
            assert!(text.contains(&format!("route {prefix}: next hop {hop}")), "{text}");
        }
    }

    #[test]
    fn a_policy_without_routes_takes_everything() {
        let all = |from: &str| {
            let routes = policy(&PolicyRoute { from: from.into(), ..Default::default() }).unwrap().routes;
            routes.iter().map(|route| (route.destination.to_string(), route.gateway)).collect::<Vec<_>>()
        };
        assert_eq!(all("20.0.0.1/32"), [("0.0.0.0/0".to_owned(), None)]);
        assert_eq!(all("2000::1/128"), [("::/0".to_owned(), None)]);
        let none = PolicyRoute { from: "20.0.0.1".into(), routes: vec![route("x", "")], ..Default::default() };
        assert!(policy(&none).unwrap().routes.is_empty(), "only where none were asked for");
    }

    #[test]
    fn guards_are_set_for_a_client_that_asks() {
        let context = |value: &str| ConnectionContext {
            extra_context: [(GUARD_POLICIES.to_owned(), value.to_owned())].into(),
            ..Default::default()
        };
        assert!(desired(&context("true"), Side::Server).unwrap().guarded);
        assert!(!desired(&context("false"), Side::Server).unwrap().guarded);
        assert!(!desired(&ConnectionContext::default(), Side::Server).unwrap().guarded);
    }

    #[test]
    fn ports_and_protocols() {
        assert_eq!(ports("").unwrap(), None);
        assert_eq!(ports("80").unwrap(), Some(PortRange { start: 80, end: 80 }));
        assert_eq!(ports("80-90").unwrap(), Some(PortRange { start: 80, end: 90 }));
        assert!(ports("90-80").is_err() && ports("a").is_err() && ports("1-2-3").is_err() && ports("70000").is_err());
        assert_eq!(protocol("TCP").unwrap(), Some(6));
        assert!(protocol("nope").is_err());
    }
}
