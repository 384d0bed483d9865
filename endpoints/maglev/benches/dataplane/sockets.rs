//! What clients see: latency of datagrams at idle, TCP connections per second, TCP throughput. Client on CPU 0, server on CPU 1,
//! cables as they are by default.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::Effort;
use crate::lanes::{Balancer, FIRST_PORT, Load};
use crate::peer::Peer;
use crate::report::{Samples, Section, median, quantile};
use crate::topology::{Topology, Way, pin};

/// Each number of flows and each of targets once: what a packet costs the program with any pair of them, the other parts measure,
/// and it is a hundredth of what these figures are made of.
const LOADS: [(u32, u32); 5] = [(1, 4), (10, 4), (100, 100), (1_000, 1_000), (2_000, 1_000)];
/// Those of IPv6.
const LOADS_V6: [(u32, u32); 2] = [(1, 4), (1_000, 1_000)];
const ECHO: usize = 32;
const CHUNK: usize = 128 << 10;

/// Ports that clients use: the last flow of each load.
fn ports() -> Vec<u16> {
    let mut ports: Vec<u16> = LOADS.iter().map(|(flows, _)| port(*flows)).collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

fn port(flows: u32) -> u16 {
    FIRST_PORT + flows as u16 - 1
}

fn title(text: &str, v6: bool) -> String {
    if v6 { format!("{text}, IPv6") } else { text.to_owned() }
}

/// Where clients connect to.
fn vip(way: Way, v6: bool) -> IpAddr {
    if v6 { way.target_vip6().into() } else { way.target_vip().into() }
}

/// Starts the servers of the target. They end with the process: their namespace goes with the topology.
pub(crate) fn serve(topology: &Topology) {
    for (way, v6) in [Way::Balancer, Way::Kernel, Way::Peer].into_iter().flat_map(|way| [(way, false), (way, true)]) {
        for port in ports() {
            let at = SocketAddr::from((vip(way, v6), port));
            let (udp, tcp) =
                topology.within("target", || (UdpSocket::bind(at).unwrap(), TcpListener::bind(at).unwrap()));
            std::thread::spawn(move || echo(&udp));
            std::thread::spawn(move || accept(&tcp));
        }
    }
}

fn echo(socket: &UdpSocket) {
    pin(0, 1);
    let mut buffer = [0; 2048];
    while let Ok((n, from)) = socket.recv_from(&mut buffer) {
        let _ = socket.send_to(&buffer[..n], from);
    }
}

/// The first byte says what a connection is for: `e` one exchange, `s` a stream whose length is answered.
fn accept(listener: &TcpListener) {
    pin(0, 1);
    let mut buffer = vec![0; CHUNK];
    while let Ok((mut stream, _)) = listener.accept() {
        let Ok(n) = stream.read(&mut buffer) else { continue };
        match buffer.first().filter(|_| n > 0) {
            Some(b's') => {
                let mut all = n as u64;
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    all += n as u64;
                }
                let _ = stream.write_all(&all.to_be_bytes());
            }
            _ => drop(stream.write_all(&buffer[..n])),
        }
    }
}

/// A figure of each way, interleaved; the first one is the kernel's. Another balancer is asked for IPv4 only.
fn interleave(
    effort: &Effort,
    topology: &Topology,
    balancer: &mut Balancer,
    peer: &mut Option<Peer>,
    (what, v6): (&str, bool),
    mut one: impl FnMut(IpAddr, u16) -> Vec<f64>,
) -> Vec<(String, Vec<Samples>)> {
    let all: &[(u32, u32)] = if v6 { &LOADS_V6 } else { &LOADS };
    let loads = if effort.quick { &all[..1] } else { all };
    let peer = &mut peer.as_mut().filter(|_| !v6);
    let mut one = |way, port| one(vip(way, v6), port);
    let mut names = vec!["kernel forwarding".to_owned()];
    names.extend(loads.iter().map(|(f, t)| Load::new(*f, *t).name()));
    names.extend(peer.iter().map(|p| format!("{}, 1 flow, 4 targets", p.name)));
    let mut all: Vec<(String, Vec<Samples>)> = names.into_iter().map(|name| (name, Vec::new())).collect();
    for round in 0..=effort.rounds {
        let mut figures = vec![one(Way::Kernel, port(1))];
        for (flows, targets) in loads {
            balancer.configure(Load::new(*flows, *targets), false);
            figures.push(one(Way::Balancer, port(*flows)));
        }
        if let Some(peer) = peer {
            let running = peer.start(topology, 4, false);
            figures.push(one(Way::Peer, port(1)));
            running.stop();
        }
        // The kernel once more: the reference is the mean of before and after.
        let after = one(Way::Kernel, port(1));
        let reference: Vec<f64> = figures[0].iter().zip(&after).map(|(a, b)| (a + b) / 2.0).collect();
        figures[0].clone_from(&reference);
        // The first round finds neighbours and warms up.
        if round == 0 {
            continue;
        }
        for ((_, samples), values) in all.iter_mut().zip(figures) {
            samples.resize_with(values.len(), Samples::default);
            for ((sample, value), reference) in samples.iter_mut().zip(values).zip(&reference) {
                sample.add(value);
                sample.relate(*reference);
            }
        }
        eprintln!("{}: round {round} of {}", title(what, v6), effort.rounds);
    }
    all
}

