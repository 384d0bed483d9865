//! What the maps have room for, up to the last place of it.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::collections::BTreeSet;

use common::build::{packet, udp};
use common::{BpfFs, Rng, frame, target};
use ipnet::IpNet;
use meridio_maglev::{Config, ETH_IPV4, Engine, Flow, Image, Nat, Protocol, Stream, Targets};

fn vip() -> IpNet {
    "20.0.0.1/32".parse().unwrap()
}

fn ready() -> std::collections::BTreeMap<String, Targets> {
    [("s".to_owned(), [(1, target(1))].into())].into()
}

/// As many flows as there can be, each with a destination port of its own.
fn full(name: &str) -> Config {
    let flow = |n: u16| Flow {
        name: format!("{name}-{n}"),
        stream: "s".into(),
        destinations: vec![vip()],
        protocols: vec![Protocol::Udp],
        destination_ports: vec![(1000 + n, 1000 + n)],
        ..Flow::default()
    };
    Config {
        vips: vec![vip()],
        streams: vec![Stream { name: "s".into(), max_targets: 10, sctp_ports_only: false }],
        flows: (0..2048).map(flow).collect(),
        nats: vec![],
    }
}

fn datagram(port: u16) -> Vec<u8> {
    frame(&from(1234, port), false)
}

fn from(source: u16, port: u16) -> Vec<u8> {
    let (src, dst) = ("10.0.0.1".parse().unwrap(), "20.0.0.1".parse().unwrap());
    packet(src, dst, 17, &udp(src, dst, (source, port), b"hello"))
}

/// The table of the largest stream, which lies in sixteen chunks: each packet gets the row and the target that the same code finds in
/// memory.
#[test]
fn rows_of_the_largest_table_are_where_they_should_be() {
    let fs = BpfFs::new();
    let cpu = nix::sched::sched_getcpu().unwrap();
    let mut set = nix::sched::CpuSet::new();
    set.set(cpu).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
    let mut engine = Engine::open(fs.settings()).unwrap();
    engine.record(true).unwrap();
    let mut config = full("f");
    config.flows.truncate(1);
    // Something in front of it, so that it does not begin at the first chunk.
    let stream = |name: &str, max_targets| Stream { name: name.into(), max_targets, sctp_ports_only: false };
    config.streams = vec![stream("other", 700), stream("s", 10_000)];
    let ready: Targets = (1..=100).map(|n| (n * 100, target(n))).collect();
    let targets = [("s".to_owned(), ready), ("other".to_owned(), [(1, target(1))].into())].into();
    engine.apply(&config, &targets).unwrap();
    let image = Image::new(&config, &targets).unwrap();
    let (mut rows, mut identifiers) = (BTreeSet::new(), BTreeSet::new());
    for source in 1..=60 {
        let packet = from(source, 1000);
        assert_eq!(engine.test_run(true, &frame(&packet, false), 1).unwrap().result, 7);
        let seen = engine.last_decisions().unwrap()[cpu];
        let wanted = image.explain(&packet, ETH_IPV4).decision;
        assert_eq!((seen.row, seen.identifier), (wanted.row, wanted.identifier), "source port {source}");
        rows.insert(seen.row);
        identifiers.insert(seen.identifier);
    }
    assert!(rows.len() > 55 && rows.last().unwrap() > &900_000, "all over the table: {rows:?}");
    assert!(identifiers.len() > 30, "{identifiers:?}");
}

/// All flows renamed, again and again, also over a restart: no two ever share a counter, and each begins at 0.
#[test]
fn flows_that_are_all_renamed_have_counters_of_their_own() {
    let fs = BpfFs::new();
    let mut engine = Engine::open(fs.settings()).unwrap();
    let mut rng = Rng(1);
    for (round, name) in ["a", "b", "c", "d", "a", "e"].iter().enumerate() {
        if round == 3 {
            drop(engine);
            engine = Engine::open(fs.settings()).unwrap();
            assert!(engine.adopted());
        }
        engine.apply(&full(name), &ready()).unwrap();
        let asked: BTreeSet<u16> = (0..40).map(|_| rng.below(2048) as u16).collect();
        for n in &asked {
            assert_eq!(engine.test_run(true, &datagram(1000 + n), 1).unwrap().result, 7);
        }
        let hits = engine.flow_hits().unwrap();
        assert_eq!(hits.len(), 2048);
        let names: BTreeSet<String> = hits.iter().map(|hit| hit.name.clone()).collect();
        assert!(names == full(name).flows.into_iter().map(|flow| flow.name).collect(), "names of round {round}");
        for hit in &hits {
            let n: u16 = hit.name.split('-').nth(1).unwrap().parse().unwrap();
            assert_eq!(hit.counter.packets, asked.contains(&n) as u64, "{} in round {round}", hit.name);
        }
    }
}

