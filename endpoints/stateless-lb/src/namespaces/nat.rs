//! Port translation, from the configuration of a trench to what client and target see of it.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::Duration;

use meridio_model::Configuration;

use super::{Inputs, LOST, Scene, VIPS, eventually, targets};

/// Protocol, port, and target port; the flows of the sample match the ports.
pub(crate) const NATS: [(&str, u16, u16); 2] = [("tcp", 4000, 5000), ("udp", 4003, 5003)];

/// The sample's trench, with these translations on both VIPs.
pub(crate) fn trench(nats: &[(&str, u16, u16)]) -> String {
    const SAMPLE: &str = include_str!("../../../../deploy/samples/configuration.yaml");
    const CONDUIT: &str = "    - name: conduit-a-1\n      trench: trench-a\n";
    assert!(SAMPLE.contains(CONDUIT));
    let mut lines = Vec::new();
    for (protocol, port, target_port) in nats {
        lines.push(format!("- port: {port}"));
        lines.extend([format!("  target-port: {target_port}"), format!("  protocol: {protocol}")]);
        lines.extend(["  vips:", "  - vip-a-1-v4", "  - vip-a-1-v6"].map(str::to_owned));
    }
    if !lines.is_empty() {
        lines.insert(0, "destination-port-nats:".to_owned());
    }
    let conduit: String = lines.into_iter().map(|line| format!("      {line}\n")).collect();
    SAMPLE.replacen(CONDUIT, &format!("{CONDUIT}{conduit}"), 1)
}

/// What the NSP tells of that trench.
fn told(nats: &[(&str, u16, u16)]) -> Inputs {
    let lists = Configuration::parse(&trench(nats)).unwrap().to_nsp();
    Inputs {
        vips: Some(lists.vips),
        conduits: Some(lists.conduits),
        targets: Some(targets(&lists.streams[0])),
        streams: Some(lists.streams),
        flows: Some(lists.flows),
        ..Inputs::default()
    }
}

/// A target says its number, and which of its ports it was asked at.
fn says(n: u8, at: SocketAddr) -> [u8; 3] {
    let [high, low] = at.port().to_be_bytes();
    [n, high, low]
}

type Answer = (u8, u16);

fn said([n, high, low]: [u8; 3]) -> Answer {
    (n, u16::from_be_bytes([high, low]))
}

/// A server of a target: waits for a moment, and answers whoever asks.
type Server = Box<dyn FnMut([u8; 3]) + Send>;

fn tcp_server(at: SocketAddr) -> Server {
    let listener = TcpListener::bind(at).unwrap();
    listener.set_nonblocking(true).unwrap();
    Box::new(move |answer| match listener.accept() {
        Ok((mut stream, _)) => _ = stream.write_all(&answer),
        Err(_) => std::thread::sleep(Duration::from_millis(2)),
    })
}

fn udp_server(at: SocketAddr) -> Server {
    let socket = UdpSocket::bind(at).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    Box::new(move |answer| {
        if let Ok((_, from)) = socket.recv_from(&mut [0; 16]) {
            let _ = socket.send_to(&answer, from);
        }
    })
}

/// Serves a port of a target, of each VIP.
fn serve(scene: &mut Scene, n: u8, protocol: &str, port: u16) {
    let open = if protocol == "tcp" { tcp_server } else { udp_server };
    for vip in VIPS {
        let at = SocketAddr::new(vip.parse().unwrap(), port);
        let mut server = scene.netns(&format!("t{n}")).run_blocking(|| open(at)).unwrap();
        let ended = scene.ended.clone();
        scene.threads.push(std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                server(says(n, at));
            }
        }));
    }
}

/// An exchange in TCP; the answer comes from the address and port that were asked, or is none.
fn tcp(to: SocketAddr) -> Option<Answer> {
    let mut stream = TcpStream::connect_timeout(&to, LOST).ok()?;
    stream.set_read_timeout(Some(LOST)).unwrap();
    let mut answer = [0; 3];
    stream.read_exact(&mut answer).ok()?;
    Some(said(answer))
}

/// The same in UDP.
fn udp(to: SocketAddr) -> Option<Answer> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(LOST)).unwrap();
    socket.send(b"which?").ok()?;
    let mut answer = [0; 3];
    (socket.recv(&mut answer).ok()? == 3).then(|| said(answer))
}

/// Answers to many clients.
fn ask(scene: &Scene, protocol: &str, vip: &str, port: u16) -> BTreeSet<Option<Answer>> {
    let exchange = if protocol == "tcp" { tcp } else { udp };
    let to = SocketAddr::new(vip.parse().unwrap(), port);
    scene.netns("c").run_blocking(|| (0..24).map(|_| exchange(to)).collect()).unwrap()
}

#[test]
fn ports_are_translated_as_the_conduit_says_and_no_longer_than_it_does() {
    let mut scene = Scene::with("nat", told(&NATS), |_| {});
    for n in 1..=2 {
        for (protocol, port, target_port) in NATS {
            serve(&mut scene, n, protocol, port);
            serve(&mut scene, n, protocol, target_port);
        }
    }
    let both = |port| BTreeSet::from([Some((1, port)), Some((2, port))]);
    for vip in VIPS {
        for (protocol, port, target_port) in NATS {
            assert_eq!(ask(&scene, protocol, vip, port), both(target_port), "{protocol} {vip}");
        }
    }
    scene.shared.change(|inputs| inputs.conduits = told(&[]).conduits);
    let (_, port, _) = NATS[1];
    let untouched = || ask(&scene, "udp", VIPS[0], port) == both(port);
    eventually(untouched, || "still translated".to_owned());
    for vip in VIPS {
        for (protocol, port, _) in NATS {
            assert_eq!(ask(&scene, protocol, vip, port), both(port), "{protocol} {vip}, without translation");
        }
    }
}
