//! The same packets through the reference model, the decision on the host and the program in the kernel: one answer.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use common::generate::{Pair, answer, config, packet};
use common::shrink::{Case, shrink};
use common::{BpfFs, Rng, frame};
use meridio_maglev::reference::Answer;
use meridio_maglev::{Engine, Reason};
use proptest::prelude::*;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// The kernel refuses test runs of packets without a network header.
fn runs(case: &Case) -> bool {
    case.packet.len() >= if case.v6 { 40 } else { 20 }
}

/// Asks the kernel about a packet, whose configuration has been applied.
fn kernel(engine: &mut Engine, pair: &Pair, case: &Case, expected: &Answer) -> Result<(), String> {
    if !runs(case) {
        return Ok(());
    }
    let run = engine.test_run(true, &frame(&case.packet, case.v6), 1).map_err(|e| e.to_string())?;
    // The kernel may well have seen the first fragment: identifications repeat.
    if *expected == Answer::Drop(Reason::FragmentUnknown) {
        return Ok(());
    }
    let right = match expected {
        Answer::Pass => run.result == u32::MAX,
        Answer::Drop(_) => run.result == 2,
        Answer::Forward { .. } => matches!(run.result, 0 | 7),
    };
    if !right {
        return Err(format!("the program returned {}, the reference says {expected:?}", run.result as i32));
    }
    let decisions = engine.last_decisions().map_err(|e| e.to_string())?;
    let mut seen = decisions.iter().map(|d| answer(d, &pair.image));
    if seen.any(|answer| answer == *expected) {
        return Ok(());
    }
    let seen: Vec<Answer> = decisions.iter().map(|d| answer(d, &pair.image)).collect();
    Err(format!("the program says one of {seen:?}, the reference {expected:?}"))
}

/// All three about one packet, from scratch.
fn whole(engine: &mut Engine, case: &Case) -> Result<(), String> {
    engine.apply(&case.config, &case.targets).map_err(|e| format!("{e:?}"))?;
    let pair = Pair::new(&case.config, &case.targets);
    let expected = pair.agree(&case.packet, case.v6)?;
    // What is recorded may be of another packet: of one that the program has decided the same way on another CPU.
    kernel(engine, &pair, case, &expected)
}

/// A million packets over 1,000 configurations. `MERIDIO_DIFF_CONFIGS` and `MERIDIO_DIFF_PACKETS` (per configuration) change
/// that, `MERIDIO_DIFF_SEED` begins at another configuration. A difference is printed as the smallest case that still shows
/// it.
#[test]
fn reference_host_and_kernel_agree() {
    let fs = BpfFs::new();
    let mut engine = Engine::open(fs.settings()).unwrap();
    engine.record(true).unwrap();
    let (configs, packets) = (number("MERIDIO_DIFF_CONFIGS", 1_000), number("MERIDIO_DIFF_PACKETS", 1_000));
    let first = number("MERIDIO_DIFF_SEED", 1);
    let mut verdicts = [0u64; 3];
    let mut in_kernel = 0;
    let started = std::time::Instant::now();
    let mut applying = std::time::Duration::ZERO;
    for seed in first..first + configs {
        let mut rng = Rng(seed);
        let (config, targets) = config(&mut rng);
        assert!(config.faults().is_empty(), "seed {seed}: {:?}", config.faults());
        let begun = std::time::Instant::now();
        engine.apply(&config, &targets).unwrap();
        applying += begun.elapsed();
        let pair = Pair::new(&config, &targets);
        let mut case = Case { config, targets, packet: Vec::new(), v6: false };
        for n in 0..packets {
            (case.packet, case.v6) = packet(&mut rng);
            let result = pair.agree(&case.packet, case.v6).and_then(|expected| {
                in_kernel += runs(&case) as u64;
                kernel(&mut engine, &pair, &case, &expected).map(|()| expected)
            });
            match result {
                Ok(Answer::Pass) => verdicts[0] += 1,
                Ok(Answer::Drop(_)) => verdicts[1] += 1,
                Ok(Answer::Forward { .. }) => verdicts[2] += 1,
                Err(difference) => {
                    let small = shrink(case, &mut |case| whole(&mut engine, case).is_err());
                    let now = whole(&mut engine, &small);
                    panic!("seed {seed}, packet {n}: {difference}\nsmallest case: {now:?}\n{small}");
                }
            }
        }
    }
    println!(
        "{configs} configurations in {:?} ({applying:?} to apply them): {verdicts:?} passed, dropped, forwarded; {in_kernel} in the kernel",
        started.elapsed()
    );
    assert!(
        verdicts.iter().all(|v| *v > 100 || configs * packets < 5000),
        "a generator that proves little: {verdicts:?}"
    );
}

