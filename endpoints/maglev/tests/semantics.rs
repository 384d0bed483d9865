//! Single rules about which packets belong where, asked of reference, host and kernel.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::collections::BTreeMap;

use common::build::{fragment, packet, tcp, udp};
use common::generate::Pair;
use common::{BpfFs, dual_stack, flow, frame, target};
use meridio_maglev::reference::Answer;
use meridio_maglev::{Config, ETH_IPV4, ETH_IPV6, Engine, Flow, Nat, Protocol, Reason, Targets};

struct All {
    engine: Engine,
    pair: Pair,
    _fs: BpfFs,
}

fn targets() -> BTreeMap<String, Targets> {
    [("s".to_owned(), [(1, target(1))].into())].into()
}

impl All {
    fn new(config: &Config) -> Self {
        let fs = BpfFs::new();
        let mut engine = Engine::open(fs.settings()).unwrap();
        engine.apply(config, &targets()).unwrap();
        All { engine, pair: Pair::new(config, &targets()), _fs: fs }
    }

    /// The answer that reference and host agree on; the kernel forwards or drops accordingly.
    fn ask(&mut self, packet: &[u8]) -> Answer {
        let v6 = packet[0] >> 4 == 6;
        let answer = self.pair.agree(packet, v6).unwrap();
        let result = self.engine.test_run(true, &frame(packet, v6), 1).unwrap().result;
        let expected = match answer {
            Answer::Pass => u32::MAX,
            Answer::Drop(_) => 2,
            Answer::Forward { .. } => 7,
        };
        assert_eq!(result, expected, "{answer:?}");
        answer
    }
}

fn datagram(src: &str, dst: &str, port: u16) -> Vec<u8> {
    let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
    packet(src, dst, 17, &udp(src, dst, (1234, port), b"hello"))
}

fn forwarded(flow: &str, nat_port: u16) -> Answer {
    Answer::Forward { flow: flow.into(), identifier: 1, nat_port }
}

/// Sources that are all of length 0 mean no sources at all, whichever IP version they are of.
#[test]
fn sources_of_length_zero_are_no_sources() {
    let nets = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect();
    for (sources, v4, v6) in [
        (&["0.0.0.0/0"][..], true, true),
        (&["::/0"], true, true),
        (&["0.0.0.0/0", "::/0"], true, true),
        (&["0.0.0.0/0", "10.0.0.0/8"], true, false),
        (&["::/0", "fd00::/8"], false, true),
        (&["0.0.0.0/1", "128.0.0.0/1"], true, false),
    ] {
        let flow = Flow { sources: nets(sources), ..flow("f", &[Protocol::Udp], &[4000]) };
        let mut all = All::new(&dual_stack(vec![flow]));
        for (src, dst, matches) in [("10.0.0.1", "20.0.0.1", v4), ("fd00::1", "2000::1", v6)] {
            let expected = if matches { forwarded("f", 0) } else { Answer::Drop(Reason::NoFlow) };
            assert_eq!(all.ask(&datagram(src, dst, 4000)), expected, "{sources:?}, {src}");
        }
    }
}

/// A flow whose stream is not known keeps its place: what belongs to it is not another flow's.
#[test]
fn a_flow_without_its_stream_drops_at_its_own_priority() {
    let lost = Flow { stream: String::new(), priority: 10, ..flow("lost", &[Protocol::Udp], &[4000]) };
    let config = dual_stack(vec![lost, flow("f", &[Protocol::Udp], &[4000, 5000])]);
    let mut all = All::new(&config);
    for (src, dst) in [("10.0.0.1", "20.0.0.1"), ("fd00::1", "2000::1")] {
        // In any order, because each packet begins with the stream of the last one.
        for port in [4000, 5000, 4000, 5000] {
            let expected = if port == 4000 { Answer::Drop(Reason::NoTarget) } else { forwarded("f", 0) };
            assert_eq!(all.ask(&datagram(src, dst, port)), expected, "{dst}:{port}");
        }
    }
    assert_eq!(common::packets_of(&all.engine.reasons().unwrap(), Reason::NoTarget), 4);
    let hits = all.engine.flow_hits().unwrap();
    let of = |name: &str| hits.iter().find(|hits| hits.name == name).map(|h| (h.counter.packets, h.dropped.packets));
    assert_eq!((of("lost"), of("f")), (Some((4, 4)), Some((4, 0))));
    let told = Config { flows: vec![flow("lost", &[Protocol::Udp], &[4000])], ..config };
    all.engine.apply(&told, &targets()).unwrap();
    all.pair = Pair::new(&told, &targets());
    assert_eq!(all.ask(&datagram("10.0.0.1", "20.0.0.1", 4000)), forwarded("lost", 0), "once it is known");
}

