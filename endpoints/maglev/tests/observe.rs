//! What is told about packets is what happened to them: counters, trace, and the tables of a running load balancer.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{BpfFs, Rng, config, frame, packet, target};
use meridio_maglev::{
    Config, Counters, ETH_IPV4, ETH_IPV6, Engine, Error, Filter, Flow, Image, Live, Protocol, Reason, Standing, Stream,
    Targets, Tracer, Verdict,
};

const SOON: Duration = Duration::from_secs(5);
const NOW: Duration = Duration::ZERO;

/// Packets by reason, by flow, and forwarded ones by stream and identifier.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    reasons: BTreeMap<&'static str, (u64, u64)>,
    flows: BTreeMap<String, (u64, u64)>,
    flow_drops: BTreeMap<String, u64>,
    streams: BTreeMap<String, u64>,
    stream_drops: BTreeMap<(String, &'static str), u64>,
    targets: BTreeMap<(String, String), u64>,
}

impl Tally {
    fn of(counters: &Counters) -> Self {
        let some = |n: &u64| *n > 0;
        let dropped = counters
            .streams
            .iter()
            .flat_map(|s| s.dropped.iter().map(|(r, c)| ((s.stream.clone(), r.name()), c.packets)).collect::<Vec<_>>());
        Tally {
            reasons: counters
                .reasons
                .iter()
                .filter(|(_, c)| c.packets > 0)
                .map(|(r, c)| (r.name(), (c.packets, c.bytes)))
                .collect(),
            flows: counters
                .flows
                .iter()
                .filter(|f| f.counter.packets > 0)
                .map(|f| (f.name.clone(), (f.counter.packets, f.counter.bytes)))
                .collect(),
            flow_drops: counters
                .flows
                .iter()
                .map(|f| (f.name.clone(), f.dropped.packets))
                .filter(|(_, n)| some(n))
                .collect(),
            streams: counters
                .streams
                .iter()
                .map(|s| (s.stream.clone(), s.forwarded.packets))
                .filter(|(_, n)| some(n))
                .collect(),
            stream_drops: dropped.collect(),
            targets: counters
                .targets
                .iter()
                .map(|t| ((t.stream.clone(), t.name.clone()), t.counter.packets))
                .filter(|(_, n)| some(n))
                .collect(),
        }
    }
}

