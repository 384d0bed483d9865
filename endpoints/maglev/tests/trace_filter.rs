//! The trace's filter in the kernel: what each criterion lets through, and what it keeps out.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::net::IpAddr;
use std::time::Duration;

use common::{BpfFs, build, dual_stack, flow, frame, target};
use meridio_maglev::{Engine, Filter, Live, Protocol, Targets, Tracer, trace_flag};

/// Longer than an event takes.
const SOON: Duration = Duration::from_secs(5);

/// A packet to a VIP, in words: what, source, its port, destination, its port; `about-X`: an ICMP error about what the destination has sent to
/// X. Its length tells which one of its list it is.
fn crafted(words: &str, place: usize) -> (Vec<u8>, bool) {
    let [what, src, sport, dst, dport] = words.split_whitespace().collect::<Vec<_>>().try_into().unwrap();
    let (src, dst): (IpAddr, IpAddr) = (src.parse().unwrap(), dst.parse().unwrap());
    let ports = (sport.parse().unwrap(), dport.parse().unwrap());
    let (v6, rest) = (src.is_ipv6(), vec![0; 20 + place]);
    let (icmp, echo, unreachable) = if v6 { (58, [128, 0], [1, 0]) } else { (1, [8, 0], [3, 1]) };
    let (protocol, l4) = match what {
        "tcp" => (6, build::tcp(src, dst, ports, &rest)),
        "udp" => (17, build::udp(src, dst, ports, &rest)),
        "sctp" => (132, build::sctp(src, dst, ports, &rest)),
        "ping" => (icmp, build::icmp(src, dst, echo, [0; 4], &rest)),
        other => match other.strip_prefix("about-") {
            Some(client) => {
                let client = client.parse().unwrap();
                let reply = build::packet(dst, client, 17, &build::udp(dst, client, (ports.1, ports.0), &rest));
                (icmp, build::icmp(src, dst, unreachable, [0; 4], &reply))
            }
            None => (other.parse().unwrap(), rest),
        },
    };
    (build::packet(src, dst, protocol, &l4), v6)
}

/// Which packets a filter lets through, and which it keeps out.
type Filtered = (Filter, &'static [&'static str], &'static [&'static str]);

fn by_protocol() -> Vec<Filtered> {
    let only = |protocols: &[Protocol], icmp| Filter { protocols: protocols.to_vec(), icmp, ..Filter::default() };
    const TCP: &[&str] = &["tcp 10.0.0.1 1 20.0.0.1 4000", "tcp 2001::1 1 2000::1 4000"];
    const UDP: &[&str] = &["udp 10.0.0.1 1 20.0.0.1 4000", "udp 2001::1 1 2000::1 4000"];
    const SCTP: &[&str] = &["sctp 10.0.0.1 1 20.0.0.1 4000", "sctp 2001::1 1 2000::1 4000"];
    const PING: &[&str] = &["ping 10.0.0.1 0 20.0.0.1 0", "ping 2001::1 0 2000::1 0"];
    // An error counts for the protocol that it is about.
    const ERROR: &[&str] = &["about-10.0.0.1 10.0.0.9 1 20.0.0.1 4000", "about-2001::1 2001::9 1 2000::1 4000"];
    const OTHER: &[&str] = &["47 10.0.0.1 0 20.0.0.1 0", "47 2001::1 0 2000::1 0"];
    let mut cases = Vec::new();
    for other in [UDP, SCTP, PING, ERROR, OTHER] {
        cases.push((only(&[Protocol::Tcp], false), TCP, other));
    }
    for other in [TCP, SCTP, PING, OTHER] {
        cases.push((only(&[Protocol::Udp], false), UDP, other));
        cases.push((only(&[Protocol::Udp], false), ERROR, other));
    }
    for other in [TCP, UDP, PING, ERROR, OTHER] {
        cases.push((only(&[Protocol::Sctp], false), SCTP, other));
    }
    for other in [TCP, UDP, SCTP, ERROR, OTHER] {
        cases.push((only(&[], true), PING, other));
    }
    for (wanted, other) in [(PING, UDP), (TCP, SCTP), (SCTP, OTHER)] {
        let both = if wanted == SCTP { Protocol::Sctp } else { Protocol::Tcp };
        cases.push((only(&[both], true), wanted, other));
    }
    for all in [TCP, UDP, SCTP, PING, ERROR, OTHER] {
        cases.push((only(&[], false), all, &[]));
    }
    cases
}

