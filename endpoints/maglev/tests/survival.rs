//! Nothing is lost while tables change, and while the process that changes them is killed, restarted, upgraded.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::build::{ethernet, fragment};
use common::flood::Flood;
use common::net::{CLIENT4, Net, V4, eventually};
use common::{BpfFs, dual_stack, flow, packets_of, start, vips};
use meridio_maglev::{Config, Engine, Error, LAYOUT_VERSION, Live, Nat, Options, Protocol, Reason, Settings, Targets};

const PORT: u16 = 4000;
/// What [`PORT`] is translated to.
const TARGET_PORT: u16 = 5000;
const RATE: u64 = 2_000;
/// What is attached to an interface, in the words of the engine.
const FILTERS: [&str; 2] = ["the filter of packets that come in", "the filter of packets that go out"];

fn config(flows: u16) -> Config {
    let mut config = dual_stack((0..flows).map(|n| flow(&format!("f{n}"), &[Protocol::Udp], &[PORT + n])).collect());
    config.nats = vec![Nat { vips: vips(), protocol: Protocol::Udp, port: PORT, target_port: TARGET_PORT }];
    config
}

fn only(net: &Net, which: &[u32]) -> Targets {
    net.targets(which)["s"].clone()
}

#[test]
fn swaps_lose_nothing_and_show_no_packet_a_table_that_is_not_in_use() {
    let (fs, net) = (BpfFs::new(), Net::new(3));
    let mut engine = start(&net, fs.settings(), config(1), net.targets(&[3]));
    let flood = Flood::start(&net, 3, (PORT, TARGET_PORT), RATE);
    flood.flows(50);
    assert!(flood.received(3) > 0);
    let sets = [only(&net, &[1]), only(&net, &[1, 2]), only(&net, &[2])];
    engine.set_targets("s", &sets[0]).unwrap();
    flood.flows(200);
    // The copy that said 3 is the one that is written next, and from then on nothing says 3.
    let strays = flood.received(3);
    let (started, mut swaps) = (Instant::now(), 0usize);
    while started.elapsed() < Duration::from_secs(5) {
        engine.set_targets("s", &sets[swaps % 3]).unwrap();
        if swaps.is_multiple_of(10) {
            // The classifier as well: other flows come and go.
            let targets = [("s".to_owned(), sets[swaps % 3].clone())].into();
            engine.apply(&config(1 + (swaps / 10 % 3) as u16), &targets).unwrap();
        }
        swaps += 1;
    }
    assert_eq!(flood.received(3), strays, "a target that is in no table");
    let tally = flood.finish();
    println!("{swaps} swaps: {tally:?}");
    assert_eq!(tally.unanswered(), 0, "{tally:?}, {:?}", engine.reasons());
    assert!(swaps > 30 && tally.sent > 1_000 && tally.by_target.iter().all(|n| *n > 0));
}

/// An engine in a process of its own, which changes targets without pause.
struct Process(Child);

impl Process {
    fn start(net: &Net, directory: &Path, layout: u32) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "process", "--ignored", "--nocapture"])
            .env("MERIDIO_TEST_DIR", directory)
            .env("MERIDIO_TEST_LAYOUT", layout.to_string())
            .env("MERIDIO_TEST_NETNS", format!("/run/netns/{}", net.name("l")))
            .env("MERIDIO_TEST_LINKS", format!("{},{}", net.index("nsm1"), net.index("nsm2")))
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let process = Process(child);
        // The pipe stays open in this thread, so that the child can go on printing.
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok).filter(|line| line.contains("READY")) {
                let _ = ready.send(line);
            }
        });
        is_ready.recv_timeout(Duration::from_secs(60)).unwrap();
        process
    }
}