#[test]
fn counters_trace_and_live_tables_tell_what_the_program_did() {
    let mut totals = [0u64; 3];
    for seed in 1..=12 {
        let fs = BpfFs::new();
        let mut engine = Engine::open(fs.settings()).unwrap();
        let mut rng = Rng(seed);
        let (config, targets) = config(&mut rng);
        engine.apply(&config, &targets).unwrap();
        // A change, so that the tables in use are not the first ones.
        engine.apply(&config, &targets).unwrap();
        let image = Image::of(&Live::open(&fs.path()).unwrap()).unwrap();
        let mut tracer = Tracer::start(Live::open(&fs.path()).unwrap(), &Filter::default()).unwrap();
        let mut tally = Tally::default();
        for n in 0..200 {
            let (bytes, v6) = packet(&mut rng);
            if bytes.len() < if v6 { 40 } else { 20 } {
                continue;
            }
            let context = || format!("seed {seed} packet {n}: {bytes:02x?}");
            let explained = image.explain(&bytes, if v6 { ETH_IPV6 } else { ETH_IPV4 });
            let run = engine.test_run(true, &frame(&bytes, v6), 1).unwrap();
            let decision = explained.decision;
            if decision.verdict == Verdict::Pass as u32 {
                assert_eq!(tracer.next(NOW).unwrap(), None, "{}", context());
                assert_eq!((run.result, explained.outcome), (u32::MAX, Reason::None), "{}", context());
                totals[0] += 1;
                continue;
            }
            let event = tracer.next(SOON).unwrap().unwrap_or_else(|| {
                let live = Live::open(&fs.path()).unwrap();
                let on = live.trace_deadline().unwrap().checked_sub(meridio_maglev::monotonic());
                panic!("no event of {}; the trace is on for {on:?} ns, result {}, {explained:?}", context(), run.result)
            });
            let reason = Reason::from_number(event.reason).unwrap();
            let by = tally.reasons.entry(reason.name()).or_default();
            *by = (by.0 + 1, by.1 + bytes.len() as u64);
            assert_eq!((event.bytes, event.segments), (bytes.len() as u32, 1));
            let flow = image.flow_name(event.flow).map(str::to_owned);
            let stream = image.stream_name(event.slot).unwrap_or_default().to_owned();
            if let Some(flow) = &flow {
                let by = tally.flows.entry(flow.clone()).or_default();
                *by = (by.0 + 1, by.1 + bytes.len() as u64);
            }
            if reason.drops() {
                totals[1] += 1;
                assert_eq!((run.result, event.ifindex_out), (2, 0), "{}", context());
                if let Some(flow) = &flow {
                    *tally.flow_drops.entry(flow.clone()).or_default() += 1;
                    *tally.stream_drops.entry((stream, reason.name())).or_default() += 1;
                }
            } else {
                totals[2] += 1;
                *tally.streams.entry(stream.clone()).or_default() += 1;
                *tally.targets.entry((stream, event.identifier.to_string())).or_default() += 1;
            }
            // The image knows the first fragments of its own packets only, and for ever: the program those of all, for two seconds.
            let later_fragment = [Reason::FragmentUnknown as u32, Reason::FragmentHeld as u32];
            if later_fragment.contains(&decision.reason) || later_fragment.contains(&event.reason) {
                continue;
            }
            let seen = [event.verdict, event.reason, event.flow, event.row, event.identifier, event.nat_port];
            let d = decision;
            let said = [d.verdict, explained.outcome as u32, d.flow, d.row, d.identifier, d.nat_port];
            assert_eq!(seen, said, "{}", context());
            if !explained.flows.is_empty() {
                let first = explained.flows.iter().position(|f| f.misses.is_empty());
                let chosen = explained.flows.iter().position(|f| f.standing == Standing::Chosen);
                assert_eq!(first, chosen, "{:?} {}", explained.flows, context());
                assert_eq!(chosen.and_then(|n| u32::try_from(n).ok()).unwrap_or(u32::MAX), d.flow, "{}", context());
            }
        }
        // A later fragment is counted for the flow of the first one, which its event names by the counter only.
        let counted = Tally::of(&engine.counters().unwrap());
        assert_eq!((counted.reasons, counted.streams, counted.targets), (tally.reasons, tally.streams, tally.targets));
        for (flow, count) in &tally.flows {
            assert!(counted.flows[flow].0 >= count.0, "{flow}");
        }
        for (flow, count) in &tally.flow_drops {
            assert!(counted.flow_drops[flow] >= *count, "{flow}");
        }
        for (stream, count) in &tally.stream_drops {
            assert!(counted.stream_drops[stream] >= *count, "{stream:?}");
        }
        assert_eq!(tracer.lost().unwrap(), 0);
    }
    println!("{totals:?} passed, dropped, forwarded");
    assert!(totals.iter().all(|n| *n > 50), "a generator that proves little: {totals:?}");
}

fn simple() -> (Config, BTreeMap<String, Targets>) {
    let vip: ipnet::IpNet = "20.0.0.1/32".parse().unwrap();
    let flow = |name: &str, port, protocol| Flow {
        name: name.into(),
        stream: "s".into(),
        destinations: vec![vip],
        protocols: vec![protocol],
        destination_ports: vec![(port, port)],
        ..Flow::default()
    };
    let config = Config {
        vips: vec![vip],
        streams: vec![Stream { name: "s".into(), max_targets: 10, sctp_ports_only: false }],
        flows: vec![flow("web", 80, Protocol::Tcp), flow("dns", 53, Protocol::Udp)],
        nats: vec![],
    };
    (config, BTreeMap::from([("s".to_owned(), Targets::from([(3, target(3))]))]))
}

fn udp(dport: u16) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 20, 0, 0, 1, 0x30, 0x39];
    packet.extend(dport.to_be_bytes());
    packet.extend([0, 26, 0, 0]);
    packet.extend([0; 18]);
    packet
}

