//! The same packets through the reference model, the decision on the host and the program in the kernel: one answer.

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
