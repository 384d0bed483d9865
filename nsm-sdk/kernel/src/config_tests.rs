use super::*;
use crate::netlink::{NextHop, VethEnd, mac_from_seed};

const TABLE_LOCAL: u32 = 255;

fn net(s: &str) -> IpNet {
    s.parse().unwrap()
}

fn vip(vip: &str, gateway: &str) -> Policy {
    let all = if gateway.contains(':') { "::/0" } else { "0.0.0.0/0" };
    let routes = vec![InterfaceRoute { destination: net(all), gateway: Some(gateway.parse().unwrap()) }];
    Policy { from: net(vip), protocol: None, sport: None, dport: None, routes }
}

fn target() -> InterfaceConfig {
    InterfaceConfig {
        mtu: Some(1450),
        addresses: Some(vec![net("172.16.1.6/24"), net("fd00:0:0:1::6/64"), net("20.0.0.1/32"), net("2000::1/128")]),
        routes: vec![InterfaceRoute { destination: net("172.16.9.9/32"), gateway: None }],
        policies: Some(vec![vip("20.0.0.1/32", "172.16.1.1"), vip("2000::1/128", "fd00:0:0:1::1")]),
        ..Default::default()
    }
}

#[test]
fn tables_253_to_255_are_never_chosen() {
    let used: BTreeSet<u32> = (1..TABLE_RESERVED).collect();
    assert_eq!(free_table(&used), TABLE_LARGE);
    assert_eq!(free_table(&BTreeSet::from([1, 3, 254])), 2);
}

async fn pair() -> (Netns, Netns) {
    let (a, b) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let end = |n: &Netns, name: &str| VethEnd { netns: n.clone(), name: name.into(), mac: mac_from_seed(name) };
    a.netlink().await.unwrap().veth_create(&end(&a, "nsm-0"), &end(&b, "peer"), None).await.unwrap();
    for (ns, name) in [(&a, "nsm-0"), (&b, "peer"), (&a, "lo")] {
        let netlink = ns.netlink().await.unwrap();
        let index = netlink.link_by_name(name).await.unwrap().unwrap().index;
        netlink.link_up(index).await.unwrap();
    }
    (a, b)
}

async fn policy_rules(ns: &Netns) -> Vec<Rule> {
    let mut rules = ns.netlink().await.unwrap().rules().await.unwrap();
    rules.retain(|r| policy_table(r.table));
    rules
}