/// UDP echo, one at a time.
pub(crate) fn latency(
    effort: &Effort,
    topology: &Topology,
    balancer: &mut Balancer,
    peer: &mut Option<Peer>,
    v6: bool,
) -> Section {
    let count = if effort.quick { 500 } else { 5_000 };
    let all = interleave(effort, topology, balancer, peer, ("latency", v6), |vip, port| {
        let times = topology.within("generator", || exchanges(vip, port, count));
        vec![median(&times), quantile(&times, 0.99)]
    });
    let mut section = Section::new(
        &title("Latency at idle (UDP echo)", v6),
        &["way", "p50 us", "x kernel", "range", "p99 us", "x kernel"],
    );
    for (name, samples) in &all {
        let [p50, p99] = samples.as_slice() else { continue };
        section.row(
            &[
                name.clone(),
                format!("{:.1}", p50.median()),
                format!("{:.2}", p50.ratio()),
                p50.range(),
                format!("{:.1}", p99.median()),
                format!("{:.2}", p99.ratio()),
            ],
            json!({"way": name, "p50_us": p50.median(), "p50_ratio": p50.ratio(), "p50_ratios": p50.ratios,
                "p99_us": p99.median(), "p99_ratio": p99.ratio()}),
        );
    }
    section
}

/// Times of exchanges, microseconds.
fn exchanges(vip: IpAddr, port: u16, count: usize) -> Vec<f64> {
    pin(0, 0);
    let any: IpAddr = if vip.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.connect((vip, port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut buffer = [0; ECHO];
    let mut one = || {
        let started = Instant::now();
        socket.send(&[7; ECHO]).unwrap();
        socket.recv(&mut buffer).map(|_| started.elapsed().as_secs_f64() * 1e6)
    };
    for _ in 0..50 {
        let _ = one();
    }
    (0..count).map(|n| one().unwrap_or_else(|e| panic!("{vip}:{port}: no answer to datagram {n}: {e}"))).collect()
}

/// Connect, one exchange, reset; one after the other.
pub(crate) fn connections(
    effort: &Effort,
    topology: &Topology,
    balancer: &mut Balancer,
    peer: &mut Option<Peer>,
    v6: bool,
) -> Section {
    let time = Duration::from_millis(if effort.quick { 200 } else { 800 });
    let all = interleave(effort, topology, balancer, peer, ("connections", v6), |vip, port| {
        vec![topology.within("generator", || connects(SocketAddr::from((vip, port)), time))]
    });
    rates(&title("TCP connections", v6), "connections/s", 1.0, &all)
}

fn connects(to: SocketAddr, time: Duration) -> f64 {
    pin(0, 0);
    let (started, mut count) = (Instant::now(), 0);
    while started.elapsed() < time {
        let mut stream =
            TcpStream::connect_timeout(&to, Duration::from_secs(3)).unwrap_or_else(|e| panic!("{to}: {e}"));
        let mut answer = [0; 8];
        stream.write_all(b"exchange").unwrap();
        stream.read_exact(&mut answer).unwrap();
        // A reset leaves no port waiting.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
        count += 1;
    }
    count as f64 / started.elapsed().as_secs_f64()
}

/// One stream of large writes.
pub(crate) fn throughput(
    effort: &Effort,
    topology: &Topology,
    balancer: &mut Balancer,
    peer: &mut Option<Peer>,
    v6: bool,
) -> Section {
    let time = Duration::from_millis(if effort.quick { 300 } else { 1_200 });
    let all = interleave(effort, topology, balancer, peer, ("throughput", v6), |vip, port| {
        vec![topology.within("generator", || stream(SocketAddr::from((vip, port)), time))]
    });
    rates(&title("TCP throughput, one stream", v6), "Gbit/s", 1e9, &all)
}

/// Bits per second that the server says have arrived.
fn stream(to: SocketAddr, time: Duration) -> f64 {
    pin(0, 0);
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(3)).unwrap_or_else(|e| panic!("{to}: {e}"));
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let chunk = vec![b's'; CHUNK];
    let started = Instant::now();
    while started.elapsed() < time {
        stream.write_all(&chunk).unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).unwrap_or_else(|e| panic!("{to}: no answer: {e}"));
    u64::from_be_bytes(answer) as f64 * 8.0 / started.elapsed().as_secs_f64()
}

fn rates(title: &str, unit: &str, scale: f64, all: &[(String, Vec<Samples>)]) -> Section {
    let mut section = Section::new(title, &["way", unit, "x kernel", "range"]);
    for (name, samples) in all {
        let Some(rate) = samples.first() else { continue };
        let shown = rate.median() / scale;
        let text = if scale > 1.0 { format!("{shown:.1}") } else { format!("{shown:.0}") };
        section.row(
            &[name.clone(), text, format!("{:.2}", rate.ratio()), rate.range()],
            json!({"way": name, "rate": rate.median(), "ratio": rate.ratio(), "ratios": rate.ratios}),
        );
    }
    section
}