fn by_address() -> Vec<Filtered> {
    let nets = |list: &[&str]| list.iter().map(|net| net.parse().unwrap()).collect();
    let from = |list: &[&str]| Filter { sources: nets(list), ..Filter::default() };
    let to = |list: &[&str]| Filter { destinations: nets(list), ..Filter::default() };
    vec![
        (
            from(&["10.0.0.0/8"]),
            &["udp 10.0.0.0 1 20.0.0.1 4000", "ping 10.255.255.255 0 20.0.0.1 0"],
            &["udp 11.0.0.0 1 20.0.0.1 4000", "udp 9.255.255.255 1 20.0.0.1 4000", "udp ::10.0.0.0 1 2000::1 4000"],
        ),
        (
            from(&["2001:db8::/33"]),
            &["udp 2001:db8:7fff::1 1 2000::1 4000"],
            &["udp 2001:db8:8000::1 1 2000::1 4000", "udp 10.0.0.1 1 20.0.0.1 4000"],
        ),
        // Beyond the first 64 bits.
        (
            from(&["2001:db8::/97"]),
            &["udp 2001:db8::7fff:ffff 1 2000::1 4000"],
            &["udp 2001:db8::8000:0 1 2000::1 4000", "udp 2001:db8:0:0:1::1 1 2000::1 4000"],
        ),
        (from(&["0.0.0.0/0"]), &["udp 1.2.3.4 1 20.0.0.1 4000"], &["udp 2001::1 1 2000::1 4000"]),
        (
            from(&["10.0.0.1/32", "10.0.0.2/32", "2001::3/128", "10.0.0.4/31"]),
            &[
                "udp 10.0.0.1 1 20.0.0.1 4000",
                "udp 10.0.0.2 1 20.0.0.1 4000",
                "udp 2001::3 1 2000::1 4000",
                "udp 10.0.0.5 1 20.0.0.1 4000",
            ],
            &["udp 10.0.0.3 1 20.0.0.1 4000", "udp 2001::1 1 2000::1 4000", "udp 10.0.0.6 1 20.0.0.1 4000"],
        ),
        // An error counts as from the one whom it is about.
        (
            from(&["10.0.0.7/32", "2001::7/128"]),
            &["about-10.0.0.7 10.0.0.99 1 20.0.0.1 4000", "about-2001::7 2001::99 1 2000::1 4000"],
            &["about-10.0.0.99 10.0.0.7 1 20.0.0.1 4000", "about-2001::99 2001::7 1 2000::1 4000"],
        ),
        (to(&["20.0.0.1/32"]), &["udp 10.0.0.1 1 20.0.0.1 4000"], &["udp 10.0.0.1 1 20.0.0.2 4000"]),
        (to(&["2000::1/128"]), &["udp 2001::1 1 2000::1 4000"], &["udp 2001::1 1 2000::2 4000"]),
        (
            to(&["30.0.0.0/8", "2000::2/127", "40.0.0.0/8", "20.0.0.2/31"]),
            &["udp 10.0.0.1 1 20.0.0.2 4000", "udp 2001::1 1 2000::2 4000"],
            &["udp 10.0.0.1 1 20.0.0.1 4000", "udp 2001::1 1 2000::1 4000"],
        ),
    ]
}

