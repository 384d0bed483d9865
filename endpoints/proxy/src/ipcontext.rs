//! Addresses of a connection between a target and this proxy.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use meridio_proto::nsm::connectioncontext::IpContext;
use nsm_chain::Connection;
use nsm_chain::elements::kernel_mechanism::NAME;

/// What the IPAM gave for one connection, one entry per family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Allocation {
    /// The target's addresses.
    pub(crate) source: Vec<IpNet>,
    /// This proxy's addresses.
    pub(crate) destination: Vec<IpNet>,
}

/// Writes the addresses of `allocation` and the gateways `bridge` into a request's IP context.
///
/// A first request gets them as they are. A request that already has them is left alone: it also carries the VIPs and policy routes
/// that the target added. A request with addresses of another proxy or subnet gets them exchanged, and the gateways of its policy
/// routes with them; everything else that the target put there stays.
pub(crate) fn apply(context: &mut IpContext, allocation: &Allocation, bridge: &[IpNet]) {
    let source = texts(&allocation.source);
    let destination = texts(&allocation.destination);
    let gateways = texts(bridge);
    if context.src_ip_addrs.is_empty() && context.dst_ip_addrs.is_empty() {
        context.src_ip_addrs = source;
        context.dst_ip_addrs = destination;
        context.extra_prefixes = gateways;
        return;
    }
    let settled = contains_all(&context.src_ip_addrs, &source)
        && contains_all(&context.dst_ip_addrs, &destination)
        && contains_all(&context.extra_prefixes, &gateways);
    if settled {
        return;
    }
    let old: Vec<IpNet> =
        context.extra_prefixes.iter().filter_map(|text| text.parse().ok()).map(|net: IpNet| net.trunc()).collect();
    let outdated = |text: &String| address(text).is_some_and(|ip| old.iter().any(|net| net.contains(&ip)));
    for (list, new) in [(&mut context.src_ip_addrs, source), (&mut context.dst_ip_addrs, destination)] {
        list.retain(|text| !outdated(text) && !new.contains(text));
        list.splice(0..0, new);
    }
    context.extra_prefixes = gateways;
    for route in context.policies.iter_mut().flat_map(|policy| &mut policy.routes) {
        let Ok(hop) = route.next_hop.parse::<IpAddr>() else { continue };
        if let Some(gateway) = bridge.iter().find(|net| net.addr().is_ipv4() == hop.is_ipv4()) {
            route.next_hop = gateway.addr().to_string();
        }
    }
}

fn contains_all(list: &[String], wanted: &[String]) -> bool {
    wanted.iter().all(|text| list.contains(text))
}

fn texts(nets: &[IpNet]) -> Vec<String> {
    nets.iter().map(IpNet::to_string).collect()
}

/// The address in `addr/len` or `addr`.
pub(crate) fn address(text: &str) -> Option<IpAddr> {
    text.split('/').next()?.parse().ok()
}

/// Those in `list` that are addresses.
pub(crate) fn addresses(list: &[String]) -> BTreeSet<IpAddr> {
    list.iter().filter_map(|text| address(text)).collect()
}

/// This proxy's interface of a connection.
pub(crate) fn interface(connection: &Connection) -> Option<&str> {
    connection.mechanism.as_ref()?.parameters.get(NAME).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use meridio_proto::nsm::connectioncontext::{PolicyRoute, Route};

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn node(last: u8) -> (Allocation, Vec<IpNet>) {
        let net = |host: u8| nets(&[&format!("172.16.{last}.{host}/24"), &format!("fd00:0:0:{last}::{host}/64")]);
        (Allocation { source: net(6), destination: net(7) }, net(1))
    }

    fn policies(gateway: &str) -> Vec<PolicyRoute> {
        let routes = vec![Route { prefix: "0.0.0.0/0".into(), next_hop: gateway.into() }];
        vec![PolicyRoute { from: "20.0.0.1/32".into(), routes, ..PolicyRoute::default() }]
    }

    #[test]
    fn a_first_request_gets_all() {
        let (allocation, bridge) = node(1);
        let mut context = IpContext::default();
        apply(&mut context, &allocation, &bridge);
        assert_eq!(context.src_ip_addrs, ["172.16.1.6/24", "fd00:0:0:1::6/64"]);
        assert_eq!(context.dst_ip_addrs, ["172.16.1.7/24", "fd00:0:0:1::7/64"]);
        assert_eq!(context.extra_prefixes, ["172.16.1.1/24", "fd00:0:0:1::1/64"]);
    }

    #[test]
    fn vips_and_policies_of_the_target_stay() {
        let (allocation, bridge) = node(1);
        let mut context = IpContext::default();
        apply(&mut context, &allocation, &bridge);
        context.src_ip_addrs.push("20.0.0.1/32".into());
        context.policies = policies("172.16.1.1");
        let before = context.clone();
        apply(&mut context, &allocation, &bridge);
        assert_eq!(context, before);
    }

    #[test]
    fn another_subnet_exchanges_addresses_and_gateways_only() {
        let (allocation, bridge) = node(1);
        let mut context = IpContext::default();
        apply(&mut context, &allocation, &bridge);
        context.src_ip_addrs.push("20.0.0.1/32".into());
        context.policies = policies("172.16.1.1");
        let (allocation, bridge) = node(2);
        apply(&mut context, &allocation, &bridge);
        assert_eq!(context.src_ip_addrs, ["172.16.2.6/24", "fd00:0:0:2::6/64", "20.0.0.1/32"]);
        assert_eq!(context.dst_ip_addrs, ["172.16.2.7/24", "fd00:0:0:2::7/64"]);
        assert_eq!(context.policies, policies("172.16.2.1"));
    }
}
