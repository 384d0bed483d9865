//! Ingress over TCP and UDP, IPv4 and IPv6; egress with the VIP as source; closing and opening a stream; a faulty configuration.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use meridio_demo::status::Observer;
use meridio_demo::topology::{Trench, gateway_address};
use meridio_demo::traffic::{Traffic, tcp, udp};
use meridio_tests::scene::{check_clean, scene, turn};

fn show(run: &Traffic) {
    println!(
        "{} {}: {} attempted, {} failed, p50 {} us, p99 {} us, {:?}",
        run.protocol, run.vip, run.attempted, run.failed, run.p50_us, run.p99_us, run.per_target
    );
}

fn hosts(run: &Traffic) -> BTreeSet<String> {
    run.per_target.keys().cloned().collect()
}

#[test]
fn every_target_serves_tcp_and_udp_over_both_families() {
    let _turn = turn();
    let stage = scene("ing", vec![Trench::fixture('a', 0)]).unwrap();
    let observer = &stage.observers[0];
    for vip in observer.vips() {
        for run in [
            observer.generator.run(tcp::connections(vip, 400, 16, 4)).unwrap(),
            observer.generator.run(udp::packets(vip, 400, 3, 16, 4)).unwrap(),
        ] {
            show(&run);
            assert_eq!((run.failed, run.split_flows), (0, 0), "{:?}", run.failures);
            assert_eq!(hosts(&run), observer.targets_of_trench());
        }
        let speeds = observer.generator.run(tcp::bulk(vip, 1_000_000, 4)).unwrap().unwrap();
        println!("1 MB by {vip}, Mbit/s: {speeds:?}");
    }
    egress(observer);
    check_clean(&stage).unwrap();
}

/// Datagrams that a target sends by itself, with a VIP as source, arrive at the gateway with that source.
fn egress(observer: &Observer) {
    let gateway = observer.cluster.pod(&observer.trench.pod("gateway")).unwrap();
    let (v4, v6) = gateway_address();
    for (vip, to) in observer.vips().into_iter().zip([IpAddr::from(v4), IpAddr::from(v6)]) {
        let receiver = gateway.namespace.run(move || UdpSocket::bind(SocketAddr::new(to, 5005))).unwrap().unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        for target in observer.trench.target_pods() {
            let pod = observer.cluster.pod(&target).unwrap();
            let send = move || {
                UdpSocket::bind(SocketAddr::new(vip, 0))?
                    .send_to(target.as_bytes(), SocketAddr::new(to, 5005))
                    .map(|_| target)
            };
            let target = pod.namespace.run(send).unwrap().unwrap();
            let mut buffer = [0; 64];
            let (length, from) = receiver
                .recv_from(&mut buffer)
                .unwrap_or_else(|error| panic!("egress of {target} from {vip}: {error}"));
            assert_eq!((&buffer[..length], from.ip()), (target.as_bytes(), vip));
        }
        println!("egress from {vip}: every target's datagram arrived with the VIP as source");
    }
}

#[test]
fn a_closed_stream_gets_nothing_and_an_opened_one_gets_its_share() {
    let _turn = turn();
    let stage = scene("open", vec![Trench::fixture('a', 0)]).unwrap();
    let observer = &stage.observers[0];
    let all = observer.targets_of_trench();
    let closed = "target-2".to_owned();
    let rest: BTreeSet<String> = all.iter().filter(|name| **name != closed).cloned().collect();
    let begin = Instant::now();
    observer.close(&closed).unwrap();
    observer.wait_whole(&rest, Duration::from_secs(20), &mut |line| println!("{line}")).unwrap();
    println!("closed after {} ms", begin.elapsed().as_millis());
    for vip in observer.vips() {
        let run = observer.generator.run(tcp::connections(vip, 400, 16, 3)).unwrap();
        show(&run);
        assert_eq!((run.failed, hosts(&run)), (0, rest.clone()), "{:?}", run.failures);
    }
    let begin = Instant::now();
    observer.open(&closed, Duration::from_secs(5)).unwrap();
    observer.wait_whole(&all, Duration::from_secs(20), &mut |line| println!("{line}")).unwrap();
    println!("opened after {} ms", begin.elapsed().as_millis());
    for vip in observer.vips() {
        let run = observer.generator.run(tcp::connections(vip, 400, 16, 4)).unwrap();
        show(&run);
        assert_eq!((run.failed, hosts(&run)), (0, all.clone()), "{:?}", run.failures);
    }
    check_clean(&stage).unwrap();
}

/// The conduit with two port-NATs of one port to different target ports.
fn with_two_nats(good: &str) -> String {
    let nat = |to: u16| {
        let lines = ["- port: 4711".to_owned(), format!("  target-port: {to}"), "  protocol: tcp".to_owned()];
        let vips = ["  vips:".to_owned(), "  - vip-a-1-v4".to_owned()];
        lines.into_iter().chain(vips).map(|line| format!("      {line}\n")).collect::<String>()
    };
    let conduit = "    - name: conduit-a-1\n      trench: trench-a\n";
    let nats = format!("{conduit}      destination-port-nats:\n{}{}", nat(4000), nat(4001));
    good.replace(conduit, &nats)
}

#[test]
fn a_faulty_configuration_leaves_the_last_good_one_forwarding() {
    let _turn = turn();
    let stage = scene("conf", vec![Trench::fixture('a', 0)]).unwrap();
    let observer = &stage.observers[0];
    let file = stage.cluster.config_file(&observer.trench);
    let good = std::fs::read_to_string(&file).unwrap();
    let faults = [
        ("an unknown field", good.replace("priority: 1", "prioritee: 1"), "prioritee"),
        ("a VIP that is no CIDR", good.replace("20.0.0.1/32", "20.0.0.1.5/32"), "20.0.0.1.5"),
        (
            "a gateway that does not exist, which is left out",
            good.replace("gateways:\n      - gateway-v4", "gateways:\n      - gateway-x\n      - gateway-v4"),
            "gateway-x",
        ),
        ("port-NATs that overlap", with_two_nats(&good), "4711"),
    ];
    let traffic = observer.traffic().unwrap();
    for (what, text, named) in faults {
        assert_ne!(text, good, "{what}: the fault is not in the text");
        let mark = traffic.mark();
        std::fs::write(&file, text).unwrap();
        let log = stage.cluster.pod("nsp").unwrap().process("nsp").unwrap().log().clone();
        let deadline = Instant::now() + Duration::from_secs(10);
        while !std::fs::read_to_string(&log).unwrap_or_default().contains(named) {
            assert!(Instant::now() < deadline, "{what}: the NSP does not name {named} in its log");
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_secs(1));
        let window = traffic.since(mark);
        println!("{what}: {} packets sent, {} lost", window.sent, window.losses.len());
        assert!(
            window.losses.is_empty() && window.breaks.is_empty(),
            "{what}: {:?} {:?}",
            window.losses.first(),
            window.breaks.first()
        );
    }
    std::fs::write(&file, good).unwrap();
    observer
        .wait_whole(&observer.targets_of_trench(), Duration::from_secs(20), &mut |line| println!("{line}"))
        .unwrap();
    check_clean(&stage).unwrap();
}
