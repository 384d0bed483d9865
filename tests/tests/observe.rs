//! Counters, trace and `why` of running load balancers agree with where the packets went.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use meridio_demo::namespace::{BINARY_DIR, Namespace};
use meridio_demo::stage::Stage;
use meridio_demo::topology::{Trench, gateway_address};
use meridio_demo::traffic::tcp;
use meridio_tests::scene::{binary, check_clean, scene, turn};
use serde_json::Value;

/// Port of the UDP flow.
const PORT: u16 = 4003;
/// Client ports of each family.
const PORTS: std::ops::Range<u16> = 42_000..42_024;

fn meridio() -> String {
    format!("{BINARY_DIR}/meridio")
}

/// Sums of a metric over both load balancers, by the labels asked for.
fn metric(stage: &Stage, name: &str, labels: &[(&str, &str)]) -> f64 {
    let mut sum = 0.0;
    for lb in stage.observers[0].trench.lbs() {
        let text = stage.cluster.pod(&lb).unwrap().namespace.run(scrape).unwrap().unwrap();
        assert!(text.contains(&format!("# TYPE {name} counter\n")), "{name} is not among\n{text}");
        let wanted = |line: &&str| {
            let labelled = line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{'));
            labelled && labels.iter().all(|(key, value)| line.contains(&format!("{key}=\"{value}\"")))
        };
        sum += text.lines().filter(wanted).filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>();
    }
    sum
}

fn scrape() -> std::io::Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", 2223))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: lb\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    Ok(text)
}

/// A trace in a pod, killed when it is dropped.
struct Trace(Child);

impl Trace {
    fn start(namespace: &Namespace, args: &'static [&'static str]) -> Self {
        let spawn = move || {
            let mut command = Command::new(meridio());
            command.arg("trace").arg("--json").args(args);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn()
        };
        let mut child = namespace.run(spawn).unwrap().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("meridio: tracing"), "{line}");
        Trace(child)
    }

    /// Everything told, after SIGTERM.
    fn end(mut self) -> Vec<Value> {
        // What was sent just now is told within one look.
        std::thread::sleep(Duration::from_millis(500));
        let pid = nix::unistd::Pid::from_raw(self.0.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let mut text = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(self.0.wait().unwrap().success());
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a datagram from each client port; who answered.
fn exchange(gateway: &Namespace, from: IpAddr, vip: IpAddr) -> BTreeMap<u16, String> {
    let work = move || {
        PORTS
            .map(|port| {
                let socket = UdpSocket::bind(SocketAddr::new(from, port)).unwrap();
                socket.connect(SocketAddr::new(vip, PORT)).unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                socket.send(b"who").unwrap();
                let mut buffer = [0; 256];
                let length = socket.recv(&mut buffer).unwrap_or_else(|e| panic!("{from}:{port} to {vip}: {e}"));
                (port, String::from_utf8_lossy(&buffer[..length]).split(' ').next().unwrap().to_owned())
            })
            .collect()
    };
    gateway.run(work).unwrap()
}

/// A capture of the datagrams of [`exchange`], without a link layer.
fn capture(from: IpAddr, vip: IpAddr) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65_535, 101] {
        file.extend(word.to_le_bytes());
    }
    for port in PORTS {
        let mut packet = match (from, vip) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let mut b = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
                b.extend([src.octets(), dst.octets()].concat());
                b
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let mut b = vec![0x60, 0, 0, 0, 0, 8, 17, 64];
                b.extend([src.octets(), dst.octets()].concat());
                b
            }
            _ => unreachable!("one family"),
        };
        packet.extend([port.to_be_bytes(), PORT.to_be_bytes(), [0, 8], [0, 0]].concat());
        let length = (packet.len() as u32).to_le_bytes();
        file.extend([[0; 4], [0; 4], length, length].concat());
        file.extend(packet);
    }
    file
}

/// What a load balancer says about each client port.
fn why(lb: &Namespace, from: IpAddr, vip: IpAddr) -> BTreeMap<u16, Value> {
    let bytes = capture(from, vip);
    lb.run(move || std::fs::write("/tmp/asked.pcap", bytes)).unwrap().unwrap();
    let text = lb.output(&meridio(), &["why", "--json", "--pcap", "/tmp/asked.pcap"]).unwrap();
    let answers = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    answers.map(|a| (a["packet"]["source_port"].as_u64().unwrap() as u16, a)).collect()
}

