//! Packets per second at saturation.
//!
//! The generator runs on CPU 0: an XDP program in the kernel's test-run mode with live frames (5.18) writes each packet and
//! redirects it into the cable. CPU 1 does everything else: takes packets off the cable, forwards, and counts and drops them
//! at the other end. A sample counts as saturated when CPU 1 was never idle and more was offered than arrived, so one over
//! the rate is the cost of a packet, sink included in all ways.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Effort;
use crate::lanes::{Balancer, Load};
use crate::peer::Peer;
use crate::programs::Programs;
use crate::report::{Samples, Section, median};
use crate::topology::{Topology, Way};

/// Share of its time that CPU 1 has to be busy at least.
const BUSY: f64 = 0.92;
/// What is offered has to be so many times what arrives, at least.
const OVERLOAD: f64 = 1.05;

/// Packets per second that are offered at first; later what was right the last time.
const FIRST_RATE: f64 = 2e6;
/// So many times what arrived is offered next.
const NEXT: f64 = 1.12;
/// So many times as much is offered after what was not enough.
const MORE: f64 = 1.3;
/// What is offered is not to be more than so many times what arrives, if that can be had in so many attempts.
const NEAR: f64 = 1.35;
/// See [`NEAR`].
const ATTEMPTS: u32 = 4;

/// Of one way and plain forwarding in turn, so many samples make a figure of a round: the speed of a shared machine changes within
/// a second, by more than what is to be seen.
const PAIRS: usize = 4;
/// Length of a sample.
const SAMPLE: Duration = Duration::from_millis(100);

/// What one sample has shown.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Packets per second that the generator sent.
    offered: f64,
    /// Packets per second at the sink.
    arrived: f64,
    /// Share of its time that CPU 1 was not idle.
    busy: f64,
}

impl Sample {
    fn saturated(self) -> bool {
        self.busy >= BUSY && self.offered >= OVERLOAD * self.arrived
    }
}

/// Offers a little more than CPU 1 can take. Not much more: each packet that is refused at the cable's end goes back to where CPU 1
/// returns its own, and the two wait for each other there, which would be measured instead of the forwarding.
fn saturate(programs: &mut Programs, topology: &Topology, way: Way, v6: bool, flows: u32, time: Duration) -> Sample {
    let mut rate = programs.rate(way).unwrap_or(FIRST_RATE);
    let mut best: Option<Sample> = None;
    for _ in 0..ATTEMPTS {
        let sample = offer(programs, topology, way, v6, (flows, rate), time);
        if sample.saturated() {
            // A sample during which the machine had something else to do leads to a rate that is too low for the next one.
            if best.is_none_or(|best| sample.arrived > best.arrived) {
                best = Some(sample);
            }
            if sample.offered <= NEAR * sample.arrived {
                programs.set_rate(way, sample.arrived * NEXT);
                break;
            }
            rate = sample.arrived * NEXT;
        } else if sample.offered < 0.9 * rate {
            // A machine that lacks a core for the generator shows the same as one that forwards everything.
            return best.unwrap_or(sample);
        } else {
            rate *= MORE;
        }
    }
    best.unwrap_or_else(|| offer(programs, topology, way, v6, (flows, FIRST_RATE), time))
}

/// Sends so many packets per second for a while.
fn offer(
    programs: &mut Programs,
    topology: &Topology,
    way: Way,
    v6: bool,
    (flows, rate): (u32, f64),
    time: Duration,
) -> Sample {
    const WARM: Duration = Duration::from_millis(40);
    let packet = programs.aim(topology, way, v6, flows, rate);
    let this = &*programs;
    let (stop, ended) = (Arc::new(AtomicBool::new(false)), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let (thread, is_thread) = std::sync::mpsc::channel();
        let (end, ended) = (stop.clone(), &ended);
        scope.spawn(move || {
            topology.within("generator", || {
                thread.send(crate::programs::Generating::here()).unwrap();
                this.generate(&packet, &end);
                ended.store(true, Ordering::Relaxed);
            });
        });
        let generating = is_thread.recv().unwrap();
        std::thread::sleep(WARM);
        let (sent, before, was, started) = (this.sent(), this.total(), busy(1), Instant::now());
        std::thread::sleep(time);
        let (after, is, took, now_sent) = (this.total(), busy(1), started.elapsed().as_secs_f64(), this.sent());
        stop.store(true, Ordering::Relaxed);
        while !ended.load(Ordering::Relaxed) {
            generating.interrupt();
            std::thread::sleep(Duration::from_millis(1));
        }
        Sample {
            offered: (now_sent - sent) as f64 / took,
            arrived: (after - before) as f64 / took,
            busy: (is.0 - was.0) / (is.1 - was.1),
        }
    })
}

/// Time that a CPU was not idle, and all time, in ticks.
fn busy(cpu: usize) -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let line = stat.lines().find(|line| line.starts_with(&format!("cpu{cpu} "))).unwrap();
    let ticks: Vec<f64> = line.split_whitespace().skip(1).take(8).map(|n| n.parse().unwrap()).collect();
    let all: f64 = ticks.iter().sum();
    (all - ticks[3] - ticks[4], all)
}

