//! SCTP associations of more than one path: packets from several addresses of a client, with the same ports.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use meridio_demo::namespace::Namespace;
use meridio_demo::status::Observer;
use meridio_demo::topology::{GATEWAY_INTERFACE, Trench, gateway_address};
use meridio_demo::traffic::path;
use meridio_tests::scene::{self, blueprint, check_clean, turn};
use socket2::{Domain, Protocol, Socket, Type};

const SCTP: i32 = 132;
const PORT: u16 = 4000;
/// Client ports, each of an association.
const PORTS: std::ops::Range<u16> = 42_000..42_030;
/// What is sent again until it arrives: tables follow a new configuration within this.
const PATIENCE: Duration = Duration::from_secs(20);

/// A packet that arrived: target, and the verification tag by which the test knows it again.
type Arrival = (String, u32);

/// Tells what SCTP arrives at a target, until `ended`.
fn receive(name: &str, target: &Namespace, arrivals: &mpsc::Sender<Arrival>, ended: &Arc<AtomicBool>) {
    for domain in [Domain::IPV4, Domain::IPV6] {
        let open = move || Socket::new(domain, Type::RAW, Some(Protocol::from(SCTP)));
        let socket = target.run(open).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (name, arrivals, ended) = (name.to_owned(), arrivals.clone(), Arc::clone(ended));
        std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while !ended.load(Ordering::Relaxed) {
                let Ok(32..) = (&socket).read(&mut buffer) else { continue };
                // Only IPv4 shows its header.
                let header = if domain == Domain::IPV4 { 20 } else { 0 };
                let tag = buffer[header + 4..header + 8].try_into().unwrap();
                let _ = arrivals.send((name.clone(), u32::from_be_bytes(tag)));
            }
        });
    }
}

/// The client's addresses of a family: the gateway's own, and a second one beside it.
fn sources(v4: bool) -> [IpAddr; 2] {
    let (own4, own6) = gateway_address();
    match v4 {
        true => [own4.into(), [169, 254, 100, 151].into()],
        false => [own6.into(), [0x100, 0x100, 0, 0, 0, 0, 0, 0x151].into()],
    }
}

/// Sends the beginning of an SCTP packet (ports, tag, checksum, an INIT chunk) by way of load balancer `lb`.
fn send(gateway: &Namespace, from: IpAddr, to: IpAddr, lb: u8, port: u16, tag: u32) {
    let mut packet = Vec::new();
    packet.extend(port.to_be_bytes());
    packet.extend(PORT.to_be_bytes());
    packet.extend(tag.to_be_bytes());
    packet.extend([0; 4]);
    packet.extend([1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
    let sending = move || -> std::io::Result<usize> {
        let socket = Socket::new(Domain::for_address(SocketAddr::new(to, 0)), Type::RAW, Some(Protocol::from(SCTP)))?;
        socket.set_mark(path::mark(lb))?;
        socket.bind(&SocketAddr::new(from, 0).into())?;
        socket.send_to(&packet, &SocketAddr::new(to, 0).into())
    };
    gateway.run(sending).unwrap().unwrap();
}

/// Where each association's packets arrive, by client port and source address; through both load balancers alike.
fn targets(observer: &Observer, vip: IpAddr) -> BTreeMap<u16, BTreeMap<IpAddr, String>> {
    let gateway = observer.cluster.pod(&observer.trench.pod("gateway")).unwrap();
    let (told, arrivals) = mpsc::channel();
    let ended = Arc::new(AtomicBool::new(false));
    for target in observer.trench.target_pods() {
        receive(&target, &observer.cluster.pod(&target).unwrap().namespace, &told, &ended);
    }
    let mut tags = 0;
    let mut arrive = |from: IpAddr, lb: u8, port: u16| -> String {
        let end = Instant::now() + PATIENCE;
        let first = tags + 1;
        while Instant::now() < end {
            tags += 1;
            send(&gateway.namespace, from, vip, lb, port, tags);
            let soon = Instant::now() + Duration::from_millis(500);
            while let Ok((target, tag)) = arrivals.recv_timeout(soon.saturating_duration_since(Instant::now())) {
                if tag >= first {
                    return target;
                }
            }
        }
        panic!("SCTP of port {port} from {from} to {vip} by load balancer {lb} does not arrive");
    };
    let mut found: BTreeMap<u16, BTreeMap<IpAddr, String>> = BTreeMap::new();
    for port in PORTS {
        for from in sources(vip.is_ipv4()) {
            let [one, two] = [1, 2].map(|lb| arrive(from, lb, port));
            assert_eq!(one, two, "port {port} from {from} to {vip}: by load balancers 1 and 2");
            found.entry(port).or_default().insert(from, one);
        }
    }
    ended.store(true, Ordering::Relaxed);
    found
}

/// Prepares a trench: its TCP flow takes SCTP too, and its gateway has a second address.
fn prepare(observer: &Observer) {
    let file = observer.cluster.config_file(&observer.trench);
    let before = std::fs::read_to_string(&file).unwrap();
    let text = before.replace("      - tcp\n", "      - tcp\n      - sctp\n");
    assert_ne!(text, before);
    std::fs::write(&file, text).unwrap();
    let gateway = observer.cluster.pod(&observer.trench.pod("gateway")).unwrap();
    let ([_, v4], [_, v6]) = (sources(true), sources(false));
    let addresses =
        format!("addr add {v4}/24 dev {GATEWAY_INTERFACE}\naddr add {v6}/64 dev {GATEWAY_INTERFACE} nodad\n");
    gateway.namespace.ip(&addresses).unwrap();
}

#[test]
fn paths_of_an_association_meet_in_one_target_where_the_load_balancers_are_told_so() {
    let _turn = turn();
    let mut blueprint = blueprint("sctp", vec![Trench::fixture('a', 0), Trench::fixture('b', 1)]).unwrap();
    // The setting is one of streams: all load balancers have it, and it names trench a's stream.
    blueprint.options.load_balancers = vec![("NSM_SCTP_PORTS_ONLY".to_owned(), "other,stream-a-i".to_owned())];
    let stage = scene::of(blueprint).unwrap();
    for observer in &stage.observers {
        prepare(observer);
    }
    for (observer, together) in stage.observers.iter().zip([true, false]) {
        for vip in observer.vips() {
            let found = targets(observer, vip);
            let split = found.values().filter(|paths| paths.values().collect::<BTreeSet<_>>().len() > 1).count();
            let used: BTreeSet<&String> = found.values().flat_map(|paths| paths.values()).collect();
            println!(
                "{} {vip}: {split} of {} associations split, {} targets",
                observer.trench.name(),
                found.len(),
                used.len()
            );
            assert!(used.len() > 2, "associations are spread: {used:?}");
            match together {
                true => assert_eq!(split, 0, "{found:?}"),
                // Of four targets two addresses have the same one in every fourth case.
                false => assert!(split > found.len() / 3, "{split} of {}: {found:?}", found.len()),
            }
        }
    }
    check_clean(&stage).unwrap();
}