/// A port is translated for the address that says so, also within a wider VIP and a wider flow.
#[test]
fn a_translation_may_be_of_a_part_of_a_vip() {
    let vip = vec!["20.0.0.0/24".parse().unwrap()];
    let nat = |vip: &str, port, target_port| {
        let vips = vec![vip.parse().unwrap()];
        Nat { vips, protocol: Protocol::Udp, port, target_port }
    };
    let config = Config {
        vips: vip.clone(),
        flows: vec![Flow { destinations: vip, ..flow("f", &[Protocol::Udp], &[80, 81]) }],
        nats: vec![
            nat("20.0.0.1/32", 80, 5000),
            nat("20.0.0.2/31", 80, 6000),
            nat("30.0.0.1/32", 80, 7000),
            nat("20.0.0.0/16", 81, 8000),
        ],
        ..dual_stack(vec![])
    };
    let mut all = All::new(&config);
    for (dst, port, expected) in [
        ("20.0.0.1", 80, 5000),
        ("20.0.0.2", 80, 6000),
        ("20.0.0.3", 80, 6000),
        ("20.0.0.4", 80, 0),
        ("20.0.0.1", 81, 8000),
        ("20.0.0.9", 81, 8000),
    ] {
        assert_eq!(all.ask(&datagram("10.0.0.1", dst, port)), forwarded("f", expected), "{dst}:{port}");
    }
    assert_eq!(all.ask(&datagram("10.0.0.1", "30.0.0.1", 80)), Answer::Pass);
}

/// What follows the first fragment goes to the same target, and nowhere once that has left.
#[test]
fn later_fragments_of_a_target_that_has_left_have_no_target() {
    let config = dual_stack(vec![flow("f", &[Protocol::Udp], &[4000])]);
    let mut all = All::new(&config);
    for (src, dst) in [("10.0.0.1", "20.0.0.1"), ("fd00::1", "2000::1")] {
        let (src, dst): (std::net::IpAddr, _) = (src.parse().unwrap(), dst.parse().unwrap());
        let v6 = src.is_ipv6();
        let whole = udp(src, dst, (1234, 4000), &[1; 1000]);
        let [first, later] = [(0, 504), (504, 1008)]
            .map(|(from, to)| frame(&fragment(src, dst, 17, &whole[from..to], 77, from as u16, from == 0), v6));
        let ethertype = if v6 { ETH_IPV6 } else { ETH_IPV4 };
        all.engine.apply(&config, &targets()).unwrap();
        for packet in [&first, &later] {
            assert_eq!(all.engine.test_run(true, packet, 1).unwrap().result, 7);
            assert_eq!(all.pair.image.decide(&packet[14..], ethertype).identifier, 1);
        }
        all.engine.set_targets("s", &[(2, target(2))].into()).unwrap();
        let count = |engine: &Engine, reason| common::packets_of(&engine.reasons().unwrap(), reason);
        let before = count(&all.engine, Reason::NoTarget);
        assert_eq!(all.engine.test_run(true, &later, 1).unwrap().result, 2);
        assert_eq!(count(&all.engine, Reason::NoTarget), before + 1);
        assert_eq!(count(&all.engine, Reason::NoAddress), 0);
    }
}

/// A length of 0 is a lie, but in super-packets that are longer than their header can say.
#[test]
fn a_length_of_zero_is_believed_in_super_packets_only() {
    let mut all = All::new(&dual_stack(vec![flow("f", &[Protocol::Tcp, Protocol::Udp], &[4000])]));
    for (src, dst, at, reason) in
        [("10.0.0.1", "20.0.0.1", 2, Reason::Malformed), ("fd00::1", "2000::1", 4, Reason::Truncated)]
    {
        let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
        let mut long = packet(src, dst, 6, &tcp(src, dst, (1234, 4000), &[7; 2_800]));
        let v6 = long[0] >> 4 == 6;
        assert_eq!(all.engine.test_run_super(&frame(&long, v6), 1_400).unwrap().result, 7);
        long[at..at + 2].fill(0);
        assert_eq!(all.engine.test_run_super(&frame(&long, v6), 1_400).unwrap().result, 7, "v6 {v6}");
        assert_eq!(all.ask(&long), Answer::Drop(reason));
    }
    // A length of 0 in UDP is one of IPv6's alone.
    for (src, dst, expected) in
        [("10.0.0.1", "20.0.0.1", Answer::Drop(Reason::Malformed)), ("fd00::1", "2000::1", forwarded("f", 0))]
    {
        let mut packet = datagram(src, dst, 4000);
        let l4 = packet.len() - 13;
        packet[l4 + 4..l4 + 6].fill(0);
        assert_eq!(all.ask(&packet), expected);
    }
}
