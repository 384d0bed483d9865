//! Fragments go where their flow goes, in whatever order they come.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use common::build::{ends, fragment, is_right, sctp, udp};
use common::net::{eventually, ip};
use common::scene::{SOON, Scene, client, vip};
use meridio_maglev::{ETH_IPV4, ETH_IPV6, Reason};

/// Fragments of one datagram from the client, and whether a packet is one of them.
fn fragments(v6: bool, sport: u16, id: u32, port: u16) -> (Vec<Vec<u8>>, impl Fn(&[u8]) -> bool + Copy) {
    parts((client(v6), vip(v6)), (sport, port), id)
}

fn parts((src, dst): (IpAddr, IpAddr), ports: (u16, u16), id: u32) -> (Vec<Vec<u8>>, impl Fn(&[u8]) -> bool + Copy) {
    let whole = udp(src, dst, ports, &vec![7; 2_000]);
    let parts = [(0, 696), (696, 1392), (1392, whole.len())];
    let list = parts.map(|(from, to)| fragment(src, dst, 17, &whole[from..to], id, from as u16, to != whole.len()));
    let v6 = src.is_ipv6();
    let ours = move |p: &[u8]| {
        if v6 {
            p[0] >> 4 == 6 && p[6] == 44 && p[44..48] == id.to_be_bytes()
        } else {
            p[0] >> 4 == 4 && p[9] == 17 && p[4..6] == (id as u16).to_be_bytes()
        }
    };
    (list.to_vec(), ours)
}

/// Source and destination port of the datagram that fragments make, of which the sum has to be right.
fn whole(fragments: &[Vec<u8>]) -> (u16, u16) {
    let part = |p: &Vec<u8>| match p[0] >> 4 {
        6 => (u16::from_be_bytes([p[42], p[43]]) & 0xfff8, p[48..].to_vec()),
        _ => ((u16::from_be_bytes([p[6], p[7]]) & 0x1fff) * 8, p[20..].to_vec()),
    };
    let mut parts: Vec<(u16, Vec<u8>)> = fragments.iter().map(part).collect();
    parts.sort();
    let l4: Vec<u8> = parts.into_iter().flat_map(|(_, bytes)| bytes).collect();
    let (src, dst) = ends(&fragments[0]);
    assert!(l4.len() == 2_008 && is_right(&l4, src, dst, 17), "the sum over the whole datagram");
    (u16::from_be_bytes([l4[0], l4[1]]), u16::from_be_bytes([l4[2], l4[3]]))
}

#[test]
fn fragments_follow_their_flow_in_any_order() {
    let scene = Scene::new();
    // The second port is translated.
    for (v6, (known, own)) in [false, true].into_iter().flat_map(|v6| [(v6, (4000, 4000)), (v6, (80, 5000))]) {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [2, 1, 0], [1, 2, 0]] {
            let mut owners = BTreeSet::new();
            for _ in 0..6 {
                let (sport, owner) = scene.owner(v6, known);
                let (list, ours) = fragments(v6, sport, sport as u32, known);
                for n in order {
                    scene.send(&list[n]);
                    std::thread::sleep(Duration::from_millis(3));
                }
                let seen = scene.arrived(3, ours);
                assert!(seen.iter().all(|(n, _)| *n == owner), "v6 {v6}, order {order:?}: not all at target {owner}");
                let seen: Vec<Vec<u8>> = seen.into_iter().map(|(_, packet)| packet).collect();
                assert_eq!(whole(&seen), (sport, own), "v6 {v6}, order {order:?}");
                owners.insert(owner);
            }
            assert!(owners.len() == 2 || order != [0, 1, 2], "both targets have their share");
        }
    }
    assert!(scene.count(Reason::FragmentHeld) >= 2 * 4 * 2 * 6, "out of order means held");
    assert_eq!(scene.count(Reason::FragmentUnknown), 0);
}

#[test]
fn fragments_of_replies_get_the_port_that_clients_know() {
    let scene = Scene::new();
    for v6 in [false, true] {
        for (known, own) in [(4000, 4000), (80, 5000)] {
            let (sport, owner) = scene.owner(v6, known);
            let (list, ours) = parts((vip(v6), client(v6)), (own, sport), sport as u32);
            for packet in &list {
                scene.reply(owner as u32 + 1, packet);
            }
            assert!(eventually(SOON, || scene.client.matching(ours).len() == 3), "v6 {v6}, port {known}");
            assert_eq!(whole(&scene.client.matching(ours)), (known, sport), "v6 {v6}");
        }
    }
}

