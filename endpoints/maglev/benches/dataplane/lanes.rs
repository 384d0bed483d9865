//! The load balancer under test, and what it is configured to.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use meridio_maglev::config::Bytes;
use meridio_maglev::{Config, Engine, Flow, Nat, Options, Protocol, Settings, Stream, Target, Targets};

use crate::topology::{FAN, TARGET, TARGET6, Topology, Way, fan_address, fan_address6};

/// Numbers of flows and of targets that are compared.
pub(crate) const FLOWS: [u32; 5] = [1, 10, 100, 1_000, 2_000];
pub(crate) const TARGETS: [u32; 3] = [4, 100, 1_000];
/// Destination port of the first flow; each flow has one of its own.
pub(crate) const FIRST_PORT: u16 = 1_000;

/// What the classifier is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Load {
    /// Flows on one VIP, told apart by their port.
    pub(crate) flows: u32,
    /// Ready targets of the stream.
    pub(crate) targets: u32,
    /// What the flows are like.
    pub(crate) kind: Kind,
}

/// What flows are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Told apart by their destination port.
    Plain,
    /// As well, and every dimension is in use: sources, source ports, byte matches, port translation.
    Everything,
    /// As costly to search as flows can be: every second one matches the packet's destination port, the others its source port,
    /// only the last one both, and all lists of byte matches are in use, each of as many statements as there can be.
    Adversarial,
    /// As plain ones, and all packets go past the kernel's neighbour entries, as they do where a target's link is no veth pair.
    Neighbours,
}

impl Load {
    pub(crate) fn new(flows: u32, targets: u32) -> Self {
        Load { flows, targets, kind: Kind::Plain }
    }

    /// The combinations of flows and targets, one with everything, and one past the neighbour entries.
    pub(crate) fn all(quick: bool) -> Vec<Load> {
        let mut all = match quick {
            true => Self::few(),
            false => TARGETS.iter().flat_map(|t| FLOWS.map(|f| Load::new(f, *t))).collect(),
        };
        all.push(Load { kind: Kind::Everything, ..Load::new(1_000, 1_000) });
        all.push(Load { kind: Kind::Neighbours, ..Load::new(1, 4) });
        all
    }

    /// The ends of the range.
    pub(crate) fn few() -> Vec<Load> {
        vec![Load::new(1, 4), Load::new(1_000, 1_000)]
    }

    /// Name in tables.
    pub(crate) fn name(self) -> String {
        let kind = match self.kind {
            Kind::Plain => "",
            Kind::Everything => ", every dimension",
            Kind::Adversarial => ", as costly as can be",
            Kind::Neighbours => ", past neighbour entries",
        };
        let plural = if self.flows == 1 { "" } else { "s" };
        format!("{} flow{plural}, {} targets{kind}", self.flows, self.targets)
    }
}

/// Streams: the fan's by their number of targets, the same numbers with the one real target behind each, and the fan's once more past
/// neighbour entries.
fn streams() -> Vec<(String, u32, Behind)> {
    let of = |n: &u32| [Behind::Fan, Behind::Target, Behind::Neighbours].map(|behind| (behind.stream(*n), *n, behind));
    TARGETS.iter().flat_map(of).collect()
}

/// What is behind the targets of a stream.
#[derive(Clone, Copy)]
enum Behind {
    Fan,
    Target,
    Neighbours,
}

impl Behind {
    fn stream(self, targets: u32) -> String {
        let name = match self {
            Behind::Fan => "fan",
            Behind::Target => "target",
            Behind::Neighbours => "neighbours",
        };
        format!("{name}-{targets}")
    }
}

pub(crate) struct Balancer {
    pub(crate) engine: Engine,
    targets: BTreeMap<String, Targets>,
    now: Option<(Load, bool)>,
    _fs: BpfFs,
}

impl Balancer {
    /// Attached to its way.
    pub(crate) fn new(topology: &Topology) -> Self {
        let mut balancer = Self::open(topology, true);
        let engine = &mut balancer.engine;
        topology.within("middle", || engine.attach(&Way::Balancer.interface()).unwrap_or_else(|e| panic!("{e}")));
        balancer
    }

