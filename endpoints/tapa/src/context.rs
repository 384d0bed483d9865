//! Addresses and policy routes of a target's interface: pure functions of the connection and the VIPs.

use ipnet::IpNet;
use nsm_chain::{IpContext, PolicyRoute, Route};
use std::{collections::BTreeSet, net::IpAddr};

/// A VIP or address with or without prefix length.
pub(crate) fn parse_net(text: &str) -> Option<IpNet> {
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// The bridge's addresses, with the prefix length of the node's subnet.
fn bridges(context: &IpContext) -> Vec<IpNet> {
    context.extra_prefixes.iter().filter_map(|text| parse_net(text)).collect()
}

fn in_subnet(bridges: &[IpNet], ip: IpAddr) -> bool {
    bridges.iter().any(|bridge| bridge.contains(&ip))
}

/// The target's own addresses: those in a subnet of the bridge. VIPs inside such a subnet are never put on the interface, so none
/// of these is one.
pub(crate) fn local_ips(context: &IpContext) -> Vec<String> {
    let bridges = bridges(context);
    let local = |text: &&String| parse_net(text).is_some_and(|net| in_subnet(&bridges, net.addr()));
    context.src_ip_addrs.iter().filter(local).cloned().collect()
}

/// Pairs of own address and bridge address, one for each family: who to ping.
pub(crate) fn probe_pairs(context: &IpContext) -> Vec<(IpAddr, IpAddr)> {
    let bridges = bridges(context);
    let own: Vec<IpAddr> = local_ips(context).iter().filter_map(|text| parse_net(text)).map(|net| net.addr()).collect();
    let pair = |bridge: &IpNet| {
        let ip = own.iter().find(|ip| ip.is_ipv4() == bridge.addr().is_ipv4() && bridge.contains(*ip))?;
        Some((*ip, bridge.addr()))
    };
    bridges.iter().filter_map(pair).collect()
}

/// The context that a target with these VIPs needs: the VIPs as addresses, and for each a policy that sends what comes from it to
/// the bridge. What else is in the context stays.
pub(crate) fn with_vips(context: &IpContext, vips: &BTreeSet<IpNet>) -> IpContext {
    let bridges = bridges(context);
    let usable = || vips.iter().filter(|vip| !in_subnet(&bridges, vip.addr()));
    let policy = |vip: &IpNet| {
        let v4 = vip.addr().is_ipv4();
        let gateways = bridges.iter().filter(|bridge| bridge.addr().is_ipv4() == v4);
        let prefix = if v4 { "0.0.0.0/0" } else { "::/0" };
        let route = |bridge: &IpNet| Route { prefix: prefix.into(), next_hop: bridge.addr().to_string() };
        PolicyRoute { from: vip.to_string(), routes: gateways.map(route).collect(), ..PolicyRoute::default() }
    };
    let mut wanted = context.clone();
    wanted.src_ip_addrs = local_ips(context);
    wanted.src_ip_addrs.extend(usable().map(IpNet::to_string));
    wanted.policies = usable().map(policy).collect();
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context() -> IpContext {
        IpContext {
            src_ip_addrs: vec!["172.16.1.6/24".into(), "fd00:0:0:1::6/64".into(), "30.0.0.1/32".into()],
            extra_prefixes: vec!["172.16.1.1/24".into(), "fd00:0:0:1::1/64".into()],
            dst_ip_addrs: vec!["172.16.1.7/24".into()],
            ..IpContext::default()
        }
    }

    fn vips(texts: &[&str]) -> BTreeSet<IpNet> {
        texts.iter().map(|text| parse_net(text).unwrap()).collect()
    }

    #[test]
    fn own_addresses_are_those_beside_the_bridge() {
        assert_eq!(local_ips(&context()), ["172.16.1.6/24", "fd00:0:0:1::6/64"]);
        assert!(local_ips(&IpContext { extra_prefixes: vec![], ..context() }).is_empty());
        let pairs = probe_pairs(&context());
        assert_eq!(pairs[0], ("172.16.1.6".parse().unwrap(), "172.16.1.1".parse().unwrap()));
        assert_eq!(pairs.len(), 2);
    }

    #[test]
    fn each_vip_gets_an_address_and_a_policy() {
        let wanted = with_vips(&context(), &vips(&["20.0.0.1/32", "2000::1/128"]));
        assert_eq!(wanted.src_ip_addrs, ["172.16.1.6/24", "fd00:0:0:1::6/64", "20.0.0.1/32", "2000::1/128"]);
        assert_eq!(wanted.policies.len(), 2);
        assert_eq!(wanted.policies[0].from, "20.0.0.1/32");
        let route = |prefix: &str, hop: &str| Route { prefix: prefix.into(), next_hop: hop.into() };
        assert_eq!(wanted.policies[0].routes, [route("0.0.0.0/0", "172.16.1.1")]);
        assert_eq!(wanted.policies[1].routes, [route("::/0", "fd00:0:0:1::1")]);
        assert_eq!(wanted.dst_ip_addrs, context().dst_ip_addrs);
        assert_eq!(with_vips(&wanted, &vips(&["20.0.0.1/32", "2000::1/128"])), wanted, "it settles");
        let fewer = with_vips(&wanted, &vips(&["2000::1/128"]));
        assert_eq!((fewer.src_ip_addrs.len(), fewer.policies.len()), (3, 1));
    }

    #[test]
    fn a_vip_inside_the_subnet_is_left_out_and_it_settles() {
        let set = vips(&["172.16.1.200/32", "20.0.0.1"]);
        let wanted = with_vips(&context(), &set);
        assert_eq!(wanted.src_ip_addrs, ["172.16.1.6/24", "fd00:0:0:1::6/64", "20.0.0.1/32"]);
        assert_eq!(with_vips(&wanted, &set), wanted);
    }
}