/// The shrinker finds what a difference depends on: here one that is made up.
#[test]
fn a_difference_is_shown_at_its_smallest() {
    let made_up = |case: &Case| {
        let port = case.packet.get(22..24) == Some(&80u16.to_be_bytes());
        !case.v6 && port && case.config.flows.iter().any(|f| !f.source_ports.is_empty())
    };
    let mut found = 0;
    for seed in 0.. {
        let mut rng = Rng(seed);
        let (config, targets) = config(&mut rng);
        let (packet, v6) = packet(&mut rng);
        let case = Case { config, targets, packet, v6 };
        if !made_up(&case) {
            continue;
        }
        let small = shrink(case, &mut |case| made_up(case));
        assert!(made_up(&small) && small.config.faults().is_empty());
        assert_eq!((small.config.flows.len(), small.config.streams.len()), (1, 1), "{small}");
        assert_eq!(small.config.flows[0].source_ports.len(), 1);
        assert!(
            small.config.vips.is_empty()
                && small.config.nats.is_empty()
                && small.targets.values().all(|t| t.is_empty())
        );
        assert_eq!(small.packet.len(), 24);
        assert!(small.packet[..22].iter().all(|b| *b == 0), "{small}");
        found += 1;
        if found == 5 {
            break;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(number("MERIDIO_FUZZ_CASES", 2_000) as u32))]

    /// Of bytes that need not be packets at all.
    #[test]
    fn any_bytes_are_decided_alike(
        seed in 0u64..8,
        v6: bool,
        start in proptest::collection::vec(any::<u8>(), 0..120),
        packet_seed: u64,
        keep in 0usize..80,
    ) {
        thread_local! {
            static PAIRS: Vec<Pair> = (0..8).map(|seed| {
                let (config, targets) = config(&mut Rng(seed));
                Pair::new(&config, &targets)
            }).collect();
        }
        // Half noise, half a packet whose tail is noise.
        let (bytes, v6) = if keep < 20 {
            (start, v6)
        } else {
            let (mut bytes, v6) = packet(&mut Rng(packet_seed));
            bytes.truncate(keep);
            bytes.extend(start);
            (bytes, v6)
        };
        PAIRS.with(|pairs| {
            let result = pairs[seed as usize].agree(&bytes, v6);
            prop_assert!(result.is_ok(), "configuration {seed}, {bytes:02x?}: {result:?}");
            Ok(())
        })?;
    }
}

/// Prints the cost of one decision in the kernel; the packet is restored for each run of 50, so that its TTL does not run out.
#[test]
fn cost_of_a_decision() {
    use meridio_maglev::{Config, Flow, Protocol, Stream};
    let fs = BpfFs::new();
    let mut engine = Engine::open(fs.settings()).unwrap();
    println!("{:?} instructions, verified", engine.program_size().unwrap());
    let vip: ipnet::IpNet = "20.0.0.1/32".parse().unwrap();
    for (flows, ready) in [(1u16, 4), (10, 4), (100, 100), (1000, 1000), (2000, 1000)] {
        let config = Config {
            vips: vec![vip],
            streams: vec![Stream { name: "s".into(), max_targets: 1000, sctp_ports_only: false }],
            flows: (0..flows)
                .map(|n| Flow {
                    name: format!("f{n:04}"),
                    stream: "s".into(),
                    destinations: vec![vip],
                    protocols: vec![Protocol::Udp],
                    destination_ports: vec![(1000 + n, 1000 + n)],
                    ..Flow::default()
                })
                .collect(),
            nats: vec![],
        };
        let targets = [("s".to_owned(), (1..=ready).map(|id| (id, common::target(id))).collect())].into();
        let started = std::time::Instant::now();
        engine.apply(&config, &targets).unwrap();
        let applied = started.elapsed();
        let started = std::time::Instant::now();
        engine.set_targets("s", &(2..=ready).map(|id| (id, common::target(id))).collect()).unwrap();
        let swapped = started.elapsed();
        let mut packet = vec![0x45, 0, 0, 46, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 20, 0, 0, 1, 0x30, 0x39];
        packet.extend((1000 + flows - 1).to_be_bytes());
        packet.extend([0, 26, 0, 0]);
        packet.extend([0; 18]);
        let best = (0..400).map(|_| {
            let run = engine.test_run(true, &frame(&packet, false), 50).unwrap();
            assert_eq!(run.result, 7, "the fast path");
            run.nanoseconds
        });
        println!(
            "{flows} flows, {ready} targets: {} ns per packet, applied in {applied:?}, one target less in {swapped:?}",
            best.min().unwrap()
        );
    }
}