impl Drop for Process {
    /// SIGKILL.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "the process that other tests start"]
fn process() {
    let Ok(directory) = std::env::var("MERIDIO_TEST_DIR") else { return };
    let var = |name: &str| std::env::var(name).unwrap();
    let netns = std::fs::File::open(var("MERIDIO_TEST_NETNS")).unwrap();
    nix::sched::setns(netns.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    let links: Vec<u32> = var("MERIDIO_TEST_LINKS").split(',').map(|n| n.parse().unwrap()).collect();
    let target = |n: u32| {
        let link = links[n as usize - 1];
        let v4 = std::net::Ipv4Addr::new(172, 16, n as u8, 2);
        let v6 = std::net::Ipv6Addr::new(0xfd00, n as u16, 0, 0, 0, 0, 0, 2);
        (n, meridio_maglev::Target { v4: Some((v4, link)), v6: Some((v6, link)), mtu: 0, direct: true })
    };
    let sets: [Targets; 3] = [[target(1), target(2)].into(), [target(1)].into(), [target(2)].into()];
    let mut kernel = Options::new(directory);
    kernel.chunks = 16;
    kernel.layout = var("MERIDIO_TEST_LAYOUT").parse().unwrap();
    let mut engine = Engine::open(Settings { kernel, offset_start: 5000 }).unwrap();
    let adopted = engine.adopted();
    if !adopted {
        engine.apply(&config(1), &[("s".to_owned(), sets[0].clone())].into()).unwrap();
    }
    engine.attach("ext").unwrap();
    engine.detour().unwrap();
    println!("READY {adopted}");
    // Wherever the signal finds it, the kernel has to be left with something whole.
    for n in 0.. {
        engine.set_targets("s", &sets[n % 3]).unwrap();
        if n % 4 == 0 {
            engine.apply(&config(1 + (n % 3) as u16), &[("s".to_owned(), sets[n % 3].clone())].into()).unwrap();
        }
    }
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Directories of maps, without the sign of the namespace beside them.
fn versions(directory: &Path) -> Vec<String> {
    names(directory).into_iter().filter(|name| name.starts_with('v')).collect()
}

fn attached(net: &Net) -> String {
    let show = |args: &str| {
        let out = Command::new("tc").args(["-n", &net.name("l")]).args(args.split(' ')).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    };
    show("filter show dev ext ingress") + &show("filter show dev ext egress") + &show("qdisc show dev ext clsact")
}

#[test]
fn killed_restarted_and_upgraded_without_a_loss() {
    let (fs, net) = (BpfFs::new(), Net::new(2));
    let directory = fs.path();
    // An older version, whose maps mean something else.
    let old = Process::start(&net, &directory, LAYOUT_VERSION + 1_000);
    let flood = Flood::start(&net, 2, (PORT, TARGET_PORT), RATE);
    flood.flows(200);
    drop(old);
    flood.flows(200);
    assert_eq!(versions(&directory), [format!("v{}", LAYOUT_VERSION + 1_000)]);
    for round in 0..6 {
        let process = Process::start(&net, &directory, LAYOUT_VERSION);
        assert_eq!(versions(&directory), [format!("v{LAYOUT_VERSION}")], "the old maps are gone, round {round}");
        std::thread::sleep(Duration::from_millis(37 * (round + 1)));
        drop(process);
        flood.flows(100);
    }
    let tally = flood.finish();
    println!("{tally:?}");
    assert_eq!(tally.unanswered(), 0, "{tally:?}");
    assert!(tally.by_target.iter().all(|n| *n > 0));

    // Nobody is left to hold a fragment until the first one of its packet comes, and the program knows.
    let client = net.tap("c", "eth0");
    let later = fragment(CLIENT4.into(), V4.into(), 17, &[7; 64], 9, 696, false);
    let counted = |reason| packets_of(&Live::open(&directory).unwrap().counters().unwrap().reasons, reason);
    let before = [Reason::FragmentUnknown, Reason::FragmentHeld].map(counted);
    client.send(&ethernet(net.mac("l", "ext"), [2, 0, 0, 0, 0, 9], &later));
    assert!(eventually(Duration::from_secs(3), || counted(Reason::FragmentUnknown) == before[0] + 1));
    assert_eq!(counted(Reason::FragmentHeld), before[1]);

    // What a process that is killed leaves behind is what the next one takes away on request, and all of it.
    assert!(attached(&net).contains("meridio"), "{}", attached(&net));
    let dir = directory.clone();
    net.run("l", move || Engine::remove(&dir, &["ext"]).unwrap());
    assert_eq!(attached(&net), "");
    assert!(names(&directory).is_empty());
    let links = Command::new("ip").args(["-n", &net.name("l"), "-o", "link"]).output().unwrap();
    assert!(!String::from_utf8(links.stdout).unwrap().contains("mddetour"));
    // Once more does no harm.
    net.run("l", move || Engine::remove(&directory, &["ext"]).unwrap());
}

#[test]
fn while_a_process_lives_nobody_else_changes_or_removes_its_maps() {
    let (fs, net) = (BpfFs::new(), Net::new(2));
    let process = Process::start(&net, &fs.path(), LAYOUT_VERSION);
    let flood = Flood::start(&net, 2, (PORT, TARGET_PORT), RATE);
    flood.flows(100);
    let (settings, dir) = (fs.settings(), fs.path());
    let (opened, removed) = net
        .run("l", move || (Engine::open(settings).map(drop).unwrap_err(), Engine::remove(&dir, &["ext"]).unwrap_err()));
    for error in [opened, removed] {
        assert!(matches!(error, Error::Held { .. }), "{error}");
        let holder = format!("process {} (survival", process.0.id());
        assert!(error.to_string().contains(&holder), "{error}");
    }
    assert!(attached(&net).contains("meridio"));
    flood.flows(100);
    drop(process);
    let settings = fs.settings();
    let engine = net.run("l", move || Engine::open(settings).unwrap());
    assert!(engine.adopted() && !engine.targets("s").unwrap().is_empty());
    let tally = flood.finish();
    assert_eq!(tally.unanswered(), 0, "{tally:?}");
}

#[test]
fn a_filter_whose_maps_are_pinned_no_more_forwards_until_another_one_replaces_it() {
    let (fs, net) = (BpfFs::new(), Net::new(2));
    let directory = fs.path();
    drop(Process::start(&net, &directory, LAYOUT_VERSION));
    let flood = Flood::start(&net, 2, (PORT, TARGET_PORT), RATE);
    flood.flows(100);
    // As when the BPF file system does not outlive the process.
    std::fs::remove_dir_all(&directory).unwrap();
    flood.flows(100);
    let targets = net.targets(&[1, 2]);
    let settings = fs.settings();
    let engine = net.run("l", move || {
        let mut engine = Engine::open(settings).unwrap();
        assert!(!engine.adopted());
        engine.apply(&config(1), &targets).unwrap();
        engine.attach("ext").unwrap();
        engine
    });
    flood.flows(200);
    let hits: u64 = engine.target_hits().unwrap().iter().map(|hits| hits.counter.packets).sum();
    assert!(hits > 0, "the new program forwards");
    let tally = flood.finish();
    assert_eq!(tally.unanswered(), 0, "{tally:?}");
}

#[test]
fn what_others_take_away_is_noticed_and_put_back() {
    let (fs, net) = (BpfFs::new(), Net::new(1));
    let mut engine = start(&net, fs.settings(), config(1), net.targets(&[1]));
    let tc = |args: &str| {
        let status = Command::new("tc").args(["-n", &net.name("l")]).args(args.split(' ')).status().unwrap();
        assert!(status.success(), "tc {args}");
    };
    type Taken = (&'static str, &'static [&'static str]);
    let cases: [Taken; 3] = [
        ("qdisc del dev ext clsact", &FILTERS),
        ("filter del dev ext ingress", &FILTERS[..1]),
        ("filter del dev ext egress", &FILTERS[1..]),
    ];
    for (taken, missing) in cases {
        engine = net.run("l", move || {
            assert_eq!(engine.missing("ext").unwrap(), [""; 0]);
            engine
        });
        tc(taken);
        engine = net.run("l", move || {
            assert_eq!(engine.missing("ext").unwrap(), missing);
            engine.attach("ext").unwrap();
            assert_eq!(engine.missing("ext").unwrap(), [""; 0]);
            assert_eq!(engine.missing("gone").unwrap(), [""; 0], "where there is no interface nothing is missing");
            engine
        });
    }
}

#[test]
fn an_interface_without_ethernet_headers_is_refused() {
    let (fs, net) = (BpfFs::new(), Net::new(1));
    let l = net.name("l");
    common::net::ip(&format!("-n {l} tuntap add dev tun9 mode tun"));
    let settings = fs.settings();
    let error = net.run("l", move || Engine::open(settings).unwrap().attach("tun9").unwrap_err().to_string());
    assert!(error.contains("tun9") && error.contains("no Ethernet header"), "{error}");
}
