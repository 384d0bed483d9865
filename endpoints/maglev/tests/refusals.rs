//! What cannot be done is refused by name, and what was before goes on.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::collections::BTreeMap;

use common::build::{packet, udp};
use common::flood::Flood;
use common::net::Net;
use common::{BpfFs, dual_stack, frame, start, target};
use ipnet::IpNet;
use meridio_maglev::config::Bytes;
use meridio_maglev::{
    Config, ETH_IPV4, Engine, Error, Flow, Image, Nat, Options, Protocol, Settings, Stream, Targets, Verdict,
};

fn vip() -> IpNet {
    "20.0.0.1/32".parse().unwrap()
}

fn stream(name: &str, max_targets: u32) -> Stream {
    Stream { name: name.into(), max_targets, sctp_ports_only: false }
}

fn flow(name: &str, port: u16) -> Flow {
    Flow {
        name: name.into(),
        stream: "s".into(),
        destinations: vec![vip()],
        protocols: vec![Protocol::Udp],
        destination_ports: vec![(port, port)],
        ..Flow::default()
    }
}

fn good() -> (Config, BTreeMap<String, Targets>) {
    let config =
        Config { vips: vec![vip()], streams: vec![stream("s", 10)], flows: vec![flow("web", 4000)], nats: vec![] };
    (config, ready(&[1, 2]))
}

fn ready(ids: &[u32]) -> BTreeMap<String, Targets> {
    [("s".to_owned(), ids.iter().map(|id| (*id, target(*id))).collect())].into()
}

fn datagram(port: u16) -> Vec<u8> {
    let (src, dst) = ("10.0.0.1".parse().unwrap(), "20.0.0.1".parse().unwrap());
    packet(src, dst, 17, &udp(src, dst, (1234, port), b"hello"))
}

type Change = Box<dyn Fn(&mut Config, &mut BTreeMap<String, Targets>)>;