#[test]
fn a_trace_tells_what_its_filter_wants_and_is_off_at_its_end() {
    let fs = BpfFs::new();
    let mut engine = Engine::open(fs.settings()).unwrap();
    let (config, targets) = simple();
    engine.apply(&config, &targets).unwrap();
    let live = || Live::open(&fs.path()).unwrap();
    assert!(!live().traced().unwrap());
    let filter = Filter { destination_ports: vec![(53, 53)], protocols: vec![Protocol::Udp], ..Filter::default() };
    let mut tracer = Tracer::start(live(), &filter).unwrap();
    assert!(live().traced().unwrap());
    assert!(matches!(Tracer::start(live(), &filter), Err(Error::Traced { .. })), "one at a time");
    for port in [54, 53, 80] {
        engine.test_run(true, &frame(&udp(port), false), 1).unwrap();
    }
    let event = tracer.next(SOON).unwrap().unwrap();
    assert_eq!((event.ports, event.identifier, event.reason), (12_345 << 16 | 53, 3, Reason::Redirected as u32));
    assert_eq!((event.next_hop[12..].to_vec(), event.ifindex_out), (vec![172, 16, 0, 3], 1));
    assert_eq!(
        (live().flow_name(event.counter).unwrap(), live().stream_name(event.slot).unwrap()),
        ("dns".into(), "s".into())
    );
    assert_eq!(tracer.next(NOW).unwrap(), None);
    drop(tracer);
    assert!(!live().traced().unwrap());
    engine.test_run(true, &frame(&udp(53), false), 1).unwrap();

    let dropped = Filter { only_dropped: true, ..Filter::default() };
    let mut tracer = Tracer::start(live(), &dropped).unwrap();
    for port in [53, 54] {
        engine.test_run(true, &frame(&udp(port), false), 1).unwrap();
    }
    let event = tracer.next(SOON).unwrap().unwrap();
    assert_eq!((event.ports & 0xffff, event.reason), (54, Reason::NoFlow as u32));
    assert_eq!(tracer.next(NOW).unwrap(), None);

    // More than there is room for is counted, and the trace goes on afterwards.
    let many = 10_000;
    for _ in 0..many / 50 {
        engine.test_run(true, &frame(&udp(54), false), 50).unwrap();
    }
    let mut told = 0;
    while tracer.next(NOW).unwrap().is_some() {
        told += 1;
    }
    assert_eq!(told + tracer.lost().unwrap(), many);
    assert!(tracer.lost().unwrap() > 0);
    engine.test_run(true, &frame(&udp(54), false), 1).unwrap();
    assert!(tracer.next(SOON).unwrap().is_some());
}

#[test]
fn a_trace_whose_tracer_says_nothing_ends_by_itself() {
    let fs = BpfFs::new();
    let mut engine = Engine::open(fs.settings()).unwrap();
    let (config, targets) = simple();
    engine.apply(&config, &targets).unwrap();
    let live = || Live::open(&fs.path()).unwrap();
    // It never gets to switch it off.
    let mut tracer = std::mem::ManuallyDrop::new(Tracer::start(live(), &Filter::default()).unwrap());
    engine.test_run(true, &frame(&udp(53), false), 1).unwrap();
    assert!(tracer.next(SOON).unwrap().is_some());
    std::thread::sleep(Duration::from_millis(2_100));
    assert!(!live().traced().unwrap());
    engine.test_run(true, &frame(&udp(53), false), 1).unwrap();
    assert_eq!(live().counters().unwrap().trace_lost, 0);
    // The program has cleared the switch itself, so that later packets cost nothing again.
    assert_eq!(live().trace_deadline().unwrap(), 0);
    // Its lock would keep the file system of this test busy.
    drop(std::mem::ManuallyDrop::into_inner(tracer));
}

#[test]
fn a_directory_without_a_load_balancer_is_named() {
    let fs = BpfFs::new();
    let missing = Live::open(&fs.path()).unwrap_err().to_string();
    assert!(missing.contains(&fs.path().display().to_string()), "{missing}");
    std::fs::create_dir(fs.path()).unwrap();
    let empty = Live::open(&fs.path()).unwrap_err();
    assert!(matches!(empty, Error::NotLive { .. }), "{empty}");
    let tmp = tempfile::tempdir().unwrap();
    assert!(matches!(Live::open(tmp.path()), Err(Error::NotBpfFs { .. })));
    let _engine = Engine::open(fs.settings()).unwrap();
    let error = Image::of(&Live::open(&fs.path()).unwrap()).err().unwrap().to_string();
    assert_eq!(error, "load balancer: has no configuration yet");
}

/// The table for users says of each reason what the program says.
#[test]
fn every_reason_is_documented() {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
    for reason in Reason::ALL.into_iter().filter(|reason| *reason != Reason::None) {
        let (meaning, advice) = (reason.meaning(), reason.advice());
        let row = text.lines().find(|line| line.starts_with(&format!("| `{}` |", reason.name())));
        let row = row.unwrap_or_else(|| panic!("{} is not in the README", reason.name()));
        assert!(row.ends_with(&format!("| {meaning} | {advice} |")), "{row}\n{meaning} | {advice}");
        assert_eq!(row.contains("| dropped |"), reason.drops(), "{row}");
    }
    let rows = text.lines().filter(|line| line.starts_with("| `")).count();
    assert_eq!(rows, Reason::ALL.len() - 1, "reasons that are none any more");
}
