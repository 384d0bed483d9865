//! The bench's own programs: generator, sink, parse-only.
#![allow(unsafe_code)] // SAFETY: signals of threads below; each call says why.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use aya::maps::{Array, MapData, PerCpuArray};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, TestRun, TestRunAttrs, TestRunOptions, Xdp, tc};
use aya::{Ebpf, EbpfLoader};

use crate::lanes::FIRST_PORT;
use crate::topology::{Topology, Way, pin};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bench.bpf.o"));
/// Different source ports; with as many for each destination port.
const SOURCE_PORTS: u32 = 10_000;
/// Frames between two flushes of the generator; the most that kernels take.
const BATCH: u32 = 256;

/// A UDP packet of 64 bytes with its Ethernet header, as the generator sends it.
pub(crate) fn packet(from: [u8; 6], to: [u8; 6], vip: IpAddr, ports: (u16, u16)) -> Vec<u8> {
    let mut p = Vec::with_capacity(64);
    p.extend(to);
    p.extend(from);
    let length = match vip {
        IpAddr::V4(vip) => {
            p.extend([0x08, 0x00, 0x45, 0, 0, 50, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1]);
            p.extend(vip.octets());
            let sum: u32 = p[14..34].chunks_exact(2).map(|w| u16::from_be_bytes([w[0], w[1]]) as u32).sum();
            let sum = (sum & 0xffff) + (sum >> 16);
            p[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
            30
        }
        IpAddr::V6(vip) => {
            p.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 10, 17, 64, 0xfd, 0, 0, 0x10]);
            p.extend([0; 11]);
            p.push(1);
            p.extend(vip.octets());
            10
        }
    };
    p.extend(ports.0.to_be_bytes());
    p.extend(ports.1.to_be_bytes());
    p.extend([0, length, 0, 0]);
    p.resize(64, 0);
    p
}

/// A thread that generates, and how to stop it.
pub(crate) struct Generating(libc::pthread_t);

impl Generating {
    /// The calling thread.
    pub(crate) fn here() -> Self {
        // SAFETY: a handler that does nothing, without SA_RESTART: the signal only ends a call into the kernel.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as *const () as usize;
            libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
            Generating(libc::pthread_self())
        }
    }

    /// Ends the call into the kernel that it is in. The thread must still run.
    pub(crate) fn interrupt(&self) {
        // SAFETY: the thread lives (the caller's duty); the handler is set.
        unsafe { libc::pthread_kill(self.0, libc::SIGUSR1) };
    }
}

extern "C" fn ignore(_: libc::c_int) {}

/// The programs, loaded; the sink is attached.
pub(crate) struct Programs {
    ebpf: Ebpf,
    /// Packets per second that saturated each way the last time.
    rates: [Option<f64>; 3],
    links: [Option<Cable>; 3],
}

/// The first cable of a way: the generator's interface, its link address, and that of the other end.
#[derive(Clone, Copy)]
struct Cable {
    index: u32,
    from: [u8; 6],
    to: [u8; 6],
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
            let sink: &mut SchedClassifier = ebpf.program_mut("sink").unwrap().try_into().unwrap();
            // Where the kernel has TCX this attaches by it, which adds less to what is measured.
            tc::qdisc_add_clsact("mbf1").unwrap();
            sink.attach("mbf1", TcAttachType::Ingress).unwrap();
        });
        Programs { ebpf, rates: [None; 3], links: [None; 3] }
    }

    /// Packets per second that saturated a way the last time.
    pub(crate) fn rate(&self, way: Way) -> Option<f64> {
        self.rates[way as usize]
    }

    /// See [`Programs::rate`].
    pub(crate) fn set_rate(&mut self, way: Way, rate: f64) {
        self.rates[way as usize] = Some(rate);
    }

    /// Time of one run of the parse-only program, ns; the packet is an ordinary one.
    pub(crate) fn parse(&self, packet: &[u8], repeat: u32) -> f64 {
        let program: &SchedClassifier = self.ebpf.program("parse").unwrap().try_into().unwrap();
        let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
        let result = program.test_run(options).unwrap();
        assert_eq!(result.return_value, 0, "the parse-only program did not understand the packet");
        result.duration.as_nanos() as f64
    }

    fn sum(&self, map: &str) -> u64 {
        let map: PerCpuArray<&MapData, u64> = PerCpuArray::try_from(self.ebpf.map(map).unwrap()).unwrap();
        map.get(&0, 0).unwrap().iter().sum()
    }

    /// Packets that the sink has seen.
    pub(crate) fn total(&self) -> u64 {
        self.sum("TOTAL")
    }

    /// Packets that were generated.
    pub(crate) fn sent(&self) -> u64 {
        self.sum("SEQUENCE")
    }

    /// Packets, first and last arrival (monotonic clock, ns) at a next hop of the fan while the clock was on.
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

    /// Tells the generator what to send, and how many packets per second; the packet is its first.
    pub(crate) fn aim(&mut self, topology: &Topology, way: Way, v6: bool, flows: u32, rate: f64) -> Vec<u8> {
        let vip: IpAddr = if v6 { way.fan_vip6().into() } else { way.fan_vip().into() };
        let near = format!("mbg{}", way as u8);
        // Asked once: there are hundreds of samples.
        let Cable { index, from, to } = *self.links[way as usize].get_or_insert_with(|| {
            let (index, from) = (topology.index("generator", &near), topology.mac("generator", &near));
            Cable { index, from, to: topology.mac("middle", &way.interface()) }
        });
        let packet = packet(from, to, vip, (20_000, FIRST_PORT));
        let ports_at = if v6 { 54 } else { 34 };
        let mut value = [0u8; 88];
        let words = [index, ports_at, FIRST_PORT as u32, flows, SOURCE_PORTS, (256e9 / rate) as u32];
        for (to, word) in value.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        value[24..].copy_from_slice(&packet);
        let mut map: Array<&mut MapData, [u8; 88]> = Array::try_from(self.ebpf.map_mut("GENERATOR").unwrap()).unwrap();
        map.set(0, value, 0).unwrap();
        packet
    }

    /// Sends from CPU 0 until `stop` and an interruption. One call into the kernel, because each ends with a wait of tens of
    /// milliseconds in which nothing is sent.
    pub(crate) fn generate(&self, packet: &[u8], stop: &AtomicBool) {
        pin(0, 0);
        let program: &Xdp = self.ebpf.program("generate").unwrap().try_into().unwrap();
        while !stop.load(Ordering::Relaxed) {
            let attrs = TestRunAttrs::new().xdp_live_frames(BATCH);
            let options =
                TestRunOptions { data_in: Some(packet), repeat: u32::MAX, attrs, ..TestRunOptions::default() };
            match program.test_run(options) {
                Err(ProgramError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => panic!("live frames (they need Linux 5.18): {error}"),
                Ok(_) => {}
            }
        }
    }
}
