//! Next hops that change: no stale path, and no loss beyond the moment in which there is none.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use common::flood::Flood;
use common::net::{Net, eventually, ip};
use common::{BpfFs, dual_stack, flow};
use meridio_maglev::{Engine, Protocol, Reason};

const PORT: u16 = 4000;

fn start() -> (Engine, Net, BpfFs) {
    let (fs, net) = (BpfFs::new(), Net::new(2));
    let config = dual_stack(vec![flow("f", &[Protocol::Udp], &[PORT])]);
    (common::start(&net, fs.settings(), config, net.targets(&[1, 2])), net, fs)
}

/// Rates at which the unresolved queue of the kernel (about 100 datagrams) is enough for the time that resolving takes.
const RATE: u64 = 400;

#[test]
fn an_unresolved_neighbour_loses_nothing() {
    let (engine, net, _fs) = start();
    let flood = Flood::start(&net, 2, (PORT, PORT), RATE);
    flood.flows(50);
    for _ in 0..20 {
        for n in 1..=2 {
            ip(&format!("-n {} neigh flush dev nsm{n}", net.name("l")));
        }
        flood.flows(20);
    }
    let tally = flood.finish();
    assert_eq!(tally.lost(), 0, "{tally:?} {:?}", engine.reasons());
}

#[test]
fn a_target_with_a_new_link_address_is_followed_at_once() {
    let (engine, net, _fs) = start();
    let flood = Flood::start(&net, 2, (PORT, PORT), RATE);
    flood.flows(50);
    for n in 1..=3 {
        // A target's interface tells its neighbours when its address changes (arp_notify, ndisc_notify), as NSM's do.
        let notify = ["ipv4/conf/eth0/arp_notify", "ipv6/conf/eth0/ndisc_notify"];
        net.run("t1", move || notify.iter().for_each(|k| std::fs::write(format!("/proc/sys/net/{k}"), "1").unwrap()));
        ip(&format!("-n {} link set eth0 address 02:00:00:00:01:0{n}", net.name("t1")));
        let before = flood.received(1);
        assert!(eventually(Duration::from_secs(5), || flood.received(1) > before + 40), "no way to the new address");
    }
    let tally = flood.finish();
    println!("{tally:?}");
    // Frames that were on the cable to the old address.
    assert!(tally.lost() <= RATE / 10, "{tally:?} {:?}", engine.reasons());
}

/// What the program has found out about a link address is believed for a while, unless it is told to look again.
#[test]
fn a_target_with_a_new_link_address_is_followed_at_once_when_the_engine_is_told() {
    let (mut engine, net, _fs) = start();
    let flood = Flood::start(&net, 2, (PORT, PORT), 10 * RATE);
    flood.flows(500);
    let hops: [IpAddr; 2] = ["172.16.1.2", "fd00:1::2"].map(|hop| hop.parse().unwrap());
    let all = hops.map(|hop| (net.index("nsm1"), hop)).into();
    let (l, tap) = (net.name("l"), net.tap("t1", "eth0"));
    for n in 1..=10u8 {
        // As in the kernel when an announcement has come. Nobody has that address: what is sent there is seen on the cable.
        for next_hop in hops {
            ip(&format!("-n {l} neigh replace {next_hop} lladdr 02:00:00:00:02:{n:02x} dev nsm1 nud reachable"));
        }
        engine.look_again(&all).unwrap();
        // One may be under way. Without being told the program would go on for 8 to 80 ms.
        let told = flood.sent() + 1;
        std::thread::sleep(Duration::from_millis(30));
        let late = |numbers: Vec<u64>| numbers.into_iter().filter(|number| *number > told).count();
        let [to_old, to_new] = [n - 1, n].map(|n| late(tap.numbers_to([2, 0, 0, 0, 2, n])));
        assert!(to_new > 0, "round {n}: nothing for the new address");
        assert_eq!(to_old, 0, "round {n}: for the address of before");
    }
    flood.finish();
}

