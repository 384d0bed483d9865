//! The same packets through the reference model, the decision on the host and the program in the kernel: one answer.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use common::{BpfFs, Rng, config, frame, packet};
use meridio_maglev::reference::{Answer, Reference};
use meridio_maglev::{Decision, ETH_IPV4, ETH_IPV6, Engine, Image, Reason, Verdict};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// A decision in the words of the reference.
fn answer(decision: &Decision, image: &Image) -> Answer {
    if decision.verdict == Verdict::Pass as u32 {
        return Answer::Pass;
    }
    if decision.verdict == Verdict::Drop as u32 {
        let reason = Reason::ALL.into_iter().find(|r| *r as u32 == decision.reason).unwrap();
        return Answer::Drop(reason);
    }
    Answer::Forward {
        flow: image.flow_name(decision.flow).unwrap_or("").to_owned(),
        identifier: decision.identifier,
        nat_port: decision.nat_port as u16,
    }
}

/// `MERIDIO_DIFF_CONFIGS` and `MERIDIO_DIFF_PACKETS` (per configuration) make the run longer, `MERIDIO_DIFF_SEED`
/// repeats one.
#[test]
fn reference_host_and_kernel_agree() {
    let fs = BpfFs::new();
    let mut engine = Engine::open(fs.settings()).unwrap();
    engine.record(true).unwrap();
    let (configs, packets) = (number("MERIDIO_DIFF_CONFIGS", 40), number("MERIDIO_DIFF_PACKETS", 250));
    let first = number("MERIDIO_DIFF_SEED", 1);
    let mut verdicts = [0u64; 3];
    let mut runs = 0;
    for seed in first..first + configs {
        let mut rng = Rng(seed);
        let (config, targets) = config(&mut rng);
        assert!(config.faults().is_empty(), "seed {seed}: {:?}", config.faults());
        engine.apply(&config, &targets).unwrap();
        let reference = Reference::new(config.clone(), targets.clone());
        for n in 0..packets {
            let (bytes, v6) = packet(&mut rng);
            // A fresh image: later fragments are the reference's blind spot.
            let image_answer = {
                let image = cached(&config, &targets, n == 0);
                image(&bytes, v6)
            };
            let expected = reference.answer(&bytes, v6);
            let context = || format!("seed {seed} packet {n}: {bytes:02x?}\nconfig {config:#?}");
            assert_eq!(image_answer, expected, "host: {}", context());
            verdicts[match expected {
                Answer::Pass => 0,
                Answer::Drop(_) => 1,
                Answer::Forward { .. } => 2,
            }] += 1;
            // The kernel refuses test runs of packets without a network header, and wants 14 bytes behind it.
            if bytes.len() < if v6 { 40 } else { 20 } {
                continue;
            }
            runs += 1;
            let run = engine.test_run(true, &frame(&bytes, v6), 1).unwrap();
            let wanted = match expected {
                Answer::Pass => u32::MAX,
                // The kernel may well have seen the first fragment: identifications repeat.
                Answer::Drop(Reason::FragmentUnknown) => run.result,
                Answer::Drop(_) => 2,
                Answer::Forward { .. } => run.result,
            };
            assert_eq!(run.result, wanted, "kernel, {expected:?}: {}", context());
            if expected == Answer::Drop(Reason::FragmentUnknown) {
                continue;
            }
            let decisions = engine.last_decisions().unwrap();
            let seen: Vec<Answer> =
                decisions.iter().map(|d| IMAGE.with_borrow(|i| answer(d, i.as_ref().unwrap()))).collect();
            assert!(seen.contains(&expected), "kernel: {seen:?}, expected {expected:?}: {}", context());
            if matches!(expected, Answer::Forward { .. }) {
                assert!(matches!(run.result, 0 | 7), "kernel returned {}: {}", run.result, context());
            }
        }
    }
    println!("{configs} configurations: {verdicts:?} passed, dropped, forwarded; {runs} in the kernel");
    assert!(
        verdicts.iter().all(|v| *v > 100 || configs * packets < 5000),
        "a generator that proves little: {verdicts:?}"
    );
}

thread_local! {
    static IMAGE: std::cell::RefCell<Option<Image>> = const { std::cell::RefCell::new(None) };
}

/// The host's answer, from an image that is built once per configuration and forgets fragments.
fn cached(
    config: &meridio_maglev::Config,
    targets: &std::collections::BTreeMap<String, meridio_maglev::Targets>,
    fresh: bool,
) -> impl Fn(&[u8], bool) -> Answer + use<> {
    if fresh {
        IMAGE.set(Some(Image::new(config, targets).unwrap()));
    }
    |bytes, v6| {
        IMAGE.with_borrow(|image| {
            let image = image.as_ref().unwrap();
            image.forget_fragments();
            answer(&image.decide(bytes, if v6 { ETH_IPV6 } else { ETH_IPV4 }), image)
        })
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
