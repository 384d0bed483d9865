//! The traffic generator and its witnesses against a stand-in for a trench: one namespace that holds the VIPs and answers.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use meridio_demo::namespace::Namespace;
use meridio_demo::traffic::continuous::{Continuous, Direction, first_answer};
use meridio_demo::traffic::sniffer::Sniffer;
use meridio_demo::traffic::witness::{self, Arrivals};
use meridio_demo::traffic::{Generator, tcp, udp};

const VIPS: [IpAddr; 2] =
    [IpAddr::V4(std::net::Ipv4Addr::new(20, 0, 0, 1)), IpAddr::V6(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1))];

/// Two namespaces and a cable; the second one holds the VIPs.
fn stage(name: &str) -> (Namespace, Namespace) {
    let (left, right) = (format!("mdt-{name}-l"), format!("mdt-{name}-r"));
    for stale in [&left, &right] {
        let _ = std::process::Command::new("ip").args(["netns", "del", stale]).output();
    }
    let gateway = Namespace::create(&left, None).unwrap();
    let target = Namespace::create(&right, None).unwrap();
    gateway.ip(&format!("link set lo up\nlink add t0 type veth peer name t0 netns {right}\nlink set t0 up\naddr add 10.0.0.1/24 dev t0\naddr add fd00::1/64 dev t0 nodad\n")).unwrap();
    target.ip("link set lo up\nlink set t0 up\naddr add 10.0.0.2/24 dev t0\naddr add fd00::2/64 dev t0 nodad\naddr add 20.0.0.1/32 dev t0\naddr add 2000::1/128 dev t0 nodad\n").unwrap();
    gateway.ip("route add 20.0.0.1 via 10.0.0.2\nroute add 2000::1 via fd00::2\n").unwrap();
    (gateway, target)
}

/// An application that answers as the demo's does, on threads of the namespace.
fn serve(target: &Namespace, host: &'static str) {
    target
        .run(move || {
            let listener = TcpListener::bind("[::]:4000").unwrap();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let mut stream = stream.unwrap();
                    std::thread::spawn(move || {
                        let _ = stream.write_all(format!("{host}\n").as_bytes());
                        let mut buffer = [0; 65536];
                        while let Ok(length @ 1..) = stream.read(&mut buffer) {
                            if stream.write_all(&buffer[..length]).is_err() {
                                return;
                            }
                        }
                    });
                }
            });
            // A socket for each VIP, so that answers carry it as their source.
            for vip in VIPS {
                let socket = UdpSocket::bind((vip, 4003)).unwrap();
                std::thread::spawn(move || {
                    let mut buffer = [0; 2048];
                    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                        let mut answer = format!("{host} ").into_bytes();
                        answer.extend(&buffer[..length]);
                        let _ = socket.send_to(&answer, from);
                    }
                });
            }
        })
        .unwrap();
}

#[test]
fn connections_packets_and_transfers_are_counted() {
    let (gateway, target) = stage("count");
    serve(&target, "one");
    let generator = Generator::new(&gateway).unwrap();
    for vip in VIPS {
        let result = generator.run(tcp::connections(vip, 500, 32, 1)).unwrap();
        assert_eq!((result.failed, result.per_target["one"]), (0, 500), "{result:?}");
        let result = generator.run(udp::packets(vip, 100, 5, 32, 1)).unwrap();
        assert_eq!((result.failed, result.per_target["one"], result.split_flows), (0, 500, 0), "{result:?}");
        let speeds = generator.run(tcp::bulk(vip, 1_000_000, 1)).unwrap().unwrap();
        assert!(speeds["one"] > 1, "{speeds:?}");
        let from = Instant::now();
        let answer = generator.run(first_answer(vip, "one".into(), from + Duration::from_secs(5))).unwrap();
        assert!(answer.is_some());
    }
}

#[test]
fn losses_have_a_time_and_a_direction() {
    let (gateway, target) = stage("loss");
    serve(&target, "one");
    let generator = Generator::new(&gateway).unwrap();
    let arrivals = Arc::new(Arrivals::default());
    witness::start(&target, &arrivals).unwrap();
    let traffic = Continuous::start(&generator, VIPS, Arc::clone(&arrivals)).unwrap();
    let begin = traffic.mark();
    std::thread::sleep(Duration::from_secs(1));
    let window = traffic.since(begin);
    assert!(window.losses.is_empty() && window.breaks.is_empty() && window.sent > 500, "{} lost", window.losses.len());
    // Without a route back, what arrives is answered in vain.
    let begin = traffic.mark();
    target.ip("route add blackhole 10.0.0.1/32\n").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    target.ip("route del blackhole 10.0.0.1/32\n").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let window = traffic.since(begin);
    assert!(
        window.losses.len() > 50 && window.losses.iter().all(|loss| loss.direction == Direction::Egress),
        "{} lost",
        window.losses.len()
    );
    let last = window.losses.iter().map(|loss| loss.sent).max().unwrap();
    assert!(
        (Duration::from_millis(250)..Duration::from_millis(400)).contains(&(last - begin.at)),
        "{:?}",
        last - begin.at
    );
    assert!(window.breaks.is_empty(), "{:?}", window.breaks);
    // Without the port, nothing arrives.
    let begin = traffic.mark();
    target.ip("link set t0 down\n").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let window = traffic.since(begin);
    assert!(window.losses.iter().any(|loss| loss.direction == Direction::Ingress), "{} lost", window.losses.len());
}

#[test]
fn a_vip_on_the_primary_network_is_seen() {
    let (network, pod) = stage("sniff");
    let mut sniffer = Sniffer::start(&network, "20.0.0.1".parse().unwrap(), "2000::1".parse().unwrap()).unwrap();
    let neighbours = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
    sniffer.prove(&pod, VIPS, neighbours).unwrap();
    // Traffic between other addresses is none of its business.
    pod.run(|| UdpSocket::bind("10.0.0.2:0").unwrap().send_to(b"x", "10.0.0.1:9").unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(sniffer.leaks().0, 0, "{:?}", sniffer.leaks());
    pod.run(|| UdpSocket::bind("[2000::1]:0").unwrap().send_to(b"x", "[fd00::1]:9").unwrap()).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(sniffer.leaks().0 > 0);
}
