//! Another balancer in the same tables.
//!
//! `MERIDIO_BENCH_PEER='NAME=COMMAND'`: COMMAND is run by `sh -c`, in the network namespace of the machine in the middle, with
//!
//! | variable | meaning |
//! |---|---|
//! | `BENCH_NETNS` | name of that namespace below /run/netns |
//! | `BENCH_INTERFACE` | interface that packets arrive at |
//! | `BENCH_VIPS` | VIPs, separated by spaces |
//! | `BENCH_PORT` | the port (TCP and UDP) of its one flow |
//! | `BENCH_TARGETS` | `IDENTIFIER:ADDRESS:INTERFACE` of each target, separated by spaces: next hops, which hold the VIPs |
//!
//! It prints a line that begins with `ready` when it forwards, goes on until its standard input is closed, then removes
//! everything that it has set up, and ends. It is started anew for each sample, so that it costs the other ways nothing.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use crate::lanes::FIRST_PORT;
use crate::topology::{TARGET, Topology, Way, fan_address};

pub(crate) struct Peer {
    pub(crate) name: String,
    command: String,
}

/// A balancer that forwards.
pub(crate) struct Running(Child);

impl Peer {
    pub(crate) fn from_environment() -> Option<Self> {
        let text = std::env::var("MERIDIO_BENCH_PEER").ok()?;
        let (name, command) = text.split_once('=').unwrap_or_else(|| {
            eprintln!("MERIDIO_BENCH_PEER={text:?} is not of the form NAME=COMMAND");
            std::process::exit(64);
        });
        Some(Peer { name: name.to_owned(), command: command.to_owned() })
    }

    /// Starts it with so many targets; `fan`: those of the fan, else the real one under as many identifiers.
    pub(crate) fn start(&self, topology: &Topology, targets: u32, fan: bool) -> Running {
        let vip = if fan { Way::Peer.fan_vip() } else { Way::Peer.target_vip() };
        let list: Vec<String> = (1..=targets)
            .map(|id| if fan { format!("{id}:{}:mbf0", fan_address(id)) } else { format!("{id}:{TARGET}:mbt0") })
            .collect();
        let mut child = Command::new("ip")
            .args(["netns", "exec", &topology.name("middle"), "sh", "-c", &self.command])
            .env("BENCH_NETNS", topology.name("middle"))
            .env("BENCH_INTERFACE", Way::Peer.interface())
            .env("BENCH_VIPS", vip.to_string())
            .env("BENCH_PORT", FIRST_PORT.to_string())
            .env("BENCH_TARGETS", list.join(" "))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{}: {e}", self.command));
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready = lines.by_ref().map_while(Result::ok).any(|line| line.starts_with("ready"));
        if !ready {
            let status = child.wait().map(|s| s.to_string()).unwrap_or_default();
            panic!("{} ended without a line that begins with \"ready\" ({status})", self.name);
        }
        // What else it prints must not block it.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Running(child)
    }
}

impl Running {
    /// Closes its input and waits for its end.
    pub(crate) fn stop(mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
