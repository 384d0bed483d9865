//! What the tests of the engine share: a BPF file system of their own, generated configurations and packets.
#![allow(dead_code)]
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

pub(crate) mod build;
pub(crate) mod flood;
pub(crate) mod generate;
pub(crate) mod net;
pub(crate) mod scene;
pub(crate) mod shrink;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use meridio_maglev::{Config, Counter, Engine, Flow, Options, Protocol, Reason, Settings, Stream, Targets};

#[allow(unused_imports)] // each test uses some
pub(crate) use generate::{Rng, config, frame, packet, target};

/// The VIPs of [`net::V4`] and [`net::V6`].
pub(crate) fn vips() -> Vec<ipnet::IpNet> {
    vec!["20.0.0.1/32".parse().unwrap(), "2000::1/128".parse().unwrap()]
}

/// A flow of stream `s` to both VIPs.
pub(crate) fn flow(name: &str, protocols: &[Protocol], ports: &[u16]) -> Flow {
    Flow {
        name: name.into(),
        stream: "s".into(),
        destinations: vips(),
        protocols: protocols.to_vec(),
        destination_ports: ports.iter().map(|port| (*port, *port)).collect(),
        ..Flow::default()
    }
}

/// Both VIPs, stream `s` with up to 100 targets, and these flows.
pub(crate) fn dual_stack(flows: Vec<Flow>) -> Config {
    let stream = Stream { name: "s".into(), max_targets: 100, sctp_ports_only: false };
    Config { vips: vips(), streams: vec![stream], flows, nats: vec![] }
}

/// A configured engine in the namespace of the load balancer, attached to the outside.
pub(crate) fn start(net: &net::Net, settings: Settings, config: Config, targets: BTreeMap<String, Targets>) -> Engine {
    net.run("l", move || {
        let mut engine = Engine::open(settings).unwrap();
        engine.apply(&config, &targets).unwrap();
        engine.attach("ext").unwrap();
        engine
    })
}

/// Packets that were counted for a reason.
pub(crate) fn packets_of(reasons: &[(Reason, Counter)], reason: Reason) -> u64 {
    reasons.iter().find(|(r, _)| *r == reason).unwrap().1.packets
}

/// A BPF file system mounted below a temporary directory, unmounted at the end.
pub(crate) struct BpfFs {
    dir: tempfile::TempDir,
}

impl BpfFs {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("mdt-bpf-").tempdir().unwrap();
        let status = Command::new("mount").args(["-t", "bpf", "bpf"]).arg(dir.path()).status().unwrap();
        assert!(status.success(), "mounting bpffs needs root");
        BpfFs { dir }
    }

    pub(crate) fn settings(&self) -> Settings {
        let mut kernel = Options::new(self.dir.path().join("lb"));
        kernel.chunks = 64;
        Settings { kernel, offset_start: 5000 }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("lb")
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        // An engine that is dropped only after this still holds it.
        let _ = Command::new("umount").arg("--lazy").arg(self.dir.path()).status();
    }
}