/// One way at one load, over the rounds.
#[derive(Default)]
struct Figures {
    rate: Samples,
    offered: Vec<f64>,
    busy: Vec<f64>,
    idle: u32,
}

impl Figures {
    fn add(&mut self, samples: &[Sample], ratio: f64) {
        let of = |what: fn(&Sample) -> f64| median(&samples.iter().map(what).collect::<Vec<_>>());
        self.offered.push(of(|s| s.offered));
        self.busy.push(of(|s| s.busy));
        self.idle += samples.iter().filter(|s| !s.saturated()).count() as u32;
        self.rate.pair(of(|s| s.arrived), ratio);
    }
}

/// A way and plain forwarding in turn, and the ratio of each sample to what was forwarded just before and after it: their median.
fn in_turn(
    pairs: usize,
    mut plain: impl FnMut() -> Sample,
    mut way: impl FnMut() -> Sample,
) -> (Vec<Sample>, Vec<Sample>, f64) {
    let (mut reference, mut samples, mut ratios) = (vec![plain()], vec![], vec![]);
    for _ in 0..pairs {
        let (before, sample, after) = (reference[reference.len() - 1], way(), plain());
        ratios.push(2.0 * sample.arrived / (before.arrived + after.arrived));
        samples.push(sample);
        reference.push(after);
    }
    (reference, samples, median(&ratios))
}

/// Rates of all ways, interleaved, of one IP version.
pub(crate) fn measure(
    effort: &Effort,
    topology: &Topology,
    balancer: &mut Balancer,
    programs: &mut Programs,
    peer: &mut Option<Peer>,
    v6: bool,
) -> Section {
    let version = if v6 { "IPv6" } else { "IPv4" };
    topology.own_core(true);
    let pairs = if effort.quick { 2 } else { PAIRS };
    let loads = if v6 { Load::few() } else { Load::all(effort.quick) };
    let mut kernel = Figures::default();
    let mut ours: Vec<Figures> = loads.iter().map(|_| Figures::default()).collect();
    let mut theirs = Figures::default();
    for round in 0..effort.rounds {
        let mut plain = vec![];
        let shared = std::cell::RefCell::new(&mut *programs);
        let sample = |way, flows| saturate(&mut shared.borrow_mut(), topology, way, v6, flows, SAMPLE);
        let mut compare = |figures: &mut Figures, way, flows| {
            let (reference, samples, ratio) = in_turn(pairs, || sample(Way::Kernel, flows), || sample(way, flows));
            plain.extend(reference);
            figures.add(&samples, ratio);
        };
        for (figures, load) in ours.iter_mut().zip(&loads) {
            balancer.configure(*load, true);
            compare(figures, Way::Balancer, load.flows);
        }
        if let Some(peer) = peer.as_ref().filter(|_| !v6) {
            let running = peer.start(topology, 4, true);
            compare(&mut theirs, Way::Peer, 1);
            running.stop();
        }
        kernel.add(&plain, 1.0);
        eprintln!("packets, {version}: round {} of {}", round + 1, effort.rounds);
    }
    topology.own_core(false);
    kernel.rate.relate_to_itself();
    let mut rows = vec![("kernel forwarding".to_owned(), kernel)];
    rows.extend(loads.iter().map(|load| load.name()).zip(ours));
    if let Some(peer) = peer.as_ref().filter(|_| !v6) {
        rows.push((format!("{}, 1 flow, 4 targets", peer.name), theirs));
    }
    section(version, &rows)
}

fn section(version: &str, rows: &[(String, Figures)]) -> Section {
    let mut section = Section::new(
        &format!("Small packets at saturation of one core (UDP, {version})"),
        &["way", "packets/s", "ns/packet", "x kernel forwarding", "range", "offered/s", "CPU busy"],
    );
    for (name, f) in rows {
        let (rate, offered, busy) = (f.rate.median(), median(&f.offered), median(&f.busy));
        section.row(
            &[
                name.clone(),
                format!("{rate:.0}"),
                format!("{:.0}", 1e9 / rate),
                format!("{:.2}", f.rate.ratio()),
                f.rate.range(),
                format!("{offered:.0}"),
                format!("{:.0} %", busy * 100.0),
            ],
            json!({"way": name, "packets_per_second": rate, "nanoseconds": 1e9 / rate, "ratio": f.rate.ratio(),
                "ratios": f.rate.ratios, "samples": f.rate.values, "offered_per_second": offered, "busy": busy,
                "not_saturated": f.idle}),
        );
    }
    let idle: u32 = rows.iter().map(|(_, f)| f.idle).sum();
    if idle > 0 {
        section.note(format!(
            "{idle} samples not saturated: CPU 1 less than {:.0} % busy, or offered less than {OVERLOAD} times what arrived",
            BUSY * 100.0
        ));
    }
    section
}
