//! The packets that others get wrong, crafted byte by byte and sent through real interfaces.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use common::build::{self, icmp, is_right, l4, packet, sctp, tcp, udp, v6};
use common::net::{eventually, ip};
use common::scene::{Make, SOON, Scene, client, vip};
use meridio_maglev::Reason;

#[test]
fn extension_headers_do_not_hide_the_ports() {
    let scene = Scene::new();
    let (src, dst) = (client(true), vip(true));
    let (hop8, dest8) = ([0u8, 0, 1, 4, 0, 0, 0, 0], [0u8, 0, 1, 4, 0, 0, 0, 0]);
    let dest24 = [[0u8, 2, 1, 20, 0, 0, 0, 0], [0; 8], [0; 8]].concat();
    let routing = [0u8, 2, 4, 0, 0, 0, 0, 0].into_iter().chain([0; 16]).collect::<Vec<u8>>();
    let auth = [0u8, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let chains: [&[(u8, &[u8])]; 6] = [
        &[(0, &hop8)],
        &[(60, &dest8)],
        &[(60, &dest24)],
        &[(43, &routing)],
        &[(51, &auth)],
        &[(0, &hop8), (60, &dest24), (43, &routing), (60, &dest8)],
    ];
    for chain in chains {
        for _ in 0..6 {
            let (sport, owner) = scene.owner(true, 4000);
            let mut payload = udp(src, dst, (sport, 4000), b"behind");
            let mut next = 17;
            for (kind, header) in chain.iter().rev() {
                let mut header = header.to_vec();
                header[0] = next;
                next = *kind;
                payload = [header, payload].concat();
            }
            let sent = v6(src, dst, next, &payload);
            scene.send(&sent);
            let seen = scene.arrived(1, |p| p[0] >> 4 == 6 && p[40..] == sent[40..]);
            assert_eq!(seen[0].0, owner, "chain {chain:?}");
            assert_eq!(seen[0].1[7], 63, "hop limit");
        }
    }
    let before = scene.count(Reason::Extensions);
    let long: Vec<u8> = (0..9).flat_map(|n| [if n == 8 { 17 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]).collect();
    scene.send(&v6(src, dst, 60, &[long, udp(src, dst, (1, 4000), b"")].concat()));
    assert!(eventually(SOON, || scene.count(Reason::Extensions) == before + 1));
}

#[test]
fn icmp_errors_go_to_the_target_of_the_flow_that_they_are_about() {
    let scene = Scene::new();
    let errors: [(bool, &[[u8; 2]]); 2] = [
        (false, &[[3, 0], [3, 1], [3, 3], [3, 4], [4, 0], [5, 1], [11, 0], [11, 1], [12, 0]]),
        (true, &[[1, 0], [1, 4], [2, 0], [3, 0], [3, 1], [4, 0], [4, 1]]),
    ];
    for (v6, kinds) in errors {
        let router: IpAddr =
            if v6 { Ipv6Addr::new(0xfd0a, 0, 0, 0, 0, 0, 0, 0x77).into() } else { Ipv4Addr::new(10, 0, 0, 77).into() };
        let (src, dst, icmp_protocol) = (client(v6), vip(v6), if v6 { 58 } else { 1 });
        for kind in kinds {
            for _ in 0..4 {
                let (sport, owner) = scene.owner(v6, 4000);
                // What the target has sent, or its first bytes.
                let sent = packet(dst, src, 17, &udp(dst, src, (4000, sport), &[0; 64]));
                let header = if v6 { 40 } else { 20 };
                let error = icmp(router, dst, *kind, [0, 0, 5, 0], &sent[..header + 8]);
                scene.send(&packet(router, dst, icmp_protocol, &error));
                let seen = scene.arrived(1, |p| {
                    l4(p).is_some_and(|(n, l4)| n == icmp_protocol && l4 == error) && build::ends(p).0 == router
                });
                assert_eq!(seen[0].0, owner, "v6 {v6}, {kind:?}");
            }
        }
    }
    // A quote of something that the VIP has not sent helps nobody through.
    let before = scene.count(Reason::QuoteMismatch);
    let (src, dst) = (client(false), vip(false));
    let stranger = packet(src, src, 17, &udp(src, src, (4000, 1), &[]));
    scene.send(&packet(src, dst, 1, &icmp(src, dst, [3, 1], [0; 4], &stranger)));
    assert!(eventually(SOON, || scene.count(Reason::QuoteMismatch) == before + 1));
}

#[test]
fn too_big_is_told_by_the_vip_in_the_clients_words() {
    let scene = Scene::new();
    for n in 1..=2 {
        ip(&format!("-n {} link set nsm{n} mtu 1400", scene.net.name("l")));
    }
    // The program believes what it knows of a link for eight ticks of the kernel, which has at least 100 a second.
    std::thread::sleep(Duration::from_millis(100));
    for v6 in [false, true] {
        for port in [4000, 80] {
            let (src, dst, sport) = (client(v6), vip(v6), scene.fresh());
            let datagram = udp(src, dst, (sport, port), &vec![3; 1_420]);
            scene.send(&packet(src, dst, 17, &datagram));
            let (kind, header): ([u8; 2], usize) = if v6 { ([2, 0], 40) } else { ([3, 4], 20) };
            let about = |p: &[u8]| {
                l4(p).is_some_and(|(n, l4)| {
                    n == if v6 { 58 } else { 1 }
                        && l4[..2] == kind
                        && l4.get(8 + header..10 + header) == Some(&sport.to_be_bytes()[..])
                })
            };
            let told = scene.outside(about);
            assert_eq!(build::ends(&told), (dst, src), "from the VIP to the client");
            let (protocol, message) = l4(&told).unwrap();
            assert!(is_right(message, dst, src, protocol), "checksum, v6 {v6}, port {port}");
            assert_eq!(message[6..8], 1400u16.to_be_bytes(), "the MTU");
            assert_eq!(&message[8 + header..16 + header], &datagram[..8], "ports and checksum as the client sent them");
        }
    }
    assert_eq!(scene.count(Reason::SourceSet), 4);
    assert!(scene.count(Reason::SlowMtu) >= 4);
}

/// A reply that does not fit the external link: what this machine tells the VIP about it reaches the target that sent it.
#[test]
fn errors_about_replies_reach_the_target_that_sent_them() {
    let scene = Scene::new();
    let l = scene.net.name("l");
    ip(&format!("-n {l} link set ext mtu 1400"));
    let detour = scene.engine.detour().unwrap();
    let name = scene.net.device("l", detour);
    for (family, vip) in [("-4", "20.0.0.1/32"), ("-6", "2000::1/128")] {
        ip(&format!("-n {l} {family} rule add pref 201 to {vip} lookup 4098"));
        ip(&format!("-n {l} {family} route add default dev {name} table 4098"));
    }
    // The port that a client knows, and the one that the target answers from.
    for (v6, (known, own)) in [false, true].into_iter().flat_map(|v6| [(v6, (4000, 4000)), (v6, (80, 5000))]) {
        for _ in 0..4 {
            let (sport, owner) = scene.owner(v6, known);
            let (src, dst) = (vip(v6), client(v6));
            let reply = packet(src, dst, 17, &udp(src, dst, (own, sport), &[5; 1_420]));
            scene.reply(owner as u32 + 1, &reply);
            let (kind, header): ([u8; 2], usize) = if v6 { ([2, 0], 40) } else { ([3, 4], 20) };
            let seen = scene.arrived(1, |p| {
                l4(p).is_some_and(|(n, l4)| {
                    n == if v6 { 58 } else { 1 }
                        && l4[..2] == kind
                        && l4.get(10 + header..12 + header) == Some(&sport.to_be_bytes()[..])
                })
            });
            assert_eq!(seen[0].0, owner, "v6 {v6}, port {known}");
            let (protocol, message) = l4(&seen[0].1).unwrap();
            let (from, to) = build::ends(&seen[0].1);
            assert!(to == src && is_right(message, from, to, protocol));
            assert_eq!(message[6..8], 1400u16.to_be_bytes());
            assert_eq!(message[8 + header..10 + header], own.to_be_bytes(), "the target knows its own port");
        }
    }
}

#[test]
fn headers_that_end_the_packet_can_be_matched() {
    let scene = Scene::new();
    for v6 in [false, true] {
        let (src, dst) = (client(v6), vip(v6));
        for (protocol, make) in [(6, tcp as Make), (17, udp as Make)] {
            let sport = scene.fresh();
            let bare = make(src, dst, (sport, 4100), b"");
            scene.send(&packet(src, dst, protocol, &bare));
            scene.arrived(1, |p| l4(p) == Some((protocol, &bare[..])));
        }
        // The same ports, but bytes that do not match.
        let before = scene.count(Reason::NoFlow);
        scene.send(&packet(src, dst, 17, &udp(src, dst, (1, 4100), b"x")));
        assert!(eventually(SOON, || scene.count(Reason::NoFlow) == before + 1));
    }
}

#[test]
fn sctp_goes_by_five_tuple_or_by_ports_alone() {
    let scene = Scene::new();
    let sources = |v6: bool| -> Vec<IpAddr> {
        let one = |n: u16| match v6 {
            true => Ipv6Addr::new(0xfd0a, 0, 0, 0, 0, 0, 1, n).into(),
            false => Ipv4Addr::new(10, 0, 0, 100 + n as u8).into(),
        };
        (0..6).map(one).collect()
    };
    for (port, ports_only) in [(4000, false), (5001, true)] {
        let mut all = BTreeSet::new();
        let mut moved = 0;
        for _ in 0..8 {
            let sport = scene.fresh();
            let mut targets = BTreeSet::new();
            for v6 in [false, true] {
                for src in sources(v6) {
                    let data = sctp(src, vip(v6), (sport, port), &[0, 3, 0, 16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
                    scene.send(&packet(src, vip(v6), 132, &data));
                    let same = |p: &[u8]| l4(p) == Some((132, &data[..])) && build::ends(p).0 == src;
                    targets.insert(scene.arrived(1, same)[0].0);
                }
            }
            moved += (targets.len() > 1) as u32;
            all.extend(targets);
        }
        assert_eq!(all.len(), 2, "port {port}: both targets have their share");
        assert_eq!(moved == 0, ports_only, "port {port}: {moved} associations on two targets");
    }
}

#[test]
fn truncated_and_lying_headers_are_dropped_and_counted() {
    let scene = Scene::new();
    let faulty = |v6: bool| -> Vec<(&str, Vec<u8>, Reason)> {
        let (src, dst) = (client(v6), vip(v6));
        let header = if v6 { 40 } else { 20 };
        let good = |protocol: u8, l4: Vec<u8>| packet(src, dst, protocol, &l4);
        let mut offset = tcp(src, dst, (1, 4000), b"");
        offset[12] = 0x40;
        let mut long_offset = tcp(src, dst, (1, 4000), b"");
        long_offset[12] = 0xf0;
        let mut short_length = udp(src, dst, (1, 4000), b"abc");
        short_length[4..6].copy_from_slice(&7u16.to_be_bytes());
        let mut long_length = udp(src, dst, (1, 4000), b"abc");
        long_length[4..6].copy_from_slice(&500u16.to_be_bytes());
        let mut beyond = good(17, udp(src, dst, (1, 4000), b"abc"));
        let (at, more) = if v6 { (4, 300u16) } else { (2, 300) };
        beyond[at..at + 2].copy_from_slice(&more.to_be_bytes());
        let mut list = vec![
            ("TCP header cut off", good(6, tcp(src, dst, (1, 4000), b"")[..19].to_vec()), Reason::Truncated),
            ("UDP header cut off", good(17, vec![0, 1, 15, 160]), Reason::Truncated),
            ("SCTP header cut off", good(132, vec![0; 11]), Reason::Truncated),
            ("ICMP header cut off", good(if v6 { 58 } else { 1 }, vec![8, 0, 0]), Reason::Truncated),
            ("nothing behind the network header", good(17, vec![]), Reason::Truncated),
            ("TCP data offset of 16", good(6, offset), Reason::Malformed),
            ("TCP data offset of 60", good(6, long_offset), Reason::Malformed),
            ("UDP length of 7", good(17, short_length), Reason::Malformed),
            ("UDP length of 500", good(17, long_length), Reason::Malformed),
            ("more than there is", beyond, Reason::Malformed),
        ];
        if v6 {
            let cut = v6_cut(src, dst);
            list.push(("extension header beyond the end", cut, Reason::Truncated));
        } else {
            let mut short = good(17, udp(src, dst, (1, 4000), b""));
            short[0] = 0x44;
            list.push(("header length of 16", short, Reason::Malformed));
            let mut total = good(17, udp(src, dst, (1, 4000), b""));
            total[2..4].copy_from_slice(&10u16.to_be_bytes());
            list.push(("total length of 10", total, Reason::Malformed));
        }
        let error = icmp(src, dst, if v6 { [1, 0] } else { [3, 1] }, [0; 4], &[0x45; 6]);
        list.push(("quote cut off", packet(src, dst, if v6 { 58 } else { 1 }, &error), Reason::Truncated));
        assert!(list.iter().all(|(_, p, _)| p.len() >= header));
        list
    };
    for v6 in [false, true] {
        for (what, packet, reason) in faulty(v6) {
            let before = scene.count(reason);
            scene.send(&packet);
            let counted = eventually(SOON, || scene.count(reason) == before + 1);
            assert!(counted, "v6 {v6}, {what}: {:?}", scene.engine.reasons());
        }
    }
    let forwarded = scene.count(Reason::Redirected);
    scene.owner(true, 4000);
    assert_eq!(scene.count(Reason::Redirected), forwarded + 1, "and forwarding goes on");
}

fn v6_cut(src: IpAddr, dst: IpAddr) -> Vec<u8> {
    v6(src, dst, 60, &[17, 200, 1, 4, 0, 0, 0, 0])
}