/// The checksum of an SCTP packet changes with what lies behind the port, and how much that is only the last fragment says.
#[test]
fn sctp_in_fragments_is_not_translated_but_counted() {
    let scene = Scene::new();
    for v6 in [false, true] {
        let (here, there) = (client(v6), vip(v6));
        let first = |(src, dst), ports, id| {
            let whole = sctp(src, dst, ports, &[0, 3, 0, 16, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
            fragment(src, dst, 132, &whole[..16], id, 0, true)
        };
        for id in 1..3 {
            let before = scene.count(Reason::Untranslatable);
            match id {
                1 => scene.send(&first((here, there), (1_234, 80), id)),
                _ => scene.reply(1, &first((there, here), (5000, 1_234), id)),
            }
            assert!(eventually(SOON, || scene.count(Reason::Untranslatable) == before + 1), "v6 {v6}, {id}");
        }
        // A port that stays what it is makes no trouble.
        let reply = first((there, here), (4000, 1_234), 3);
        scene.reply(1, &reply);
        let header = if v6 { 40 } else { 20 };
        let same = |p: &[u8]| p.len() == reply.len() && p[header..] == reply[header..];
        assert!(eventually(SOON, || !scene.client.matching(same).is_empty()));
        assert!(scene.client.matching(|p| p.windows(4).any(|w| w == [0x13, 0x88, 4, 210])).is_empty());
    }
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

/// Somebody deletes the interface behind which fragments wait for their first one. That is said, fragments are no longer sent
/// there, and there is another one soon.
#[test]
fn a_detour_that_was_deleted_is_made_anew() {
    let mut scene = Scene::new();
    let l = scene.net.name("l");
    for round in 0..2 {
        let old = scene.engine.detour().unwrap();
        ip(&format!("-n {l} link del {}", scene.net.device("l", old)));
        assert!(eventually(SOON, || scene.engine.detour().is_err()), "round {round}: nobody has noticed");
        let fault = scene.engine.detour().unwrap_err();
        assert!(fault.starts_with("interface mddetour"), "{fault}");
        let before = (scene.count(Reason::FragmentUnknown), scene.count(Reason::FragmentHeld));
        let sport = scene.fresh();
        let later = &fragments(false, sport, sport as u32, 4000).0[1];
        assert_eq!(scene.why(later, ETH_IPV4), Reason::FragmentUnknown);
        scene.send(later);
        assert!(eventually(SOON, || scene.count(Reason::FragmentUnknown) == before.0 + 1), "dropped and counted");
        assert_eq!(scene.count(Reason::FragmentHeld), before.1, "sent to an interface that is gone");
        let made = eventually(SOON, || {
            scene.tend();
            scene.engine.detour().is_ok()
        });
        assert!(made && scene.engine.detour().unwrap() != old, "{:?}", scene.engine.detour());
        for v6 in [false, true] {
            let (sport, owner) = scene.owner(v6, 4000);
            let (list, ours) = fragments(v6, sport, sport as u32, 4000);
            assert_eq!(scene.why(&list[1], if v6 { ETH_IPV6 } else { ETH_IPV4 }), Reason::FragmentHeld);
            scene.send(&list[1]);
            assert!(eventually(SOON, || scene.count(Reason::FragmentHeld) > before.1), "held again");
            scene.send(&list[0]);
            scene.send(&list[2]);
            assert!(scene.arrived(3, ours).iter().all(|(n, _)| *n == owner));
        }
    }
}

/// The limit of what load balancers do without talking to each other: only the one that has seen the first fragment knows
/// the ports. The others hold the rest for a moment, and drop it under a name that says what to do.
#[test]
fn fragments_of_one_datagram_at_two_load_balancers_are_told_as_such() {
    let scenes = [Scene::new(), Scene::new()];
    for v6 in [false, true] {
        for first in 0..2 {
            let (here, there) = (&scenes[first], &scenes[1 - first]);
            let before = [here, there].map(|scene| scene.count(Reason::FragmentUnknown));
            let (sport, owner) = here.owner(v6, 4000);
            // Each scene counts its ports by itself; an identification must not be known from the round before.
            let (list, ours) = fragments(v6, sport, sport as u32 + 10_000 * first as u32, 4000);
            here.send(&list[0]);
            there.send(&list[1]);
            here.send(&list[2]);
            let seen = here.arrived(2, ours);
            assert!(seen.iter().all(|(n, _)| *n == owner), "what comes to the same one goes where the flow goes");
            assert!(eventually(SOON, || there.count(Reason::FragmentUnknown) == before[1] + 1), "v6 {v6}");
            there.arrived(0, ours);
            assert_eq!(here.count(Reason::FragmentUnknown), before[0]);
        }
    }
    assert!(Reason::FragmentUnknown.advice().contains("all fragments of a packet have to reach one load balancer"));
}
