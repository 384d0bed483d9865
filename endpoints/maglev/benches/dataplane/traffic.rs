//! Packets per second at saturation.
//!
//! The generator runs on CPU 0: an XDP program in the kernel's test-run mode with live frames (5.18) writes each packet and
//! redirects it into the cable. CPU 1 does everything else: takes packets off the cable, forwards, and counts and drops them
//! at the other end. It is saturated (checked), so one over the rate is the cost of a packet, sink included in all ways.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use aya::maps::{Array, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun, TestRunAttrs, TestRunOptions, Xdp, tc};
use aya::{Ebpf, EbpfLoader};
use serde_json::json;

use crate::Effort;
use crate::lanes::{Balancer, FIRST_PORT, Load};
use crate::peer::Peer;
use crate::report::{Samples, Section, median};
use crate::topology::{Topology, Way, pin};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"));
/// Different source ports; with as many for each destination port.
const SOURCE_PORTS: u32 = 10_000;
/// Packets of one call into the kernel. A call ends with a wait of tens of milliseconds for the kernel's grace period, in which
/// nothing is sent: so a sample is taken within one call.
const CALL: u32 = 1 << 22;
/// A call of so many says how long one of [`CALL`] takes, so that no sample outlasts it.
const TRIAL: u32 = 1 << 18;
/// Below this the figure is no saturation, and the run says so.
const BUSY: f64 = 0.95;

/// A UDP packet of 64 bytes with its Ethernet header, as the generator sends it.
pub(crate) fn packet(from: [u8; 6], to: [u8; 6], vip: std::net::Ipv4Addr, ports: (u16, u16)) -> Vec<u8> {
    let mut p = Vec::with_capacity(64);
    p.extend(to);
    p.extend(from);
    p.extend([0x08, 0x00, 0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1]);
    p.extend(vip.octets());
    p.extend(ports.0.to_be_bytes());
    p.extend(ports.1.to_be_bytes());
    p.extend([0, 30, 0, 0]);
    p.resize(64, 0);
    let sum: u32 = p[14..34].chunks_exact(2).map(|w| u16::from_be_bytes([w[0], w[1]]) as u32).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    p[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    p
}

/// The bench's own programs.
pub(crate) struct Programs {
    ebpf: Ebpf,
}

impl Programs {
    pub(crate) fn load(topology: &Topology) -> Self {
        let mut ebpf = EbpfLoader::new().load(OBJECT).unwrap();
        for name in ["sink", "parse"] {
            let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
            program.load().unwrap();
        }
        let generator: &mut Xdp = ebpf.program_mut("generate").unwrap().try_into().unwrap();
        generator.load().unwrap();
        topology.within("fan", || {
            tc::qdisc_add_clsact("mbf1").unwrap();
            let sink: &mut SchedClassifier = ebpf.program_mut("sink").unwrap().try_into().unwrap();
            let options = tc::TcAttachOptions::Netlink(tc::NlOptions::default());
            sink.attach_with_options("mbf1", aya::programs::TcAttachType::Ingress, options).unwrap();
        });
        Programs { ebpf }
    }

    /// Time of one run of the parse-only program, ns; the packet is an ordinary one.
    pub(crate) fn parse(&self, packet: &[u8], repeat: u32) -> f64 {
        let program: &SchedClassifier = self.ebpf.program("parse").unwrap().try_into().unwrap();
        let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
        let result = program.test_run(options).unwrap();
        assert_eq!(result.return_value, 0, "the parse-only program did not understand the packet");
        result.duration.as_nanos() as f64
    }

    fn total(&self) -> u64 {
        let total: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(self.ebpf.map("TOTAL").unwrap()).unwrap();
        total.get(&0, 0).unwrap().iter().sum()
    }

    /// Packets, first and last arrival (monotonic clock, ns; 0 without clock) at a next hop of the fan.
    pub(crate) fn seen(&self, identifier: u32) -> [u64; 3] {
        let seen: Array<&MapData, [u64; 3]> = Array::try_from(self.ebpf.map("SEEN").unwrap()).unwrap();
        seen.get(&identifier, 0).unwrap()
    }

    /// Forgets what was seen at the first `targets` next hops, and switches the clock.
    pub(crate) fn forget(&mut self, targets: u32, clock: bool) {
        let mut seen: Array<&mut MapData, [u64; 3]> = Array::try_from(self.ebpf.map_mut("SEEN").unwrap()).unwrap();
        (0..=targets).for_each(|id| seen.set(id, [0; 3], 0).unwrap());
        let mut switch: Array<&mut MapData, u32> = Array::try_from(self.ebpf.map_mut("CLOCK").unwrap()).unwrap();
        switch.set(0, clock as u32, 0).unwrap();
    }

    fn aim(&mut self, topology: &Topology, way: Way, flows: u32) -> Vec<u8> {
        let near = format!("mbg{}", way as u8);
        let packet = packet(
            topology.mac("generator", &near),
            topology.mac("middle", &way.interface()),
            way.fan_vip(),
            (20_000, FIRST_PORT),
        );
        let mut value = [0u8; 88];
        let words = [topology.index("generator", &near), 34, FIRST_PORT as u32, flows, SOURCE_PORTS, 0];
        for (to, word) in value.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        value[24..].copy_from_slice(&packet);
        let mut map: Array<&mut MapData, [u8; 88]> = Array::try_from(self.ebpf.map_mut("GENERATOR").unwrap()).unwrap();
        map.set(0, value, 0).unwrap();
        packet
    }

    fn generate(&self, packet: &[u8], repeat: u32) {
        let program: &Xdp = self.ebpf.program("generate").unwrap().try_into().unwrap();
        let attrs = TestRunAttrs::new().xdp_live_frames(64);
        program
            .test_run(TestRunOptions { data_in: Some(packet), repeat, attrs, ..TestRunOptions::default() })
            .unwrap_or_else(|e| panic!("live frames (they need Linux 5.18): {e}"));
    }

    /// Sends as much as CPU 0 can for a while; packets per second that arrived, and how busy CPU 1 was (0 to 1).
    pub(crate) fn saturate(&mut self, topology: &Topology, way: Way, flows: u32, time: Duration) -> (f64, f64) {
        const WARM: Duration = Duration::from_millis(100);
        let packet = self.aim(topology, way, flows);
        let this = &*self;
        let started = Instant::now();
        topology.within("generator", || {
            pin(0, 0);
            this.generate(&packet, TRIAL);
        });
        // A fifth more than the sample takes, as far as the trial can tell.
        let calls = (WARM + time).as_secs_f64() / started.elapsed().as_secs_f64();
        let repeat = (TRIAL as f64 * calls * 1.2).min(CALL as f64) as u32;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let generator = scope.spawn(|| {
                topology.within("generator", || {
                    pin(0, 0);
                    this.generate(&packet, repeat);
                    done.store(true, Ordering::Relaxed);
                });
            });
            std::thread::sleep(WARM);
            let (before, busy, started) = (this.total(), busy(1), Instant::now());
            // Until the time is over, or nearly all is sent: what comes after is no saturation.
            while started.elapsed() < time && !done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(5));
            }
            let (after, now, took) = (this.total(), self::busy(1), started.elapsed());
            generator.join().unwrap();
            ((after - before) as f64 / took.as_secs_f64(), (now.0 - busy.0) / (now.1 - busy.1))
        })
    }
}