/// What is wrong, and how the message names it.
fn faults() -> Vec<(&'static str, Change)> {
    fn with(change: impl Fn(&mut Config) + 'static) -> Change {
        Box::new(move |config, _| change(config))
    }
    let many = |n: u32| -> Vec<IpNet> {
        (0..n).map(|n| format!("30.{}.{}.{}/32", n >> 16, n >> 8 & 255, n & 255).parse().unwrap()).collect()
    };
    vec![
        ("flow \"web\": defined twice", with(|c| c.flows.push(flow("web", 1)))),
        (
            "flow \"x\": names the unknown stream \"t\"",
            with(|c| c.flows.push(Flow { stream: "t".into(), ..flow("x", 1) })),
        ),
        ("flow \"x\": ports need a protocol", with(|c| c.flows.push(Flow { protocols: vec![], ..flow("x", 1) }))),
        (
            "flow \"x\": port range 9-3 is empty",
            with(|c| c.flows.push(Flow { source_ports: vec![(9, 3)], ..flow("x", 1) })),
        ),
        (
            "flow \"x\": has more than 4 byte matches",
            with(|c| {
                let bytes = (0..5).map(|n| Bytes::parse(&format!("udp[{n}:1] = 1")).unwrap()).collect();
                c.flows.push(Flow { byte_matches: bytes, ..flow("x", 1) });
            }),
        ),
        (
            "flow \"x\": byte match \"tcp[20:4] & 0xffffffff = 0x47455420\" reaches beyond the 20-byte header of Tcp",
            with(|c| {
                let bytes = Bytes { protocol: Protocol::Tcp, offset: 20, size: 4, mask: u32::MAX, value: 0x4745_5420 };
                c.flows.push(Flow { byte_matches: vec![bytes], ..flow("x", 1) });
            }),
        ),
        (
            "33 different lists of byte matches are more than 32",
            with(|c| {
                for n in 0..33 {
                    let bytes = vec![Bytes::parse(&format!("udp[0:2] = {n}")).unwrap()];
                    c.flows.push(Flow { byte_matches: bytes, ..flow(&format!("x{n}"), n) });
                }
            }),
        ),
        ("flows: 2049 are more than 2048", with(|c| c.flows.extend((0..2048).map(|n| flow(&format!("x{n}"), n))))),
        (
            "VIPs: 2048 prefixes of VIPs, flows and port-nats are more than 2047",
            with(move |c| c.vips.extend(many(2047))),
        ),
        (
            "VIPs: 2048 prefixes of VIPs, flows and port-nats are more than 2047",
            with(move |c| c.flows.push(Flow { destinations: many(2047), ..flow("x", 1) })),
        ),
        (
            "source prefixes: 65536 of all flows together are more than 65535",
            with(move |c| c.flows.push(Flow { sources: many(65_536), ..flow("x", 1) })),
        ),
        (
            "port-nats: 2049 translations (for each VIP prefix of each one) are more than 2048",
            with(|c| {
                let nat = |n| Nat { vips: vec![vip()], protocol: Protocol::Udp, port: n, target_port: 10_000 + n };
                c.nats.extend((1..=2049).map(nat));
            }),
        ),
        (
            "destination ports: more than 4096 different sets of flows",
            with(|c| {
                // Two flows with thousands of single ports each, no two of them the same set.
                for bit in 0..13u16 {
                    let ports = (0..8192u16).filter(|p| p >> bit & 1 == 1).map(|p| (p, p)).collect();
                    c.flows.push(Flow { destination_ports: ports, ..flow(&format!("x{bit}"), 1) });
                }
            }),
        ),
        (
            "source prefixes: more than 4096 different sets of flows",
            with(move |c| {
                for bit in 0..13u32 {
                    let sources = many(8192).into_iter().zip(0u32..).filter(|(_, n)| n >> bit & 1 == 1);
                    c.flows
                        .push(Flow { sources: sources.map(|(net, _)| net).collect(), ..flow(&format!("x{bit}"), 1) });
                }
            }),
        ),
        ("stream \"s\": defined twice", with(|c| c.streams.push(stream("s", 10)))),
        ("stream \"big\": max-targets 10001 is not in 1..10000", with(|c| c.streams.push(stream("big", 10_001)))),
        ("stream \"none\": max-targets 0 is not in 1..10000", with(|c| c.streams.push(stream("none", 0)))),
        (
            "stream \"big\": its table takes 32 chunks of rows, of 16 not enough are free",
            with(|c| c.streams.push(stream("big", 10_000))),
        ),
        ("streams: 257 are more than 256", with(|c| c.streams.extend((0..256).map(|n| stream(&format!("x{n}"), 1))))),
        ("stream \"s\": identifier 11 is not in 1..10", Box::new(|_, t| *t = ready(&[1, 11]))),
        ("stream \"s\": identifier 0 is not in 1..10", Box::new(|_, t| *t = ready(&[0]))),
        (
            "port-nat 80->4000 Udp of 20.0.0.1/32: overlaps port-nat 80->4000 Udp of 20.0.0.1/32: \
             both translate port 80 of 20.0.0.1/32",
            with(|c| {
                let nat = Nat { vips: vec![vip()], protocol: Protocol::Udp, port: 80, target_port: 4000 };
                c.nats.extend([nat.clone(), nat]);
            }),
        ),
        (
            "port-nat 80->6000 Udp of 20.0.0.1/32: overlaps port-nat 80->5000 Udp of 20.0.0.0/24: \
             both translate port 80 of 20.0.0.1/32",
            with(|c| {
                let nat = |vip: &str, target_port| {
                    let vips = vec![vip.parse().unwrap()];
                    Nat { vips, protocol: Protocol::Udp, port: 80, target_port }
                };
                c.nats.extend([nat("20.0.0.0/24", 5000), nat("20.0.0.1/32", 6000)]);
            }),
        ),
        (
            "port-nat 81->5000 Udp of 20.0.0.0/24: overlaps port-nat 80->5000 Udp of 20.0.0.1/32: \
             both translate to port 5000 of 20.0.0.1/32",
            with(|c| {
                let nat = |vip: &str, port| {
                    let vips = vec![vip.parse().unwrap()];
                    Nat { vips, protocol: Protocol::Udp, port, target_port: 5000 }
                };
                c.nats.extend([nat("20.0.0.1/32", 80), nat("20.0.0.0/24", 81)]);
            }),
        ),
        (
            "streams: need 34 chunks of rows, there are 16: lower max-targets (up to 600: 2 chunks, up to 1300: 4, above: 32), or \
             have the maps made anew with more chunks (NSM_TABLE_CHUNKS, after stateless-lb --remove)",
            with(|c| c.streams.push(stream("big", 10_000))),
        ),
        (
            "streams: fit, but not beside those that are in use: remove or change some streams first, then the others",
            with(|c| {
                c.streams = (0..8)
                    .map(|n| Stream {
                        sctp_ports_only: n == 0,
                        ..stream(["s", "b", "c", "d", "e", "f", "g", "h"][n], 10)
                    })
                    .collect()
            }),
        ),
    ]
}