/// Every map of the classifier full in both generations: changes go on.
#[test]
fn full_maps_can_be_changed() {
    let fs = BpfFs::new();
    let mut engine = Engine::open(fs.settings()).unwrap();
    let many = |first: u8, n: u16| -> Vec<IpNet> {
        (0..n).map(|n| format!("{first}.1.{}.{}/32", n >> 8, n & 255).parse().unwrap()).collect()
    };
    for round in 0..4u8 {
        let first = 30 + round % 2;
        let mut config = full("f");
        config.vips = many(first, 2047);
        // All of them translated, and one of them twice.
        let nat = |vips: Vec<IpNet>, port| Nat { vips, protocol: Protocol::Udp, port, target_port: port + 1 };
        config.nats = vec![nat(config.vips.clone(), 80), nat(config.vips[..1].to_vec(), 90)];
        for flow in &mut config.flows {
            flow.destinations = config.vips[..1].to_vec();
        }
        config.flows[7].sources = many(10 + round % 2, 5_000);
        engine.apply(&config, &ready()).unwrap();
        let send = |engine: &mut Engine, source: &str, vip: &str, port| {
            let (src, dst) = (source.parse().unwrap(), vip.parse().unwrap());
            let packet = frame(&packet(src, dst, 17, &udp(src, dst, (1234, port), b"hello")), false);
            engine.test_run(true, &packet, 1).unwrap().result
        };
        let vip = format!("{first}.1.0.0");
        assert_eq!(send(&mut engine, "9.9.9.9", &vip, 1000), 7, "round {round}");
        assert_eq!(send(&mut engine, "9.9.9.9", &vip, 1007), 2, "another source");
        assert_eq!(send(&mut engine, &format!("{}.1.3.4", 10 + round % 2), &vip, 1007), 7, "its source");
        assert_eq!(send(&mut engine, "9.9.9.9", &format!("{}.1.0.0", 61 - first), 1000), u32::MAX, "no VIP any more");
    }
}

/// Two large streams that change at once where there is room for one table more: one after the other, and nothing is refused.
#[test]
fn streams_without_room_beside_their_old_tables_change_in_turn() {
    let fs = BpfFs::new();
    let mut settings = fs.settings();
    settings.kernel.chunks = 96;
    let mut engine = Engine::open(settings).unwrap();
    let config = |sizes: [u32; 2]| {
        let [a, b] = sizes.map(|max_targets| Stream { name: String::new(), max_targets, sctp_ports_only: false });
        let streams = vec![Stream { name: "a".into(), ..a }, Stream { name: "b".into(), ..b }];
        let flow = |n: usize, port| Flow {
            name: streams[n].name.clone(),
            stream: streams[n].name.clone(),
            destination_ports: vec![(port, port)],
            ..full("f").flows.remove(0)
        };
        Config { flows: vec![flow(0, 1000), flow(1, 1001)], streams: streams.clone(), ..full("f") }
    };
    for sizes in [[10_000, 10_000], [9_000, 8_000], [500, 9_999], [10_000, 500]] {
        let last: Targets = [(1, target(1)), (sizes[0], target(sizes[0]))].into();
        let targets = [("a".to_owned(), last.clone()), ("b".to_owned(), [(1, target(1))].into())].into();
        engine.apply(&config(sizes), &targets).unwrap();
        for port in [1000, 1001] {
            assert_eq!(engine.test_run(true, &datagram(port), 1).unwrap().result, 7, "{sizes:?}");
        }
        let ready = engine.targets("a").unwrap();
        assert_eq!(ready.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, sizes[0]]);
        assert_eq!(engine.streams().len(), 2);
    }
}