    /// Attached nowhere; with or without the trace in its program.
    pub(crate) fn open(topology: &Topology, trace: bool) -> Self {
        let fs = BpfFs::new();
        let kernel = Options { trace, ..Options::new(fs.0.path().join("lb")) };
        let (fan, target) = (topology.index("middle", "mbf0"), topology.index("middle", "mbt0"));
        let hop = |v4: Ipv4Addr, v6: Ipv6Addr, index| Target {
            v4: Some((v4, index)),
            v6: Some((v6, index)),
            direct: true,
            ..Target::default()
        };
        let targets = streams()
            .into_iter()
            .map(|(name, n, behind)| {
                let one = |id| match behind {
                    Behind::Fan => hop(fan_address(id), fan_address6(id), fan),
                    Behind::Target => hop(TARGET, TARGET6, target),
                    Behind::Neighbours => Target { direct: false, ..hop(fan_address(id), fan_address6(id), fan) },
                };
                (name, (1..=n).map(|id| (id, one(id))).collect())
            })
            .collect();
        let engine = topology.within("middle", || {
            Engine::open(Settings { kernel, offset_start: 5_000 }).unwrap_or_else(|e| panic!("{e}"))
        });
        Balancer { engine, targets, now: None, _fs: fs }
    }

    /// Takes a configuration in use; `fan`: traffic goes to the fan, else to the target.
    pub(crate) fn configure(&mut self, load: Load, fan: bool) {
        if self.now == Some((load, fan)) {
            return;
        }
        let config = config(load, fan);
        self.engine.apply(&config, &self.targets).unwrap_or_else(|e| panic!("{e:?}"));
        self.now = Some((load, fan));
    }

    /// The stream that a configuration of the fan uses, with its targets.
    pub(crate) fn fan_stream(&self, targets: u32) -> (String, Targets) {
        let name = Behind::Fan.stream(targets);
        let targets = self.targets.get(&name).cloned().unwrap_or_default();
        (name, targets)
    }
}

fn config(load: Load, fan: bool) -> Config {
    let way = Way::Balancer;
    let (v4, v6) = if fan { (way.fan_vip(), way.fan_vip6()) } else { (way.target_vip(), way.target_vip6()) };
    let vip = IpNet::V4(Ipv4Net::from(v4));
    let vips = vec![vip, IpNet::V6(Ipv6Net::from(v6))];
    let behind = match fan {
        _ if load.kind == Kind::Neighbours => Behind::Neighbours,
        true => Behind::Fan,
        false => Behind::Target,
    };
    let stream = behind.stream(load.targets);
    let flow = |n: u32| {
        let port = FIRST_PORT + n as u16;
        let mut flow = Flow {
            name: format!("flow-{n:04}"),
            stream: stream.clone(),
            destinations: vips.clone(),
            protocols: vec![Protocol::Tcp, Protocol::Udp],
            destination_ports: vec![(port, port)],
            ..Flow::default()
        };
        if load.kind == Kind::Adversarial {
            // A port that no packet of the bench has.
            let other = vec![(1, 1)];
            let list = |n: u32| {
                let one = |at: u32| Bytes::parse(&format!("udp[{at}:1] & 0x{:x} = 0", 1 + n)).unwrap();
                (4..8).map(one).collect()
            };
            (flow.destination_ports, flow.source_ports, flow.byte_matches) = match n {
                _ if n + 1 == load.flows => (vec![], vec![], vec![]),
                _ if n.is_multiple_of(2) => (vec![], other, list(n % 32)),
                _ => (other, vec![], list(n % 32)),
            };
        }
        if load.kind == Kind::Everything {
            flow.sources = vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()];
            flow.source_ports = vec![(1_024, 65_535)];
            // The length of the bench's datagrams.
            flow.byte_matches = if n < 8 { vec![] } else { vec![Bytes::parse("udp[4:2] & 0xff00 = 0").unwrap()] };
        }
        flow
    };
    let nat = Nat { vips: vec![vip], protocol: Protocol::Udp, port: 900, target_port: 901 };
    Config {
        vips: vips.clone(),
        streams: streams()
            .into_iter()
            .map(|(name, n, _)| Stream { name, max_targets: n.clamp(100, FAN), sctp_ports_only: false })
            .collect(),
        flows: (0..load.flows).map(flow).collect(),
        nats: if load.kind == Kind::Everything { vec![nat] } else { vec![] },
    }
}

/// A BPF file system of its own.
struct BpfFs(tempfile::TempDir);

impl BpfFs {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("mdb-bpf-").tempdir().unwrap();
        let status = Command::new("mount").args(["-t", "bpf", "bpf"]).arg(directory.path()).status().unwrap();
        assert!(status.success(), "mount of a BPF file system");
        BpfFs(directory)
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}