#[test]
fn counters_trace_and_why_tell_where_packets_went() {
    let _turn = turn();
    let stage = scene("obs", vec![Trench::fixture('a', 0)]).unwrap();
    let observer = &stage.observers[0];
    let gateway = stage.cluster.pod(&observer.trench.pod("gateway")).unwrap();
    let lbs = observer.trench.lbs().map(|name| stage.cluster.pod(&name).unwrap());
    let (v4, v6) = gateway_address();
    let mut hosts = BTreeMap::new();
    let mut ready = BTreeSet::new();
    for (vip, from) in observer.vips().into_iter().zip([IpAddr::from(v4), IpAddr::from(v6)]) {
        let flow =
            [("flow", "flow-a-z-udp"), ("trench", "trench-a"), ("conduit", "conduit-a-1"), ("stream", "stream-a-i")];
        let matches = |name| metric(&stage, name, &flow);
        let hits = || metric(&stage, "meridio_conduit_stream_target_hit_packets_total", &flow[1..]);
        let before = (matches("meridio_conduit_stream_flow_matches_total"), hits());
        let traces = lbs.each_ref().map(|lb| Trace::start(&lb.namespace, &["--protocol", "udp", "--port", "4003"]));
        let went = exchange(&gateway.namespace, from, vip);
        let events: Vec<Value> = traces.into_iter().flat_map(Trace::end).collect();
        let sent = PORTS.len() as f64;
        let after = (matches("meridio_conduit_stream_flow_matches_total"), hits());
        assert_eq!((after.0 - before.0, after.1 - before.1), (sent, sent), "{vip}");
        assert_eq!(events.len(), PORTS.len(), "{vip}: each datagram passes one load balancer once");
        let answers = lbs.each_ref().map(|lb| why(&lb.namespace, from, vip));
        for (port, host) in &went {
            let [one, other] = [&answers[0][port], &answers[1][port]];
            for key in ["identifier", "row", "next_hop"] {
                assert_eq!(one["target"][key], other["target"][key], "the load balancers disagree: {one} {other}");
            }
            let event = events.iter().find(|e| e["source_port"] == *port).unwrap();
            let told = |key: &str| (event[key].clone(), one["target"][key].clone());
            for key in ["identifier", "row", "next_hop"] {
                let (event, why) = told(key);
                assert!(!why.is_null() && event == why, "{key} of port {port}: traced {event}, explained {why}");
            }
            assert_eq!((&event["flow"], &one["flow"]), (&"flow-a-z-udp".into(), &"flow-a-z-udp".into()));
            assert_eq!(
                (&event["verdict"], &one["verdict"], &one["reason"]),
                (&"forward".into(), &"forward".into(), &"redirected".into())
            );
            assert_eq!(event["source"], from.to_string().as_str());
            let identifier = one["target"]["identifier"].as_u64().unwrap();
            ready.extend(one["stream"]["ready"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()));
            // One identifier is one host, for both families.
            assert_eq!(hosts.entry(identifier).or_insert_with(|| host.clone()), host, "identifier {identifier}");
        }
        println!("{vip}: {} datagrams, trace, counters and why agree: {hosts:?}", went.len());
    }
    assert_eq!(hosts.len(), observer.targets_of_trench().len(), "{hosts:?}");
    assert_eq!(hosts.values().cloned().collect::<BTreeSet<_>>(), observer.targets_of_trench());
    the_configuration_says_the_same(&stage, &ready, &why(&lbs[0].namespace, v4.into(), observer.vips()[0]));
    drops_have_a_reason(&stage);
    segments_are_counted(&stage);
    bad_questions(&lbs[0].namespace);
    check_clean(&stage).unwrap();
}

/// The file, with the identifiers that are ready, gives the answers of the running load balancer.
fn the_configuration_says_the_same(stage: &Stage, ready: &BTreeSet<u64>, live: &BTreeMap<u16, Value>) {
    let observer = &stage.observers[0];
    let ids: Vec<String> = ready.iter().map(u64::to_string).collect();
    for (port, answer) in live {
        let packet = format!("udp {}:{port} -> {}:{PORT}", gateway_address().0, observer.trench.vip4);
        let out = Command::new(binary().unwrap())
            .args(["why", "--json", "--targets", &format!("stream-a-i:{}", ids.join(",")), "--config"])
            .arg(stage.cluster.config_file(&observer.trench))
            .arg(&packet)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let said: Value = serde_json::from_slice(&out.stdout).unwrap();
        for key in ["identifier", "row", "row_owner"] {
            assert_eq!(said["target"][key], answer["target"][key], "{packet}: {said}");
        }
    }
}