#[test]
fn a_target_with_a_new_ip_address_is_reached_there_at_once() {
    let (mut engine, net, _fs) = start();
    let flood = Flood::start(&net, 2, (PORT, PORT), RATE);
    flood.flows(50);
    let mut targets = net.targets(&[1, 2])["s"].clone();
    let link = net.index("nsm1");
    net.run("t1", || std::fs::write("/proc/sys/net/ipv4/conf/all/promote_secondaries", "1").unwrap());
    for n in 3..6u8 {
        ip(&format!("-n {} addr add 172.16.1.{n}/24 dev eth0", net.name("t1")));
        targets.get_mut(&1).unwrap().v4 = Some((Ipv4Addr::new(172, 16, 1, n), link));
        engine.set_targets("s", &targets).unwrap();
        // From here on the old address is not used: it may go.
        let old = if n == 3 { 2 } else { n - 1 };
        flood.flows(5);
        std::thread::sleep(Duration::from_millis(20));
        ip(&format!("-n {} addr del 172.16.1.{old}/24 dev eth0", net.name("t1")));
        ip(&format!("-n {} neigh flush dev nsm1", net.name("l")));
        flood.flows(100);
    }
    let tally = flood.finish();
    assert_eq!(tally.lost(), 0, "{tally:?} {:?}", engine.reasons());
    assert!(tally.by_target[0] > 50);
}

#[test]
fn a_link_that_flaps_costs_its_own_target_only_and_only_while_it_is_down() {
    let (engine, net, _fs) = start();
    let flood = Flood::start(&net, 2, (PORT, PORT), RATE);
    flood.flows(50);
    for _ in 0..3 {
        ip(&format!("-n {} link set nsm1 down", net.name("l")));
        let other = flood.received(2);
        assert!(eventually(Duration::from_secs(5), || flood.received(2) > other + 40), "the other target goes on");
        ip(&format!("-n {} link set nsm1 up", net.name("l")));
        // IPv6 addresses go with the link.
        ip(&format!("-n {} addr replace fd00:1::1/64 dev nsm1 nodad", net.name("l")));
        let before = flood.received(1);
        assert!(eventually(Duration::from_secs(5), || flood.received(1) > before + 60), "and this one is back");
    }
    let tally = flood.finish();
    println!("{tally:?} {:?}", engine.reasons());
    assert!(tally.arrived > tally.sent / 2);
    let reasons = engine.reasons().unwrap();
    let count = |reason: Reason| reasons.iter().find(|(r, _)| *r == reason).unwrap().1.packets;
    assert_eq!(count(Reason::Internal) + count(Reason::NoTarget), 0);
}

/// Packets go straight into a target's link without touching its neighbour entry. The kernel has to check it all the same.
#[test]
fn the_kernel_goes_on_checking_the_neighbours_of_targets() {
    let (_engine, net, _fs) = start();
    let l = net.name("l");
    let stale = |address: &str| {
        let out = std::process::Command::new("ip").args(["-n", &l, "neigh", "show", "nud", "stale"]).output().unwrap();
        String::from_utf8(out.stdout).unwrap().contains(address)
    };
    let flood = Flood::start(&net, 2, (PORT, PORT), RATE);
    flood.flows(200);
    let (v4, v6) = ("172.16.1.2 ", "fd00:1::2 ");
    for address in [v4, v6] {
        let mac = net.mac("t1", "eth0").map(|byte| format!("{byte:02x}")).join(":");
        ip(&format!("-n {l} neigh replace {address} lladdr {mac} dev nsm1 nud stale"));
        assert!(stale(address));
    }
    // At the latest after as many ticks as the program waits for, which are 12 s at 100 a second.
    assert!(eventually(Duration::from_secs(20), || !stale(v4) && !stale(v6)), "an entry that nobody checks");
    let tally = flood.finish();
    assert_eq!(tally.lost(), 0, "{tally:?}");
}
