//! What the maps have room for, up to the last place of it.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::collections::BTreeSet;

use common::build::{packet, udp};
use common::{BpfFs, Rng, frame, target};
use ipnet::IpNet;
use meridio_maglev::{Config, Engine, Flow, Protocol, Stream, Targets};

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
    let (src, dst) = ("10.0.0.1".parse().unwrap(), "20.0.0.1".parse().unwrap());
    frame(&packet(src, dst, 17, &udp(src, dst, (1234, port), b"hello")), false)
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