fn by_port_and_outcome() -> Vec<Filtered> {
    let from = |list: &[(u16, u16)]| Filter { source_ports: list.to_vec(), ..Filter::default() };
    let to = |list: &[(u16, u16)]| Filter { destination_ports: list.to_vec(), ..Filter::default() };
    let dropped = Filter { only_dropped: true, ..Filter::default() };
    vec![
        (
            from(&[(1000, 1002)]),
            &["udp 10.0.0.1 1000 20.0.0.1 4000", "tcp 2001::1 1002 2000::1 1", "sctp 10.0.0.1 1001 20.0.0.1 4000"],
            // Nor what has no ports.
            &["udp 10.0.0.1 999 20.0.0.1 1000", "tcp 2001::1 1003 2000::1 1001", "ping 10.0.0.1 0 20.0.0.1 0"],
        ),
        (
            to(&[(4000, 4002)]),
            &["udp 10.0.0.1 1 20.0.0.1 4000", "tcp 2001::1 1 2000::1 4002", "sctp 10.0.0.1 1 20.0.0.1 4001"],
            &["udp 10.0.0.1 4000 20.0.0.1 3999", "tcp 2001::1 4001 2000::1 4003", "ping 10.0.0.1 0 20.0.0.1 0"],
        ),
        (
            from(&[(1, 1), (3, 3), (5, 6), (8, 8)]),
            &["udp 10.0.0.1 1 20.0.0.1 9", "udp 10.0.0.1 6 20.0.0.1 9", "udp 10.0.0.1 8 20.0.0.1 9"],
            &["udp 10.0.0.1 2 20.0.0.1 1", "udp 10.0.0.1 7 20.0.0.1 8"],
        ),
        (
            to(&[(1, 1), (3, 3), (5, 6), (8, 8)]),
            &["udp 10.0.0.1 9 20.0.0.1 1", "udp 10.0.0.1 9 20.0.0.1 6", "udp 10.0.0.1 9 20.0.0.1 8"],
            &["udp 10.0.0.1 1 20.0.0.1 2", "udp 10.0.0.1 8 20.0.0.1 7"],
        ),
        // Ports of an error are those of the packet that would go on the way of the one it is about.
        (
            from(&[(1000, 1000)]),
            &["about-10.0.0.7 10.0.0.99 1000 20.0.0.1 4000"],
            &["about-10.0.0.7 10.0.0.99 4000 20.0.0.1 1000"],
        ),
        (
            dropped,
            &["udp 10.0.0.1 1 20.0.0.1 3999", "tcp 2001::1 1 2000::1 1", "47 10.0.0.1 0 20.0.0.1 0"],
            &["udp 10.0.0.1 1 20.0.0.1 4000", "tcp 2001::1 1 2000::1 4000"],
        ),
    ]
}

/// All kinds of criteria at once: missing one is enough.
fn by_everything() -> Filtered {
    let net = |text: &str| vec![text.parse().unwrap()];
    let filter = Filter {
        protocols: vec![Protocol::Udp],
        icmp: false,
        sources: net("10.0.0.0/24"),
        destinations: net("20.0.0.1/32"),
        source_ports: vec![(1000, 1999)],
        destination_ports: vec![(3000, 3999)],
        only_dropped: true,
    };
    let others = &[
        "tcp 10.0.0.1 1000 20.0.0.1 3999",
        "udp 10.0.1.1 1000 20.0.0.1 3999",
        "udp 10.0.0.1 1000 20.0.0.2 3999",
        "udp 10.0.0.1 2000 20.0.0.1 3999",
        "udp 10.0.0.1 1000 20.0.0.1 2999",
        "udp 10.0.0.1 1000 20.0.0.1 3500",
    ];
    (filter, &["udp 10.0.0.1 1000 20.0.0.1 3999"], others)
}

#[test]
fn each_criterion_of_a_trace_lets_through_what_it_names_and_nothing_else() {
    let fs = BpfFs::new();
    let mut engine = Engine::open(fs.settings()).unwrap();
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let mut config = dual_stack(vec![flow("f", &all, &[3500, 4000])]);
    config.vips = ["20.0.0.0/30", "2000::/126"].map(|vip| vip.parse().unwrap()).to_vec();
    config.flows[0].destinations = config.vips.clone();
    engine.apply(&config, &[("s".to_owned(), Targets::from([(3, target(3))]))].into()).unwrap();
    let cases = [by_protocol(), by_address(), by_port_and_outcome(), vec![by_everything()]].concat();
    for (filter, wanted, others) in cases {
        let mut tracer = Tracer::start(Live::open(&fs.path()).unwrap(), &filter).unwrap();
        let packets: Vec<(Vec<u8>, bool)> =
            others.iter().chain(wanted).enumerate().map(|(place, words)| crafted(words, place)).collect();
        for (packet, v6) in &packets {
            engine.test_run(true, &frame(packet, *v6), 1).unwrap();
        }
        for (words, (packet, v6)) in wanted.iter().zip(&packets[others.len()..]) {
            let event = tracer.next(SOON).unwrap().unwrap_or_else(|| panic!("{words:?} is kept out by {filter:?}"));
            let seen = (event.bytes as usize, event.flags & trace_flag::V6 != 0);
            assert_eq!(seen, (packet.len(), *v6), "{words:?} by {filter:?}: {event:?}, and {others:?} kept out");
        }
        assert_eq!(tracer.next(Duration::ZERO).unwrap(), None, "{filter:?}");
        assert_eq!(tracer.lost().unwrap(), 0);
    }
}