/// What somebody has heard of these addresses before is put right at once, and nothing is said of single addresses.
#[tokio::test]
async fn neighbours_hear_of_new_addresses() {
    let (ns, peer) = pair().await;
    let there = peer.netlink().await.unwrap();
    let index = there.link_by_name("peer").await.unwrap().unwrap().index;
    for address in ["172.16.1.1/24", "fd00:0:0:1::1/64"] {
        there.address_replace(index, net(address)).await.unwrap();
    }
    let (old, new) = (mac_from_seed("somebody else"), mac_from_seed("nsm-0"));
    let ips = ["172.16.1.6", "fd00:0:0:1::6", "20.0.0.1", "2000::1"].map(|ip| ip.parse::<IpAddr>().unwrap());
    let heard = async || {
        let neighbours = there.neighbours(Some(index)).await.unwrap();
        ips.map(|ip| neighbours.iter().find(|n| n.ip == ip).and_then(|n| n.mac))
    };
    for ip in ips {
        there.neighbour_replace(index, ip, old, false).await.unwrap();
    }
    assert_eq!(heard().await, [Some(old); 4]);
    apply(&ns, "nsm-0", &target()).await.unwrap();
    let told = async || {
        while heard().await != [Some(new), Some(new), Some(old), Some(old)] {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    let in_time = tokio::time::timeout(std::time::Duration::from_secs(2), told()).await;
    assert!(in_time.is_ok(), "{:?}", heard().await);
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    assert_eq!(heard().await, [Some(new), Some(new), Some(old), Some(old)], "and nothing after that");
}

#[test]
fn neighbours_are_told_before_the_first_single_addresses_come() {
    let link = Link {
        index: 7,
        name: "nsm-0".into(),
        alias: String::new(),
        kind: "veth".into(),
        mac: Some(mac_from_seed("nsm-0")),
        mtu: 1450,
        up: true,
        running: true,
        master: None,
        peer: None,
        peer_nsid: None,
        vxlan: None,
    };
    let steps = |have: &[&str], want: &[&str]| {
        let addresses =
            have.iter().map(|a| Address { net: net(a), index: 7, global: true, tentative: false, since: 0 }).collect();
        let seen = Observed { link: link.clone(), addresses, routes: vec![], rules: vec![], neighbours: vec![] };
        let addresses = Some(want.iter().map(|a| net(a)).collect());
        plan(&InterfaceConfig { addresses, ..InterfaceConfig::default() }, &seen)
    };
    let add = |a: &str| Step::AddAddress(net(a));
    let (own, vip, other) = ("172.16.1.6/24", "20.0.0.1/32", "20.0.0.2/32");
    assert_eq!(steps(&[], &[own]), [add(own)]);
    assert_eq!(steps(&[], &[vip]), [add(vip)], "there is nothing to tell");
    assert_eq!(steps(&[], &[vip, own]), [add(own), Step::Announce, add(vip)]);
    assert_eq!(steps(&[own], &[own, vip]), [Step::Announce, add(vip)]);
    assert_eq!(steps(&[own, vip], &[own, vip, other]), [add(other)], "neighbours are in use by then");
    assert_eq!(steps(&[own, vip], &[own, vip]), []);
}

#[tokio::test]
async fn equal_content_writes_nothing() {
    let (ns, _peer) = pair().await;
    let wanted = target();
    assert!(apply(&ns, "nsm-0", &wanted).await.unwrap() > 0);
    assert_eq!(apply(&ns, "nsm-0", &wanted).await.unwrap(), 0);
    let rules = policy_rules(&ns).await;
    assert_eq!(rules.iter().map(|r| r.table).collect::<Vec<_>>(), [1, 2]);
    let link = ns.netlink().await.unwrap().link_by_name("nsm-0").await.unwrap().unwrap();
    assert_eq!(link.mtu, 1450);
}

#[tokio::test]
async fn change_touches_only_what_changed() {
    let (ns, _peer) = pair().await;
    let mut wanted = target();
    apply(&ns, "nsm-0", &wanted).await.unwrap();
    let before = policy_rules(&ns).await;
    // Another bridge address and one more VIP, one VIP less; the subnet's first address is replaced.
    wanted.addresses = Some(vec![net("172.16.1.8/24"), net("20.0.0.1/32"), net("40.0.0.0/24"), net("172.16.1.9/24")]);
    wanted.policies = Some(vec![vip("20.0.0.1/32", "172.16.1.2"), vip("40.0.0.0/24", "172.16.1.2")]);
    apply(&ns, "nsm-0", &wanted).await.unwrap();
    assert_eq!(apply(&ns, "nsm-0", &wanted).await.unwrap(), 0);
    let after = policy_rules(&ns).await;
    assert!(after.contains(&before[0]), "rule of the kept VIP was touched: {after:?}");
    assert_eq!(after.len(), 2);
    let hop = NextHop { gateway: Some("172.16.1.2".parse().unwrap()), oif: None, onlink: true };
    let routes = ns.netlink().await.unwrap().routes(Some(1)).await.unwrap();
    assert_eq!(routes[0].hops[0].gateway, hop.gateway);
    clear_policies(&ns, "nsm-0").await.unwrap();
    assert!(policy_rules(&ns).await.is_empty());
    assert!(ns.netlink().await.unwrap().routes(Some(1)).await.unwrap().is_empty());
}

#[tokio::test]
async fn rules_of_others_are_left_alone() {
    let (ns, _peer) = pair().await;
    let netlink = ns.netlink().await.unwrap();
    let lo = netlink.link_by_name("lo").await.unwrap().unwrap().index;
    let foreign = Rule::from_source(net("20.0.0.1/32"), 7).with_priority(100);
    netlink.rule_add(&foreign).await.unwrap();
    netlink.route_replace(&Route::blackhole(net("0.0.0.0/0"), 7, 9)).await.unwrap();
    let mut other = Route::new(net("10.9.0.0/16"), 7).via(None, lo, false);
    other.link_scope = true;
    netlink.route_replace(&other).await.unwrap();
    apply(&ns, "nsm-0", &target()).await.unwrap();
    clear_policies(&ns, "nsm-0").await.unwrap();
    assert_eq!(policy_rules(&ns).await, [foreign]);
    assert_eq!(netlink.routes(Some(7)).await.unwrap().len(), 2);
}

/// Where nobody asks for guards, nothing is left in the namespace; where somebody does, they outlive the interface.
#[tokio::test]
async fn guards_are_for_those_who_ask_for_them() {
    for guarded in [false, true] {
        let (ns, _peer) = pair().await;
        let netlink = ns.netlink().await.unwrap();
        let state = async || {
            let mut routes = netlink.routes(None).await.unwrap();
            routes.retain(|route| route.table != TABLE_LOCAL && !route.destination.to_string().starts_with("fe80"));
            (netlink.rules().await.unwrap(), routes)
        };
        let before = state().await;
        let wanted = InterfaceConfig { guarded, ..target() };
        apply(&ns, "nsm-0", &wanted).await.unwrap();
        assert_eq!(apply(&ns, "nsm-0", &wanted).await.unwrap(), 0);
        clear_policies(&ns, "nsm-0").await.unwrap();
        let index = netlink.link_by_name("nsm-0").await.unwrap().unwrap().index;
        netlink.link_delete(index).await.unwrap();
        let after = state().await;
        if !guarded {
            assert_eq!(after.0, before.0);
            assert_eq!(after.1, Vec::new());
            continue;
        }
        let guards = |rule: &&Rule| rule.table == GUARD_TABLE && rule.priority == Some(GUARD_PRIORITY);
        let sources: Vec<_> = after.0.iter().filter(guards).filter_map(|rule| rule.from).collect();
        assert_eq!(sources, [net("20.0.0.1/32"), net("2000::1/128")]);
        assert!(after.1.iter().all(|route| route.table == GUARD_TABLE) && after.1.len() == 2, "{:?}", after.1);
    }
}

/// Ports and protocol of a policy are the kernel's to compare: only what matches takes the policy's table.
#[tokio::test]
async fn ports_and_protocol_of_a_policy_reach_the_kernel() {
    let (ns, _peer) = pair().await;
    let all = net("0.0.0.0/0");
    let only = Policy {
        protocol: Some(6),
        sport: Some(PortRange { start: 5000, end: 5010 }),
        dport: Some(PortRange { start: 80, end: 80 }),
        ..vip("20.0.0.1/32", "172.16.1.1")
    };
    let other = InterfaceRoute { destination: all, gateway: Some("172.16.1.2".parse().unwrap()) };
    let rest = Policy { routes: vec![other], ..vip("20.0.0.1/32", "172.16.1.2") };
    let wanted = InterfaceConfig { policies: Some(vec![rest, only.clone()]), guarded: true, ..target() };
    apply(&ns, "nsm-0", &wanted).await.unwrap();
    assert_eq!(apply(&ns, "nsm-0", &wanted).await.unwrap(), 0);
    let way = async |rest: &'static str| {
        let text = format!("route get 9.9.9.9 from 20.0.0.1 {rest}");
        let arguments: Vec<String> = text.split(' ').map(String::from).collect();
        let ip = move || std::process::Command::new("ip").args(arguments).output().unwrap();
        let output = ns.run(ip).await.unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for (packet, gateway) in [
        ("ipproto tcp sport 5000 dport 80", "via 172.16.1.1 "),
        ("ipproto tcp sport 5010 dport 80", "via 172.16.1.1 "),
        ("ipproto tcp sport 5011 dport 80", "via 172.16.1.2 "),
        ("ipproto tcp sport 5000 dport 81", "via 172.16.1.2 "),
        ("ipproto udp sport 5000 dport 80", "via 172.16.1.2 "),
    ] {
        let found = way(packet).await;
        assert!(found.contains(gateway), "{packet}: {found}");
    }
    // A guard is for a whole source: one for some of its ports would say nothing about the others.
    assert_eq!(guard(&only), None);
}

#[tokio::test]
async fn missing_interface_is_named() {
    let ns = Netns::anonymous().unwrap();
    let error = apply(&ns, "nsm-7", &InterfaceConfig::default()).await.unwrap_err();
    assert!(error.to_string().contains("nsm-7"));
    assert!(error.is_missing());
}
