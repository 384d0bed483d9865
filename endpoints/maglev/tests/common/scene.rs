//! A load balancer with two targets through which crafted packets are sent, and eyes on all ends.

use std::cell::Cell;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use meridio_maglev::config::Bytes;
use meridio_maglev::{Config, Engine, Flow, Image, Live, MARK_FLAG, Nat, Protocol, Reason, Stream};

use super::build::{ethernet, l4, packet, udp};
use super::net::{CLIENT4, CLIENT6, Net, Tap, V4, V6, eventually};
use super::{BpfFs, dual_stack, flow, packets_of, start, vips};

/// Makes an L4 packet between two addresses and ports.
pub(crate) type Make = fn(IpAddr, IpAddr, (u16, u16), &[u8]) -> Vec<u8>;

/// Longer than anything takes here.
pub(crate) const SOON: Duration = Duration::from_secs(3);

/// Flows by port, by SCTP ports alone, by the last bytes of a header; port 80 is translated.
fn config() -> Config {
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let ends = |name: &str, protocol, text: &str| Flow {
        byte_matches: vec![Bytes::parse(text).unwrap()],
        ..flow(name, &[protocol], &[4100])
    };
    let mut config = dual_stack(vec![
        flow("f", &all, &[4000, 80]),
        Flow { stream: "p".into(), ..flow("p", &[Protocol::Sctp], &[5001]) },
        ends("tcp-end", Protocol::Tcp, "tcp[18:2] = 7"),
        ends("udp-end", Protocol::Udp, "udp[4:2] = 8"),
    ]);
    config.streams.push(Stream { name: "p".into(), max_targets: 100, sctp_ports_only: true });
    config.nats = all.map(|protocol| Nat { vips: vips(), protocol, port: 80, target_port: 5000 }).to_vec();
    config
}

/// A load balancer with two targets, and eyes on all of them.
pub(crate) struct Scene {
    pub(crate) engine: Engine,
    pub(crate) client: Tap,
    targets: Vec<Tap>,
    ext: [u8; 6],
    pub(crate) net: Net,
    fs: BpfFs,
    next: Cell<u16>,
}

pub(crate) fn client(v6: bool) -> IpAddr {
    if v6 { CLIENT6.into() } else { CLIENT4.into() }
}

pub(crate) fn vip(v6: bool) -> IpAddr {
    if v6 { V6.into() } else { V4.into() }
}

impl Scene {
    pub(crate) fn new() -> Self {
        let (fs, net) = (BpfFs::new(), Net::new(2));
        let mut targets = net.targets(&[1, 2]);
        targets.insert("p".into(), targets["s"].clone());
        let engine = start(&net, fs.settings(), config(), targets);
        engine.detour().unwrap();
        let marks: Vec<(u32, u32)> = ["s", "p"]
            .iter()
            .flat_map(|s| {
                (1..=2).map(|n| (MARK_FLAG | (engine.places(s).first().unwrap().0 + n), n)).collect::<Vec<_>>()
            })
            .collect();
        net.slow_path(&marks);
        let scene = Scene {
            engine,
            client: net.tap("c", "eth0"),
            targets: (1..=2).map(|n| net.tap(&format!("t{n}"), "eth0")).collect(),
            ext: net.mac("l", "ext"),
            net,
            fs,
            next: Cell::new(20_000),
        };
        // Neighbour entries, so that nothing below waits for them.
        for n in 0..16 {
            scene.owner(n % 2 == 0, 4000);
        }
        scene
    }

    /// What `why` would say to a packet now.
    pub(crate) fn why(&self, packet: &[u8], ethertype: u16) -> Reason {
        Image::of(&Live::open(&self.fs.path()).unwrap()).unwrap().explain(packet, ethertype).outcome
    }

    /// A number that no packet has had yet.
    pub(crate) fn fresh(&self) -> u16 {
        self.next.set(self.next.get() + 1);
        self.next.get()
    }

    /// [`Engine::tend`] in the namespace of the load balancer.
    pub(crate) fn tend(&mut self) {
        let path = format!("/run/netns/{}", self.net.name("l"));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let file = std::fs::File::open(path).unwrap();
                nix::sched::setns(file.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
                self.engine.tend();
            });
        });
    }

    pub(crate) fn send(&self, packet: &[u8]) {
        self.client.send(&ethernet(self.ext, [2, 0, 0, 0, 0, 9], packet));
    }

    /// Sends from a target through the load balancer to the outside.
    pub(crate) fn reply(&self, n: u32, packet: &[u8]) {
        let to = self.net.mac("l", &format!("nsm{n}"));
        self.targets[n as usize - 1].send(&ethernet(to, [2, 0, 0, 0, 0, 8], packet));
    }

    /// Waits for `count` packets with a property at the targets: index of the target and packet.
    pub(crate) fn arrived(&self, count: usize, property: impl Fn(&[u8]) -> bool) -> Vec<(usize, Vec<u8>)> {
        let all = || -> Vec<(usize, Vec<u8>)> {
            let one = |(n, tap): (usize, &Tap)| tap.matching(&property).into_iter().map(move |p| (n, p)).collect();
            self.targets.iter().enumerate().flat_map::<Vec<_>, _>(one).collect()
        };
        eventually(SOON, || all().len() >= count);
        let seen = all();
        assert_eq!(seen.len(), count, "packets at the targets");
        seen
    }

    pub(crate) fn outside(&self, property: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        assert!(eventually(SOON, || !self.client.matching(&property).is_empty()), "nothing came back");
        self.client.matching(&property).remove(0)
    }

    /// A fresh source port, and the target that its flow to a UDP port belongs to.
    pub(crate) fn owner(&self, v6: bool, port: u16) -> (u16, usize) {
        let sport = self.fresh();
        let (src, dst) = (client(v6), vip(v6));
        self.send(&packet(src, dst, 17, &udp(src, dst, (sport, port), b"whose")));
        let seen = self.arrived(1, |p| l4(p).is_some_and(|(n, l4)| n == 17 && l4[..2] == sport.to_be_bytes()));
        (sport, seen[0].0)
    }

    pub(crate) fn count(&self, reason: Reason) -> u64 {
        packets_of(&self.engine.reasons().unwrap(), reason)
    }
}
