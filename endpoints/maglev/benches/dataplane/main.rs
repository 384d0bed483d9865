//! Figures of the data plane, all of one run, as ratios to plain kernel forwarding on the same topology.
//!
//! `sudo tools/bench dataplane [--quick] [--rounds=N] [PART...]`; parts: tables, packets, program, latency,
//! connections, throughput, change.
//! Prints tables, then which aims hold; writes `target/bench/dataplane.json`. See [`peer`] for another balancer in the same tables.
#![allow(clippy::unwrap_used)] // a bench that cannot go on ends with what was in its way

mod aims;
mod change;
mod lanes;
mod peer;
mod program;
mod programs;
mod report;
mod sockets;
mod tables;
mod topology;
mod traffic;

use std::time::Instant;

use lanes::Balancer;
use peer::Peer;
use programs::Programs;
use report::Report;
use topology::Topology;

/// What can be asked for by name.
const PARTS: [&str; 7] = ["tables", "packets", "program", "latency", "connections", "throughput", "change"];

/// Rounds that a median is over at least, for a figure that says something.
const ROUNDS: usize = 5;

/// How much is measured.
pub(crate) struct Effort {
    /// Interleaved rounds; the medians are over these.
    pub(crate) rounds: usize,
    /// Short samples and fewer sizes: shows that everything works, the figures mean little.
    pub(crate) quick: bool,
}

fn main() {
    let (mut quick, mut rounds, mut parts) = (false, None, Vec::new());
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            // cargo bench says so to every bench.
            "--bench" => {}
            "--quick" => quick = true,
            option if option.starts_with("--rounds=") => {
                rounds = option["--rounds=".len()..].parse().ok().filter(|n| *n > 0)
            }
            part if PARTS.contains(&part) => parts.push(part.to_owned()),
            other => {
                eprintln!("{other:?}: neither --quick nor --rounds=N, and not one of {}", PARTS.join(", "));
                std::process::exit(64);
            }
        }
    }
    if !nix::unistd::geteuid().is_root() {
        eprintln!("the data-plane bench needs root (network namespaces, eBPF)");
        std::process::exit(1);
    }
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|p| p == part);
    let effort = Effort { rounds: rounds.unwrap_or(if quick { 2 } else { ROUNDS }), quick };
    let started = Instant::now();
    let mut report = Report::new(&effort);

    let topology = Topology::new();
    let mut programs = Programs::load(&topology);
    let mut balancer = Balancer::new(&topology);
    let mut peer = Peer::from_environment();

    if wanted("tables") {
        report.add("tables", tables::measure(&effort));
    }
    if wanted("program") {
        report.add("program", program::measure(&effort, &topology, &mut balancer, &programs));
    }
    if wanted("packets") {
        for (name, v6) in [("packets", false), ("packets_ipv6", true)] {
            report.add(name, traffic::measure(&effort, &topology, &mut balancer, &mut programs, &mut peer, v6));
        }
    }
    sockets::serve(&topology);
    for v6 in [false, true] {
        let name = |part: &str| if v6 { format!("{part}_ipv6") } else { part.to_owned() };
        if wanted("latency") {
            report.add(&name("latency"), sockets::latency(&effort, &topology, &mut balancer, &mut peer, v6));
        }
        if wanted("connections") {
            report.add(&name("connections"), sockets::connections(&effort, &topology, &mut balancer, &mut peer, v6));
        }
        if wanted("throughput") {
            report.add(&name("throughput"), sockets::throughput(&effort, &topology, &mut balancer, &mut peer, v6));
        }
    }
    if wanted("change") {
        report.add("change", change::measure(&effort, &topology, &mut balancer, &mut programs));
    }
    report.write(started.elapsed());
}
