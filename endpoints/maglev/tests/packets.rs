//! The packets that others get wrong, crafted byte by byte and sent through real interfaces.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use common::BpfFs;
use common::build::{self, ethernet, fragment, icmp, is_right, l4, packet, sctp, tcp, udp, v6};
use common::net::{CLIENT4, CLIENT6, Net, Tap, V4, V6, eventually, ip};
use meridio_maglev::config::Bytes;
use meridio_maglev::{Config, Engine, Flow, MARK_FLAG, Nat, Protocol, Reason, Stream};

type Make = fn(IpAddr, IpAddr, (u16, u16), &[u8]) -> Vec<u8>;

const SOON: Duration = Duration::from_secs(3);

fn config() -> Config {
    let vips = vec!["20.0.0.1/32".parse().unwrap(), "2000::1/128".parse().unwrap()];
    let all = vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let flow = |name: &str, stream: &str, protocols: &[Protocol], ports: &[u16]| Flow {
        name: name.into(),
        stream: stream.into(),
        destinations: vips.clone(),
        protocols: protocols.to_vec(),
        destination_ports: ports.iter().map(|p| (*p, *p)).collect(),
        ..Flow::default()
    };
    let ends = |name: &str, protocol, text: &str| Flow {
        byte_matches: vec![Bytes::parse(text).unwrap()],
        ..flow(name, "s", &[protocol], &[4100])
    };
    Config {
        vips: vips.clone(),
        streams: vec![
            Stream { name: "p".into(), max_targets: 100, sctp_ports_only: true },
            Stream { name: "s".into(), max_targets: 100, sctp_ports_only: false },
        ],
        flows: vec![
            flow("f", "s", &all, &[4000, 80]),
            flow("p", "p", &[Protocol::Sctp], &[5001]),
            ends("tcp-end", Protocol::Tcp, "tcp[18:2] = 7"),
            ends("udp-end", Protocol::Udp, "udp[4:2] = 8"),
        ],
        nats: all.iter().map(|p| Nat { vips: vips.clone(), protocol: *p, port: 80, target_port: 5000 }).collect(),
    }
}

/// A load balancer with two targets, and eyes on all of them.
struct Scene {
    engine: Engine,
    client: Tap,
    targets: Vec<Tap>,
    ext: [u8; 6],
    net: Net,
    _fs: BpfFs,
    next: Cell<u16>,
}

fn client(v6: bool) -> IpAddr {
    if v6 { CLIENT6.into() } else { CLIENT4.into() }
}

fn vip(v6: bool) -> IpAddr {
    if v6 { V6.into() } else { V4.into() }
}

impl Scene {
    fn new() -> Self {
        let (fs, net) = (BpfFs::new(), Net::new(2));
        let mut targets = net.targets(&[1, 2]);
        targets.insert("p".into(), targets["s"].clone());
        let settings = fs.settings();
        let engine = net.run("l", move || {
            let mut engine = Engine::open(settings).unwrap();
            engine.apply(&config(), &targets).unwrap();
            engine.attach("ext").unwrap();
            engine
        });
        engine.detour().unwrap();
        let marks: Vec<(u32, u32)> = ["s", "p"]
            .iter()
            .flat_map(|s| (1..=2).map(|n| (MARK_FLAG | (engine.offset(s).unwrap() + n), n)).collect::<Vec<_>>())
            .collect();
        net.slow_path(&marks);
        let scene = Scene {
            engine,
            client: net.tap("c", "eth0"),
            targets: (1..=2).map(|n| net.tap(&format!("t{n}"), "eth0")).collect(),
            ext: net.mac("l", "ext"),
            net,
            _fs: fs,
            next: Cell::new(20_000),
        };
        // Neighbour entries, so that nothing below waits for them.
        for n in 0..16 {
            scene.owner(n % 2 == 0, 4000);
        }
        scene
    }

    /// A number that no packet has had yet.
    fn fresh(&self) -> u16 {
        self.next.set(self.next.get() + 1);
        self.next.get()
    }

    fn send(&self, packet: &[u8]) {
        self.client.send(&ethernet(self.ext, [2, 0, 0, 0, 0, 9], packet));
    }

    /// Sends from a target through the load balancer to the outside.
    fn reply(&self, n: u32, packet: &[u8]) {
        let to = self.net.mac("l", &format!("nsm{n}"));
        self.targets[n as usize - 1].send(&ethernet(to, [2, 0, 0, 0, 0, 8], packet));
    }

    /// Waits for `count` packets with a property at the targets: index of the target and packet.
    fn arrived(&self, count: usize, property: impl Fn(&[u8]) -> bool) -> Vec<(usize, Vec<u8>)> {
        let all = || -> Vec<(usize, Vec<u8>)> {
            let one = |(n, tap): (usize, &Tap)| tap.matching(&property).into_iter().map(move |p| (n, p)).collect();
            self.targets.iter().enumerate().flat_map::<Vec<_>, _>(one).collect()
        };
        eventually(SOON, || all().len() >= count);
        let seen = all();
        assert_eq!(seen.len(), count, "packets at the targets");
        seen
    }