/// Time that a CPU was not idle, and all time, in ticks.
fn busy(cpu: usize) -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let line = stat.lines().find(|line| line.starts_with(&format!("cpu{cpu} "))).unwrap();
    let ticks: Vec<f64> = line.split_whitespace().skip(1).take(8).map(|n| n.parse().unwrap()).collect();
    let all: f64 = ticks.iter().sum();
    (all - ticks[3] - ticks[4], all)
}

/// Rates of all ways, interleaved.
pub(crate) fn measure(
    effort: &Effort,
    topology: &Topology,
    balancer: &mut Balancer,
    programs: &mut Programs,
    peer: &mut Option<Peer>,
) -> Section {
    topology.own_core(true);
    let time = Duration::from_millis(if effort.quick { 250 } else { 500 });
    let loads = Load::all(effort.quick);
    let mut kernel = Samples::default();
    let mut ours: Vec<Samples> = loads.iter().map(|_| Samples::default()).collect();
    let mut theirs = Samples::default();
    let mut idle = 0;
    for round in 0..effort.rounds {
        // Plain forwarding before, between and after, so that its median belongs to the same minutes.
        let mut plain = Vec::new();
        for (n, load) in loads.iter().enumerate() {
            if n % 4 == 0 {
                let (rate, busy) = programs.saturate(topology, Way::Kernel, load.flows, time);
                idle += (busy < BUSY) as u32;
                plain.push(rate);
            }
            balancer.configure(*load, true);
            let (rate, busy) = programs.saturate(topology, Way::Balancer, load.flows, time);
            idle += (busy < BUSY) as u32;
            ours[n].add(rate);
        }
        if let Some(peer) = peer {
            let running = peer.start(topology, 4, true);
            theirs.add(programs.saturate(topology, Way::Peer, 1, time).0);
            running.stop();
        }
        kernel.add(median(&plain));
        for samples in ours.iter_mut().chain([&mut theirs]) {
            samples.relate(median(&plain));
        }
        eprintln!("packets: round {} of {}", round + 1, effort.rounds);
    }
    topology.own_core(false);
    let mut section = Section::new(
        "Small packets at saturation of one core (64 bytes, UDP, IPv4)",
        &["way", "packets/s", "ns/packet", "x kernel forwarding", "range"],
    );
    let mut row = |name: &str, s: &Samples| {
        let nanoseconds = 1e9 / s.median();
        section.row(
            &[
                name.to_owned(),
                format!("{:.0}", s.median()),
                format!("{nanoseconds:.0}"),
                format!("{:.2}", s.ratio()),
                s.range(),
            ],
            json!({"way": name, "packets_per_second": s.median(), "nanoseconds": nanoseconds, "ratio": s.ratio(),
                "ratios": s.ratios, "samples": s.values}),
        );
    };
    kernel.relate_to_itself();
    row("kernel forwarding", &kernel);
    for (load, samples) in loads.iter().zip(&ours) {
        row(&load.name(), samples);
    }
    if let Some(peer) = peer {
        row(&format!("{}, 1 flow, 4 targets", peer.name), &theirs);
    }
    if idle > 0 {
        section.note(format!("in {idle} samples CPU 1 was less than {:.0} % busy: not saturated", BUSY * 100.0));
    }
    section
}