#[test]
fn a_refused_configuration_is_named_and_the_previous_one_forwards_on() {
    let fs = BpfFs::new();
    let mut settings = fs.settings();
    settings.kernel.chunks = 16;
    let mut engine = Engine::open(settings).unwrap();
    let (config, targets) = good();
    engine.apply(&config, &targets).unwrap();
    let before = (engine.targets("s").unwrap(), engine.streams());
    for (expected, change) in faults() {
        let (mut config, mut targets) = good();
        // A change that would show, were it taken.
        config.flows[0].destination_ports = vec![(5000, 5000)];
        targets.get_mut("s").unwrap().remove(&1);
        change(&mut config, &mut targets);
        let errors = engine.apply(&config, &targets).unwrap_err();
        let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert!(lines.iter().any(|line| line.contains(expected)), "{expected:?} is not in {lines:?}");
        assert_eq!((engine.targets("s").unwrap(), engine.streams()), before, "{expected}");
        assert_eq!(engine.test_run(true, &frame(&datagram(4000), false), 1).unwrap().result, 7, "{expected}");
        assert_eq!(engine.test_run(true, &frame(&datagram(5000), false), 1).unwrap().result, 2, "{expected}");
    }
    let error = engine.set_targets("s", &ready(&[11])["s"]).unwrap_err();
    assert_eq!(error.to_string(), "stream \"s\": identifier 11 is not in 1..10");
    let error = engine.set_targets("t", &Targets::new()).unwrap_err();
    assert_eq!(error.to_string(), "stream \"t\": unknown");
    // And what is right is still taken.
    let (mut config, targets) = good();
    config.flows[0].destination_ports = vec![(5000, 5000)];
    engine.apply(&config, &targets).unwrap();
    assert_eq!(engine.test_run(true, &frame(&datagram(5000), false), 1).unwrap().result, 7);
}

#[test]
fn what_the_kernel_refuses_names_the_object() {
    let plain = tempfile::tempdir().unwrap();
    let error = Engine::open(Settings { kernel: Options::new(plain.path()), offset_start: 5000 }).unwrap_err();
    assert!(matches!(error, Error::NotBpfFs { .. }), "{error}");
    assert!(error.to_string().contains("mount -t bpf"), "{error}");

    let fs = BpfFs::new();
    let mut settings = fs.settings();
    // A map that no kernel makes.
    settings.kernel.chunks = u32::MAX;
    let error = Engine::open(settings).unwrap_err().to_string();
    assert!(error.contains("ROWS"), "{error}");

    let mut engine = Engine::open(fs.settings()).unwrap();
    let error = engine.attach("mdt-no-such").unwrap_err().to_string();
    assert!(error.starts_with("attaching to interface mdt-no-such: "), "{error}");
}

/// The programs with another first instruction: one that reads a register which nobody has written.
fn unverifiable() -> tempfile::NamedTempFile {
    let mut object = std::fs::read(concat!(env!("OUT_DIR"), "/meridio.bpf.o")).unwrap();
    let number = |object: &[u8], at: usize, bytes: usize| {
        object[at..at + bytes].iter().rev().fold(0usize, |n, byte| n << 8 | *byte as usize)
    };
    // Sections, by the header of an ELF file of 64 bits (System V ABI, chapter 4).
    let (table, size, count) = (number(&object, 40, 8), number(&object, 58, 2), number(&object, 60, 2));
    let names = number(&object, table + number(&object, 62, 2) * size + 24, 8);
    let code = (0..count).map(|n| table + n * size).find(|header| {
        let name = names + number(&object, *header, 4);
        object[name..].starts_with(b"classifier\0")
    });
    let first = number(&object, code.unwrap() + 24, 8);
    // r0 = r9
    object[first..first + 8].copy_from_slice(&[0xbf, 0x90, 0, 0, 0, 0, 0, 0]);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), object).unwrap();
    file
}