    fn outside(&self, property: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        assert!(eventually(SOON, || !self.client.matching(&property).is_empty()), "nothing came back");
        self.client.matching(&property).remove(0)
    }

    /// A fresh source port, and the target that its flow to a UDP port belongs to.
    fn owner(&self, v6: bool, port: u16) -> (u16, usize) {
        let sport = self.fresh();
        let (src, dst) = (client(v6), vip(v6));
        self.send(&packet(src, dst, 17, &udp(src, dst, (sport, port), b"whose")));
        let seen = self.arrived(1, |p| l4(p).is_some_and(|(n, l4)| n == 17 && l4[..2] == sport.to_be_bytes()));
        (sport, seen[0].0)
    }

    fn count(&self, reason: Reason) -> u64 {
        self.engine.reasons().unwrap().into_iter().find(|(r, _)| *r == reason).unwrap().1.packets
    }
}

/// Fragments of one datagram, and whether a packet is one of them.
fn fragments(v6: bool, sport: u16, id: u32, port: u16) -> (Vec<Vec<u8>>, impl Fn(&[u8]) -> bool + Copy) {
    let (src, dst) = (client(v6), vip(v6));
    let whole = udp(src, dst, (sport, port), &vec![7; 2_000]);
    let parts = [(0, 696), (696, 1392), (1392, whole.len())];
    let list = parts.map(|(from, to)| fragment(src, dst, 17, &whole[from..to], id, from as u16, to != whole.len()));
    let ours = move |p: &[u8]| {
        if v6 {
            p[6] == 44 && p[44..48] == id.to_be_bytes()
        } else {
            p[9] == 17 && p[4..6] == (id as u16).to_be_bytes()
        }
    };
    (list.to_vec(), ours)
}

#[test]
fn fragments_follow_their_flow_in_any_order() {
    let scene = Scene::new();
    for v6 in [false, true] {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 1, 0], [1, 2, 0]] {
            let mut owners = BTreeSet::new();
            for _ in 0..6 {
                let (sport, owner) = scene.owner(v6, 4000);
                let (list, ours) = fragments(v6, sport, sport as u32, 4000);
                for n in order {
                    scene.send(&list[n]);
                    std::thread::sleep(Duration::from_millis(3));
                }
                let seen = scene.arrived(3, ours);
                assert!(seen.iter().all(|(n, _)| *n == owner), "v6 {v6}, order {order:?}: not all at target {owner}");
                owners.insert(owner);
            }
            assert!(owners.len() == 2 || order != [0, 1, 2], "both targets have their share");
        }
    }
    assert!(scene.count(Reason::FragmentHeld) >= 4 * 2 * 6, "out of order means held");
    assert_eq!(scene.count(Reason::FragmentUnknown), 0);
}

