//! Packets through real interfaces: client, load balancer and two targets in namespaces of their own.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::net::{Net, V4, V6};
use common::{BpfFs, dual_stack, flow, start, vips};
use meridio_maglev::{Config, Engine, Nat, Protocol, Reason};

/// Echo servers of a target: each answer begins with the target's number.
fn serve(net: &Net, number: u8, port: u16) {
    for vip in [IpAddr::V4(V4), IpAddr::V6(V6)] {
        let (stop, tcp_stop) = (net.stop.clone(), net.stop.clone());
        net.within(&format!("t{number}"), move || {
            let socket = UdpSocket::bind((vip, port)).unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            let mut buffer = [0; 65_536];
            while !stop.load(Ordering::Relaxed) {
                if let Ok((_, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&[number], from);
                }
            }
        });
        net.within(&format!("t{number}"), move || {
            let listener = TcpListener::bind((vip, port)).unwrap();
            listener.set_nonblocking(true).unwrap();
            while !tcp_stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((mut stream, _)) => {
                        std::thread::spawn(move || {
                            stream.set_nonblocking(false).unwrap();
                            let mut all = Vec::new();
                            let _ = stream.read_to_end(&mut all);
                            let _ = stream.write_all(&[number]);
                            let _ = stream.write_all(&(all.len() as u32).to_be_bytes());
                        });
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
    }
}

fn config() -> Config {
    Config {
        nats: [Protocol::Tcp, Protocol::Udp]
            .map(|protocol| Nat { vips: vips(), protocol, port: 80, target_port: 5000 })
            .to_vec(),
        ..dual_stack(vec![flow("f", &[Protocol::Tcp, Protocol::Udp], &[4000, 80])])
    }
}

fn udp(vip: IpAddr, port: u16, size: usize) -> Option<u8> {
    let any: IpAddr = if vip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.connect((vip, port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut buffer = [0; 16];
    // Errors of earlier packets (too big) are told on the next call.
    for _ in 0..3 {
        if socket.send(&vec![7; size]).is_ok()
            && let Ok(n) = socket.recv(&mut buffer)
        {
            return (n > 0).then_some(buffer[0]);
        }
    }
    None
}

fn tcp(vip: IpAddr, port: u16, size: usize) -> Option<u8> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(vip, port), Duration::from_secs(3)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(&vec![1; size]).ok()?;
    stream.shutdown(std::net::Shutdown::Write).ok()?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok()?;
    (answer.get(1..5)? == (size as u32).to_be_bytes()).then_some(answer[0])
}

/// An echo request; the answer of any target counts.
fn ping(vip: IpAddr, _port: u16, size: usize) -> Option<u8> {
    use socket2::{Domain, Protocol, Socket, Type};
    let (domain, protocol, kind) = match vip {
        IpAddr::V4(_) => (Domain::IPV4, Protocol::ICMPV4, 8),
        IpAddr::V6(_) => (Domain::IPV6, Protocol::ICMPV6, 128),
    };
    let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket.connect(&SocketAddr::new(vip, 0).into()).unwrap();
    let mut packet = vec![0; 8 + size];
    packet[0] = kind;
    (&socket).write_all(&packet).unwrap();
    (&socket).read(&mut packet).ok().map(|_| 1)
}

type Probe = fn(IpAddr, u16, usize) -> Option<u8>;

/// Answers by target; nothing may be lost.
fn all(net: &Net, probe: Probe, vip: IpAddr, port: u16, size: usize, count: usize) -> BTreeSet<u8> {
    let answers =
        net.within("c", move || (0..count).map(|_| probe(vip, port, size)).collect::<Vec<_>>()).join().unwrap();
    assert!(answers.iter().all(Option::is_some), "{vip} port {port} size {size}: {answers:?}");
    answers.into_iter().flatten().collect()
}

#[test]
fn traffic_reaches_targets() {
    let fs = BpfFs::new();
    let net = Net::new(2);
    serve(&net, 1, 4000);
    serve(&net, 2, 4000);
    // Port 80 is translated. (A target port cannot be addressed directly as well: its replies would be translated back.)
    serve(&net, 1, 5000);
    serve(&net, 2, 5000);
    let settings = fs.settings();
    let (config, both) = (config(), net.targets(&[1, 2]));
    let again = settings.clone();
    let mut engine = start(&net, settings, config.clone(), both.clone());
    std::thread::sleep(Duration::from_millis(300));
    for vip in [IpAddr::V4(V4), IpAddr::V6(V6)] {
        for (probe, port) in [(udp as Probe, 4000), (tcp, 4000), (udp, 80), (tcp, 80)] {
            assert_eq!(all(&net, probe, vip, port, 100, 40), BTreeSet::from([1, 2]), "{vip} {port}");
        }
        // Segmentation offload and fragments: large transfers, datagrams of several fragments.
        all(&net, tcp, vip, 4000, 2_000_000, 3);
        all(&net, tcp, vip, 80, 2_000_000, 3);
        all(&net, udp, vip, 4000, 5_000, 20);
        all(&net, ping, vip, 0, 56, 10);
        all(&net, ping, vip, 0, 4_000, 3);
    }

    // One target less: everything to the other, at once.
    engine.set_targets("s", &net.targets(&[2])["s"]).unwrap();
    assert_eq!(all(&net, udp, V4.into(), 4000, 100, 40), BTreeSet::from([2]));

    // A process that dies and comes back: the maps are adopted, and nothing is lost on the way.
    drop(engine);
    assert_eq!(all(&net, udp, V6.into(), 4000, 100, 10), BTreeSet::from([2]));
    let traffic = {
        let stop = Arc::new(AtomicBool::new(false));
        let end = stop.clone();
        let handle = net.within("c", move || {
            let (mut sent, mut lost) = (0, 0);
            while !end.load(Ordering::Relaxed) {
                sent += 1;
                lost += (udp(V4.into(), 4000, 20).is_none()) as u32;
            }
            (sent, lost)
        });
        (stop, handle)
    };
    let c = config.clone();
    let mut engine = net
        .within("l", move || {
            let mut engine = Engine::open(again).unwrap();
            assert!(engine.adopted());
            assert_eq!(engine.targets("s").unwrap().len(), 1);
            for _ in 0..3 {
                engine.attach("ext").unwrap();
            }
            engine.apply(&c, &both).unwrap();
            engine
        })
        .join()
        .unwrap();
    let (one, two) = (net.targets(&[1])["s"].clone(), net.targets(&[1, 2])["s"].clone());
    let started = Instant::now();
    let mut swaps = 0;
    while started.elapsed() < Duration::from_secs(2) {
        engine.set_targets("s", if swaps % 2 == 0 { &one } else { &two }).unwrap();
        swaps += 1;
    }
    traffic.0.store(true, Ordering::Relaxed);
    let (sent, lost) = traffic.1.join().unwrap();
    println!("{swaps} swaps under {sent} exchanges: {lost} lost");
    assert_eq!(lost, 0);
    assert!(swaps > 10 && sent > 100);
    let reasons = engine.reasons().unwrap();
    println!("{reasons:?}");
    let count = |reason: Reason| reasons.iter().find(|(r, _)| *r == reason).unwrap().1.packets;
    assert!(count(Reason::Redirected) > 500);
    assert_eq!(count(Reason::Internal) + count(Reason::Helper) + count(Reason::NoAddress), 0);
    assert!(engine.target_hits().unwrap().iter().all(|h| h.counter.packets > 0));
    assert!(engine.flow_hits().unwrap()[0].counter.packets > 500);

    // Clean removal leaves nothing, once nobody runs the load balancer.
    drop(engine);
    let dir = fs.path();
    net.within("l", move || Engine::remove(&dir, &["ext"]).unwrap()).join().unwrap();
    assert_eq!(std::fs::read_dir(fs.path()).unwrap().count(), 0);
}