#[test]
fn a_program_that_the_verifier_refuses_is_named_and_what_is_attached_forwards_on() {
    let (fs, net) = (BpfFs::new(), Net::new(2));
    let config = dual_stack(vec![common::flow("f", &[Protocol::Udp], &[4000])]);
    let engine = start(&net, fs.settings(), config, net.targets(&[1, 2]));
    let flood = Flood::start(&net, 2, (4000, 4000), 1_000);
    flood.flows(100);
    drop(engine);
    let object = unverifiable();
    let mut settings = fs.settings();
    settings.kernel.object = Some(object.path().to_owned());
    for _ in 0..3 {
        let settings = settings.clone();
        let error = net.run("l", move || Engine::open(settings).map(drop)).unwrap_err().to_string();
        assert!(error.starts_with("loading the eBPF program: meridio_"), "{error}");
        assert!(error.contains("R9 !read_ok"), "the verifier's own words: {error}");
        flood.flows(50);
    }
    // And the right one adopts everything.
    let right = fs.settings();
    let engine = net.run("l", move || Engine::open(right)).unwrap();
    assert!(engine.adopted() && engine.targets("s").unwrap().len() == 2);
    let tally = flood.finish();
    assert_eq!(tally.lost(), 0, "{tally:?}");
}

/// Maps of another size than this process would make are adopted as they are.
#[test]
fn adopted_maps_keep_their_size() {
    let fs = BpfFs::new();
    let mut settings = fs.settings();
    settings.kernel.chunks = 4;
    drop(Engine::open(settings.clone()).unwrap());
    settings.kernel.chunks = 64;
    let mut engine = Engine::open(settings).unwrap();
    let (mut config, targets) = good();
    config.streams.extend([stream("b", 10), stream("c", 10)]);
    let errors = engine.apply(&config, &targets).unwrap_err();
    assert!(errors[0].to_string().contains("of 4 not enough"), "{errors:?}");
}

/// A flow without ready targets keeps its packets: a lower one does not get them.
#[test]
fn a_flow_without_targets_drops_at_its_own_priority() {
    let fs = BpfFs::new();
    let mut engine = Engine::open(fs.settings()).unwrap();
    let config = Config {
        streams: vec![stream("s", 10), stream("empty", 10)],
        flows: vec![
            Flow { stream: "empty".into(), priority: 2, ..flow("high", 4000) },
            Flow { priority: 1, destination_ports: vec![(4000, 4001)], ..flow("low", 0) },
        ],
        ..good().0
    };
    engine.apply(&config, &ready(&[1])).unwrap();
    let image = Image::new(&config, &ready(&[1])).unwrap();
    for (port, verdict, result) in [(4000, Verdict::Drop, 2), (4001, Verdict::Forward, 7)] {
        assert_eq!(image.decide(&datagram(port), ETH_IPV4).verdict, verdict as u32);
        assert_eq!(engine.test_run(true, &frame(&datagram(port), false), 1).unwrap().result, result);
    }
    // Equal priorities: by name, whatever the order in which they were given.
    for names in [["a", "b"], ["b", "a"]] {
        let config = Config { flows: names.map(|n| flow(n, 4000)).to_vec(), ..good().0 };
        let image = Image::new(&config, &ready(&[1])).unwrap();
        assert_eq!(image.flow_name(image.decide(&datagram(4000), ETH_IPV4).flow), Some("a"));
    }
}

/// As many flows as there can be, each with packets of its own, at the borders of its range and beyond.
#[test]
fn two_thousand_flows_are_told_apart() {
    let fs = BpfFs::new();
    let mut engine = Engine::open(fs.settings()).unwrap();
    engine.record(true).unwrap();
    let flows: Vec<Flow> = (0..2048u16)
        .map(|n| Flow {
            destination_ports: vec![(1000 + 10 * n, 1004 + 10 * n)],
            priority: n as i32 % 7,
            ..flow(&format!("f{n:04}"), 0)
        })
        .collect();
    let config = Config { flows, ..good().0 };
    engine.apply(&config, &ready(&[1, 2])).unwrap();
    let image = Image::new(&config, &ready(&[1, 2])).unwrap();
    for n in 0..2048u16 {
        for (port, inside) in
            [(1000 + 10 * n, true), (1004 + 10 * n, true), (1005 + 10 * n, false), (999 + 10 * n, false)]
        {
            let decision = image.decide(&datagram(port), ETH_IPV4);
            let name = inside.then(|| format!("f{n:04}"));
            assert_eq!(image.flow_name(decision.flow), name.as_deref(), "port {port}");
            let result = engine.test_run(true, &frame(&datagram(port), false), 1).unwrap().result;
            assert_eq!(result, if inside { 7 } else { 2 }, "port {port}");
            assert!(engine.last_decisions().unwrap().iter().any(|d| d.flow == decision.flow), "port {port}");
        }
    }
}