#[test]
fn a_fragment_whose_first_one_never_comes_is_dropped_in_time() {
    let scene = Scene::new();
    for v6 in [false, true] {
        let before = scene.count(Reason::FragmentUnknown);
        let sport = scene.fresh();
        let (list, ours) = fragments(v6, sport, sport as u32, 4000);
        let sent = std::time::Instant::now();
        scene.send(&list[1]);
        assert!(eventually(SOON, || scene.count(Reason::FragmentUnknown) == before + 1), "dropped and counted");
        assert!(sent.elapsed() >= Duration::from_millis(150), "not before it has waited");
        // What comes afterwards goes by itself, whatever became of the fragment before.
        scene.send(&list[0]);
        scene.send(&list[2]);
        scene.arrived(2, ours);
    }
}

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
    let out = std::process::Command::new("ip").args(["-n", &l, "-o", "link"]).output().unwrap();
    let links = String::from_utf8(out.stdout).unwrap();
    let line = links.lines().find(|line| line.starts_with(&format!("{detour}:"))).unwrap();
    let name = line.split(": ").nth(1).unwrap();
    for (family, vip) in [("-4", "20.0.0.1/32"), ("-6", "2000::1/128")] {
        ip(&format!("-n {l} {family} rule add pref 201 to {vip} lookup 4098"));
        ip(&format!("-n {l} {family} route add default dev {name} table 4098"));
    }
    for v6 in [false, true] {
        for _ in 0..4 {
            let (sport, owner) = scene.owner(v6, 4000);
            let (src, dst) = (vip(v6), client(v6));
            let reply = packet(src, dst, 17, &udp(src, dst, (4000, sport), &[5; 1_420]));
            scene.reply(owner as u32 + 1, &reply);
            let (kind, header): ([u8; 2], usize) = if v6 { ([2, 0], 40) } else { ([3, 4], 20) };
            let seen = scene.arrived(1, |p| {
                l4(p).is_some_and(|(n, l4)| {
                    n == if v6 { 58 } else { 1 }
                        && l4[..2] == kind
                        && l4.get(10 + header..12 + header) == Some(&sport.to_be_bytes()[..])
                })
            });
            assert_eq!(seen[0].0, owner, "v6 {v6}");
            let (protocol, message) = l4(&seen[0].1).unwrap();
            let (from, to) = build::ends(&seen[0].1);
            assert!(to == src && is_right(message, from, to, protocol));
            assert_eq!(message[6..8], 1400u16.to_be_bytes());
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

#[test]
fn translated_ports_have_right_checksums_in_both_directions() {
    let scene = Scene::new();
    for v6 in [false, true] {
        let (src, dst) = (client(v6), vip(v6));
        for (protocol, make) in [(6, tcp as Make), (17, udp as Make), (132, sctp as Make)] {
            for payload in [&b""[..], b"odd", b"even", &[0xff; 1_200]] {
                let sport = scene.fresh();
                scene.send(&packet(src, dst, protocol, &make(src, dst, (sport, 80), payload)));
                let from = |p: &[u8]| {
                    l4(p).is_some_and(|(n, l4)| n == protocol && l4[..2] == sport.to_be_bytes())
                        && build::ends(p).1 == dst
                };
                let seen = scene.arrived(1, from);
                let inside = l4(&seen[0].1).unwrap().1;
                assert_eq!(inside[2..4], 5000u16.to_be_bytes(), "v6 {v6}, protocol {protocol}");
                assert!(is_right(inside, src, dst, protocol), "v6 {v6}, protocol {protocol}, in");

                scene.reply(seen[0].0 as u32 + 1, &packet(dst, src, protocol, &make(dst, src, (5000, sport), payload)));
                let back = |p: &[u8]| {
                    l4(p).is_some_and(|(n, l4)| {
                        // Not a reset by the target's own stack.
                        let ours = n != 6 || l4[13] == 0x10;
                        n == protocol && ours && l4[2..4] == sport.to_be_bytes() && l4[..2] == 80u16.to_be_bytes()
                    })
                };
                let reply = scene.outside(back);
                assert!(is_right(l4(&reply).unwrap().1, dst, src, protocol), "v6 {v6}, protocol {protocol}, out");
            }
        }
    }
    // A UDP checksum of 0 means none, and stays.
    let (src, dst, sport) = (client(false), vip(false), scene.fresh());
    let mut none = udp(src, dst, (sport, 80), b"none");
    none[6..8].fill(0);
    scene.send(&packet(src, dst, 17, &none));
    let seen = scene.arrived(1, |p| l4(p).is_some_and(|(n, l4)| n == 17 && l4[..2] == sport.to_be_bytes()));
    assert_eq!(l4(&seen[0].1).unwrap().1[2..8], [&5000u16.to_be_bytes()[..], &[0, 12, 0, 0]].concat());
}

#[test]
fn icmp_errors_about_translated_packets_are_translated() {
    let scene = Scene::new();
    for v6 in [false, true] {
        let (src, dst) = (client(v6), vip(v6));
        let (icmp_protocol, header) = if v6 { (58, 40) } else { (1, 20) };
        let kind = if v6 { [1, 4] } else { [3, 3] };
        for (protocol, make, quote) in [
            (6, tcp as Make, 8),
            (6, tcp as Make, 20),
            (17, udp as Make, 8),
            (17, udp as Make, 12),
            (132, sctp as Make, 8),
        ] {
            // From outside: about what the target has sent, with the port that the client knows.
            let sport = scene.fresh();
            let known = make(dst, src, (80, sport), b"reply");
            let meant = make(dst, src, (5000, sport), b"reply");
            let error = icmp(src, dst, kind, [0; 4], &packet(dst, src, protocol, &known)[..header + quote]);
            scene.send(&packet(src, dst, icmp_protocol, &error));
            let about = |p: &[u8]| {
                l4(p).is_some_and(|(n, l4)| {
                    n == icmp_protocol && l4.get(10 + header..12 + header) == Some(&sport.to_be_bytes()[..])
                })
            };
            let seen = scene.arrived(1, about);
            let message = l4(&seen[0].1).unwrap().1;
            assert!(is_right(message, src, dst, icmp_protocol), "in, v6 {v6}, protocol {protocol}, {quote} bytes");
            assert_eq!(message[8 + header..], meant[..quote], "in, v6 {v6}, protocol {protocol}");

            // From a target: about what it has got, with its own port.
            let sport = scene.fresh();
            let known = make(src, dst, (sport, 80), b"request");
            let got = make(src, dst, (sport, 5000), b"request");
            let error = icmp(dst, src, kind, [0; 4], &packet(src, dst, protocol, &got)[..header + quote]);
            scene.reply(1, &packet(dst, src, icmp_protocol, &error));
            let about = |p: &[u8]| {
                l4(p).is_some_and(|(n, l4)| {
                    n == icmp_protocol && l4.get(8 + header..10 + header) == Some(&sport.to_be_bytes()[..])
                })
            };
            let told = scene.outside(about);
            let message = l4(&told).unwrap().1;
            assert!(is_right(message, dst, src, icmp_protocol), "out, v6 {v6}, protocol {protocol}, {quote} bytes");
            assert_eq!(message[8 + header..], known[..quote], "out, v6 {v6}, protocol {protocol}");
        }
    }
}
