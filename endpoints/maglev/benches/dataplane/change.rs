//! From a changed target to packets that follow the new table.
//!
//! A socket sends datagrams of one flow without pause; the sink keeps the time of each next hop's first and last packet on the
//! same clock. The time runs from the call that tells the engine to the first packet at the new next hop, or the last one
//! at the old if that is later.
#![allow(unsafe_code)] // SAFETY: one call below, for the clock that eBPF reads too.

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Effort;
use crate::lanes::{Balancer, FIRST_PORT, Load};
use crate::programs::Programs;
use crate::report::{Samples, Section};
use crate::topology::{FAN, Topology, Way, pin};

/// Longer than a grace period of the kernel, so that a change does not wait for an earlier one.
const CALM: Duration = Duration::from_millis(500);
/// Packets that follow later than this never do.
const PATIENCE: Duration = Duration::from_secs(2);

fn now() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one live timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The one next hop that gets packets now.
fn winner(programs: &mut Programs, targets: u32) -> u32 {
    programs.forget(targets, true);
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
        if let Some(id) = (1..=targets).find(|id| programs.seen(*id)[0] > 0) {
            return id;
        }
    }
    panic!("no packet reached the fan");
}

/// Milliseconds until packets have moved away from `from`.
fn moved(programs: &Programs, targets: u32, from: u32, since: u64) -> f64 {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        let to = (1..=targets).filter(|id| *id != from).map(|id| programs.seen(id)[1]).find(|first| *first > since);
        if let Some(first) = to {
            // What is under way arrives within this.
            std::thread::sleep(Duration::from_millis(10));
            let last = programs.seen(from)[2];
            return (first.max(last) - since) as f64 / 1e6;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("packets did not follow the change within {PATIENCE:?}");
}

pub(crate) fn measure(
    effort: &Effort,
    topology: &Topology,
    balancer: &mut Balancer,
    programs: &mut Programs,
) -> Section {
    let sizes: &[u32] = if effort.quick { &[100] } else { &[100, FAN] };
    let mut figures: Vec<(String, Samples)> = Vec::new();
    for _ in 0..effort.rounds {
        for targets in sizes {
            for (what, calm) in [("after a pause", true), ("right after another", false)] {
                let [left, came] = round(topology, balancer, programs, *targets, calm);
                for (event, milliseconds) in [("leaves", left), ("comes back", came)] {
                    let name = format!("{targets} targets, one {event} {what}");
                    match figures.iter_mut().find(|(n, _)| *n == name) {
                        Some((_, samples)) => samples.add(milliseconds),
                        None => figures.push((name, Samples { values: vec![milliseconds], ratios: vec![] })),
                    }
                }
            }
        }
    }
    let mut section =
        Section::new("From a changed target to packets following the new table", &["change", "median ms", "worst ms"]);
    for (name, samples) in &figures {
        let worst = samples.values.iter().copied().fold(0.0, f64::max);
        section.row(
            &[name.clone(), format!("{:.2}", samples.median()), format!("{worst:.2}")],
            json!({"change": name, "median_ms": samples.median(), "worst_ms": worst, "samples": samples.values}),
        );
    }
    section
}

/// The target that serves the datagrams leaves and comes back.
fn round(topology: &Topology, balancer: &mut Balancer, programs: &mut Programs, targets: u32, calm: bool) -> [f64; 2] {
    balancer.configure(Load::new(100, targets), true);
    let (stream, all) = balancer.fan_stream(targets);
    let stop = Arc::new(AtomicBool::new(false));
    let end = stop.clone();
    let sender = topology.spawn("generator", move || {
        pin(0, 0);
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect((Way::Balancer.fan_vip(), FIRST_PORT + 50)).unwrap();
        while !end.load(Ordering::Relaxed) {
            let _ = socket.send(&[0; 20]);
            std::thread::sleep(Duration::from_micros(20));
        }
    });
    let pause = || {
        if calm {
            std::thread::sleep(CALM);
        }
    };
    let serving = winner(programs, targets);
    let mut without = all.clone();
    without.remove(&serving);
    pause();
    programs.forget(targets, true);
    let started = now();
    balancer.engine.set_targets(&stream, &without).unwrap_or_else(|e| panic!("{e}"));
    let left = moved(programs, targets, serving, started);
    let other = winner(programs, targets);
    pause();
    programs.forget(targets, true);
    let started = now();
    balancer.engine.set_targets(&stream, &all).unwrap_or_else(|e| panic!("{e}"));
    let came = moved(programs, targets, other, started);
    assert_eq!(winner(programs, targets), serving, "the target that came back has its packets again");
    stop.store(true, Ordering::Relaxed);
    sender.join().unwrap();
    [left, came]
}