/// A datagram to a port that no flow has.
fn drops_have_a_reason(stage: &Stage) {
    let observer = &stage.observers[0];
    let gateway = stage.cluster.pod(&observer.trench.pod("gateway")).unwrap();
    let lbs = observer.trench.lbs().map(|name| stage.cluster.pod(&name).unwrap());
    let dropped = || metric(stage, "meridio_conduit_packets_total", &[("reason", "no-flow")]);
    let before = dropped();
    // A trace that was killed does not stand in the way of the next one.
    drop(Trace::start(&lbs[0].namespace, &["--seconds", "600"]));
    let traces = lbs.each_ref().map(|lb| Trace::start(&lb.namespace, &["--dropped", "--to", "20.0.0.1"]));
    let vip = observer.vips()[0];
    let send = move || {
        let socket = UdpSocket::bind(SocketAddr::new(gateway_address().0.into(), 42_100)).unwrap();
        (0..5).for_each(|_| assert_eq!(socket.send_to(b"lost", SocketAddr::new(vip, 4999)).unwrap(), 4));
    };
    gateway.namespace.run(send).unwrap();
    let deadline = Instant::now() + Duration::from_secs(5);
    while dropped() - before < 5.0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(dropped() - before, 5.0);
    let events: Vec<Value> = traces.into_iter().flat_map(Trace::end).collect();
    let to_it = events.iter().filter(|e| e["destination_port"] == 4999);
    assert!(to_it.clone().all(|e| e["reason"] == "no-flow" && e["verdict"] == "drop" && e["flow"].is_null()));
    assert_eq!(to_it.count(), 5);
    let packet = format!("udp {}:42100 -> {vip}:4999", gateway_address().0);
    let text = lbs[0].namespace.output(&meridio(), &["why", &packet]).unwrap();
    println!("{text}");
    for said in
        ["flow-a-z-udp of stream stream-a-i: does not match: destination port 4999 is not in 4003", "dropped, no-flow"]
    {
        assert!(text.contains(said), "{said:?} is not in {text}");
    }
    let packet = packet.replace("4999", "4003");
    println!("{}", lbs[0].namespace.output(&meridio(), &["why", &packet]).unwrap());
    // From outside the pod, by a process in it.
    let pid = lbs[0].process("stateless-lb").unwrap().pid().unwrap().to_string();
    let out = Command::new(binary().unwrap()).args(["why", "--pid", &pid, &packet]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(out.status.success() && text.contains("forwarded, redirected"), "{text}");
}

/// Super-packets of a large transfer count as what they are on the wire.
fn segments_are_counted(stage: &Stage) {
    let observer = &stage.observers[0];
    let flow = [("flow", "flow-a-z-tcp")];
    let read = || {
        let packets = metric(stage, "meridio_conduit_stream_flow_matches_total", &flow);
        (packets, metric(stage, "meridio_conduit_stream_flow_matches_bytes_total", &flow))
    };
    let before = read();
    let speeds = observer.generator.run(tcp::bulk(observer.vips()[0], 4_000_000, 1)).unwrap().unwrap();
    let after = read();
    let (packets, bytes) = (after.0 - before.0, after.1 - before.1);
    println!("4 MB in {packets} packets of {:.0} bytes, Mbit/s: {speeds:?}", bytes / packets);
    assert!(bytes >= 4_000_000.0 && bytes / packets <= 1500.0, "{bytes} bytes in {packets} packets");
}

/// One line that names the fault; status 64 for what can be seen at once, 1 for what fails.
fn bad_questions(lb: &Namespace) {
    let cases: [(&'static [&'static str], i32, &'static str); 8] = [
        (&["why"], 64, "say a packet"),
        (&["why", "tcp 10.0.0.1:1 -> 20.0.0.1"], 64, "destination \"20.0.0.1\""),
        (&["why", "quic 10.0.0.1:1 -> 20.0.0.1:2"], 64, "\"quic\""),
        (&["why", "--pcap", "/nonexistent"], 1, "/nonexistent"),
        (&["why", "--config", "/nonexistent", "tcp 10.0.0.1:1 -> 20.0.0.1:2"], 1, "/nonexistent"),
        (&["why", "--bpf-dir", "/sys/fs/bpf/nothing", "tcp 10.0.0.1:1 -> 20.0.0.1:2"], 1, "/sys/fs/bpf/nothing"),
        (&["trace", "--port", "9-1"], 64, "empty range"),
        (&["trace", "--bpf-dir", "/tmp"], 1, "not on a BPF file system"),
    ];
    for (args, status, named) in cases {
        let out = lb.run(move || Command::new(meridio()).args(args).output()).unwrap().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!((out.status.code(), said.lines().count()), (Some(status), 1), "{args:?}: {said}");
        assert!(said.starts_with("meridio: ") && said.contains(named), "{args:?}: {said}");
    }
}
