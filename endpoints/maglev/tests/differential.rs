//! The same packets through the reference model, the decision on the host and the program in the kernel: one answer.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::time::{Duration, Instant};

use common::generate::{Pair, answer, config, packet};
use common::shrink::{Case, shrink};
use common::{BpfFs, Rng, frame};
use meridio_maglev::Engine;
use meridio_maglev::reference::Answer;
use proptest::prelude::*;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// The kernel refuses test runs of packets without a network header.
fn runs(packet: &[u8], v6: bool) -> bool {
    packet.len() >= if v6 { 40 } else { 20 }
}

/// The engine, and the CPU that this thread stays on: the program writes down its decision for each CPU.
struct Subject {
    engine: Engine,
    cpu: usize,
}

impl Subject {
    fn new(fs: &BpfFs) -> Self {
        let cpu = nix::sched::sched_getcpu().unwrap();
        let mut set = nix::sched::CpuSet::new();
        set.set(cpu).unwrap();
        nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set).unwrap();
        let mut engine = Engine::open(fs.settings()).unwrap();
        engine.record(true).unwrap();
        Subject { engine, cpu }
    }

    /// Asks the kernel about a packet, whose configuration has been applied: the same decision, the right action, and each
    /// byte of what leaves.
    fn agrees(&mut self, pair: &Pair, packet: &[u8], v6: bool, expected: &Answer) -> Result<(), String> {
        let run = self.engine.test_run(true, &frame(packet, v6), 1).map_err(|e| e.to_string())?;
        let decisions = self.engine.last_decisions().map_err(|e| e.to_string())?;
        let seen = answer(&decisions[self.cpu], &pair.image);
        if seen != *expected {
            return Err(format!("the program says {seen:?}, the reference {expected:?}"));
        }
        let after = pair.reference.forwarded(packet, v6, expected);
        let result = match (expected, &after) {
            (Answer::Pass, _) => u32::MAX,
            (Answer::Forward { .. }, Some((true, _))) => 7,
            (Answer::Forward { .. }, Some((false, _))) => 0,
            _ => 2,
        };
        if run.result != result {
            return Err(format!("the program returned {}, not {}: {expected:?}", run.result as i32, result as i32));
        }
        let leaves = after.as_ref().map_or(packet, |(_, bytes)| bytes);
        // Of one that is dropped some part may have been changed.
        if result == 2 || run.packet[14..] == *leaves {
            return Ok(());
        }
        Err(format!("the program made of it {:02x?}, the reference {leaves:02x?}", &run.packet[14..]))
    }
}

/// All three about the packets of a case in their order, from scratch.
fn whole(subject: &mut Subject, case: &Case) -> Result<(), String> {
    subject.engine.apply(&case.config, &case.targets).map_err(|e| format!("{e:?}"))?;
    subject.engine.forget_fragments().map_err(|e| e.to_string())?;
    let pair = Pair::new(&case.config, &case.targets);
    for (packet, v6) in case.before.iter().chain([&(case.packet.clone(), case.v6)]) {
        let expected = pair.agree(packet, *v6)?;
        if runs(packet, *v6) {
            subject.agrees(&pair, packet, *v6, &expected)?;
        }
    }
    Ok(())
}

/// A million packets over 1,000 configurations. `MERIDIO_DIFF_CONFIGS` and `MERIDIO_DIFF_PACKETS` (per configuration) change
/// that, `MERIDIO_DIFF_SEED` begins at another configuration. A difference is printed as the smallest case that still shows
/// it.
#[test]
fn reference_host_and_kernel_agree() {
    // Fragments are remembered for two seconds, in the kernel by its clock.
    const FRESH: Duration = Duration::from_secs(1);
    let fs = BpfFs::new();
    let mut subject = Subject::new(&fs);
    let (configs, packets) = (number("MERIDIO_DIFF_CONFIGS", 1_000), number("MERIDIO_DIFF_PACKETS", 1_000));
    let first = number("MERIDIO_DIFF_SEED", 1);
    let (mut verdicts, mut later, mut translated, mut in_kernel) = ([0u64; 3], 0u64, 0u64, 0u64);
    let (started, mut applying) = (Instant::now(), Duration::ZERO);
    for seed in first..first + configs {
        let mut rng = Rng(seed);
        let (config, targets) = config(&mut rng);
        assert!(config.faults().is_empty(), "seed {seed}: {:?}", config.faults());
        let begun = Instant::now();
        subject.engine.apply(&config, &targets).unwrap();
        subject.engine.forget_fragments().unwrap();
        applying += begun.elapsed();
        let pair = Pair::new(&config, &targets);
        let mut case = Case { config, targets, before: Vec::new(), packet: Vec::new(), v6: false };
        let (mut since, mut n) = (Instant::now(), 0);
        while n < packets {
            (case.packet, case.v6) = packet(&mut rng);
            if since.elapsed() > FRESH {
                subject.engine.forget_fragments().unwrap();
                pair.forget();
                (since, case.before) = (Instant::now(), Vec::new());
            }
            let known = pair.reference.remembered();
            let result = pair.agree(&case.packet, case.v6).and_then(|expected| {
                if !runs(&case.packet, case.v6) {
                    return Ok(expected);
                }
                n += 1;
                subject.agrees(&pair, &case.packet, case.v6, &expected).map(|()| expected)
            });
            match result {
                Ok(Answer::Pass) => verdicts[0] += 1,
                Ok(Answer::Drop(_)) => verdicts[1] += 1,
                Ok(Answer::Forward { flow, nat_port, .. }) => {
                    verdicts[2] += 1;
                    later += flow.is_empty() as u64;
                    translated += (nat_port != 0) as u64;
                }
                Err(difference) => {
                    let small = shrink(case, &mut |case| whole(&mut subject, case).is_err());
                    let now = whole(&mut subject, &small);
                    panic!("seed {seed}, packet {n}: {difference}\nsmallest case: {now:?}\n{small}");
                }
            }
            if pair.reference.remembered() > known {
                case.before.push((case.packet.clone(), case.v6));
            }
        }
        in_kernel += n;
    }
    println!(
        "{configs} configurations in {:?} ({applying:?} to apply them): {verdicts:?} passed, dropped, forwarded, of these {later} later \
         fragments and {translated} translated; {in_kernel} in the kernel",
        started.elapsed()
    );
    assert_eq!(in_kernel, configs * packets, "as many as asked for in all three");
    let least = verdicts.into_iter().chain([later, translated]).min();
    assert!(
        least > Some(500) || in_kernel < 1_000_000,
        "a generator that proves little: {verdicts:?}, {later}, {translated}"
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
        let case = Case { config, targets, before: Vec::new(), packet, v6 };
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
            pairs[seed as usize].forget();
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
        let started = Instant::now();
        engine.apply(&config, &targets).unwrap();
        let applied = started.elapsed();
        let started = Instant::now();
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
