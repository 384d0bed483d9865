//! Port translation: right checksums in both directions, also of what ICMP errors quote.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use common::build::{self, icmp, is_right, l4, packet, sctp, tcp, udp};
use common::scene::{Make, Scene, client, vip};

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
