//! Two namespaces joined by a cable: the frontend's pod and a gateway with a BIRD of its own.
// A harness is a test's text too: what it expects it says by `expect`.
#![allow(clippy::expect_used)]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use clap::Parser as _;
use meridio_frontend::Settings;
use meridio_frontend::agent::Report;
use meridio_frontend::drive::{Channels, drive};
use meridio_proto::nsp::v1 as nsp;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

/// Limit of everything that is waited for.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);
static COUNT: AtomicU32 = AtomicU32::new(0);

/// Runs `ip` with words of `line`; panics when it fails.
pub(crate) fn ip(line: &str) -> String {
    let output = Command::new("ip").args(line.split_whitespace()).output().expect("ip");
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Starts a thread inside a named namespace.
pub(crate) fn in_ns<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let namespace = std::fs::File::open(format!("/run/netns/{name}")).expect("namespace");
    std::thread::spawn(move || {
        use std::os::fd::AsFd as _;
        let kind = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(namespace.as_fd(), kind).expect("setns");
        work()
    })
}

/// Waits until `condition` holds and says how long that took.
pub(crate) fn wait(what: &str, mut condition: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
    start.elapsed()
}

/// The two namespaces; gone with the value.
pub(crate) struct Net {
    pub(crate) fe: String,
    pub(crate) gw: String,
    pub(crate) dir: tempfile::TempDir,
    gateway: Option<Child>,
}

impl Net {
    /// `ipv4` says whether the pod has an IPv4 address.
    pub(crate) fn new(ipv4: bool) -> Self {
        let unique = format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let (fe, gw) = (format!("mdt-f-{unique}-fe"), format!("mdt-f-{unique}-gw"));
        for name in [&fe, &gw] {
            ip(&format!("netns add {name}"));
            ip(&format!("-n {name} link set lo up"));
        }
        // Carrier news of a cable are held back for up to a second where both ends have one index (linkwatch).
        ip(&format!("link add ext-vlan0 index 77 netns {fe} type veth peer name ext-gw netns {gw}"));
        for (name, device, last) in [(&fe, "ext-vlan0", 2), (&gw, "ext-gw", 150)] {
            if ipv4 {
                ip(&format!("-n {name} addr add 169.254.100.{last}/24 dev {device}"));
            }
            ip(&format!("-n {name} addr add 100:100::{last}/64 dev {device} nodad"));
            ip(&format!("-n {name} link set {device} up"));
        }
        // The VIPs stand in for what comes from the targets; the gateway keeps a way to them without BGP, because it is the
        // way out that is measured.
        ip(&format!("-n {fe} addr add 20.0.0.1/32 dev lo"));
        ip(&format!("-n {fe} addr add 2000::1/128 dev lo nodad"));
        if ipv4 {
            ip(&format!("-n {gw} route add 20.0.0.1/32 via 169.254.100.2 metric 5000"));
        }
        ip(&format!("-n {gw} route add 2000::1/128 via 100:100::2 metric 5000"));
        Self { fe, gw, dir: tempfile::tempdir().expect("dir"), gateway: None }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts the gateway's BIRD; `extra` goes into each BGP session.
    pub(crate) fn start_gateway(&mut self, extra: &str) {
        let text = format!(
            "log stderr {{ error, fatal, bug }}; router id 9.9.9.9;
protocol device {{ scan time 2; }}
template bgp L {{ direct; hold time 3; connect delay time 1; connect retry time 1; error wait time 1, 2;
  bfd {{ min rx interval 50 ms; min tx interval 50 ms; multiplier 3; }};
  local port 10179 as 4248829953; interface \"ext-gw\"; {extra} }}
protocol static {{ ipv4; route 0.0.0.0/0 blackhole; }}
protocol static {{ ipv6; route ::/0 blackhole; }}
protocol bgp fe4 from L {{ neighbor 169.254.100.2 port 10179 as 8103; ipv4 {{ import all; export where net = 0.0.0.0/0; next hop self; }}; }}
protocol bgp fe6 from L {{ neighbor 100:100::2 port 10179 as 8103; ipv6 {{ import all; export where net = ::/0; next hop self; }}; }}
protocol kernel {{ ipv4 {{ export where source = RTS_BGP; }}; }}
protocol kernel {{ ipv6 {{ export where source = RTS_BGP; }}; }}
protocol bfd {{ accept direct; neighbor 169.254.100.2 dev \"ext-gw\" local 169.254.100.150; }}
"
        );
        let config = self.path("gw.conf");
        std::fs::write(&config, text).expect("gateway configuration");
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.gw, "bird", "-f", "-c"]).arg(&config).arg("-s").arg(self.path("gw.ctl"));
        self.gateway = Some(command.stdin(Stdio::null()).spawn().expect("gateway"));
    }

    /// Signals the gateway's BIRD.
    pub(crate) fn signal_gateway(&self, signal: rustix::process::Signal) {
        let id = self.gateway.as_ref().expect("gateway").id();
        let pid = rustix::process::Pid::from_raw(i32::try_from(id).expect("pid")).expect("pid");
        rustix::process::kill_process(pid, signal).expect("signal");
    }

    /// Process id of the frontend's BIRD.
    pub(crate) fn bird_pid(&self) -> Option<rustix::process::Pid> {
        let stream = UnixStream::connect(self.path("bird.ctl")).ok()?;
        Some(rustix::net::sockopt::socket_peercred(&stream).ok()?.pid)
    }

    /// Whether the frontend's BIRD has VIPs to announce, by its own word.
    pub(crate) fn bird_announces(&self) -> bool {
        let output = Command::new("birdc").arg("-s").arg(self.path("bird.ctl")).args(["show", "protocols"]).output();
        let text = String::from_utf8_lossy(&output.expect("birdc").stdout).into_owned();
        assert!(text.contains("KERNEL4"), "no answer of BIRD: {text}");
        text.contains("VIP")
    }

    pub(crate) fn kill_bird(&self) {
        rustix::process::kill_process(self.bird_pid().expect("BIRD"), rustix::process::Signal::KILL).expect("kill");
    }

    /// Whether the gateway has learnt a VIP by BGP.
    pub(crate) fn learnt(&self, vip: &str) -> bool {
        let family = if vip.contains(':') { "-6" } else { "-4" };
        ip(&format!("-n {} {family} route show {vip} proto bird", self.gw)).contains("via")
    }

    /// Default routes of the frontend's table 4096.
    pub(crate) fn routes(&self, family: &str) -> String {
        // A table that has never had a route is an error to `ip`.
        let output =
            Command::new("ip").args(["-n", &self.fe, family, "route", "show", "table", "4096"]).output().expect("ip");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if let Some(pid) = self.bird_pid() {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        if let Some(mut gateway) = self.gateway.take() {
            let _ = gateway.kill();
            let _ = gateway.wait();
        }
        for name in [&self.fe, &self.gw] {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    settings: Settings,
}

/// A frontend in its namespace, without NSP and load balancer: both are the test.
pub(crate) struct Frontend {
    pub(crate) attractor: watch::Sender<Option<nsp::Attractor>>,
    pub(crate) forwarding: watch::Sender<Option<bool>>,
    pub(crate) report: watch::Receiver<Report>,
    stop: CancellationToken,
    crash: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Frontend {
    pub(crate) fn start(net: &Net, more: &[&str]) -> Self {
        let dir = net.dir.path();
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        let mut args = vec![
            "frontend".to_owned(),
            "--external-interface=ext-vlan0".to_owned(),
            "--bird-log-file-size=0".to_owned(),
            flag("bird-config-path", dir),
            flag("bird-communication-sock", &dir.join("bird.ctl")),
            flag("secrets-dir", &dir.join("secrets")),
        ];
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        let settings = Cli::try_parse_from(args).expect("arguments").settings;
        assert_eq!(settings.validate(), Vec::<String>::new());
        let (attractor, forwarding) = (watch::Sender::new(None), watch::Sender::new(None));
        let (report_to, report) = watch::channel(Report::default());
        let (stop, (crash, crashed)) = (CancellationToken::new(), oneshot::channel());
        let channels =
            Channels { attractor: attractor.subscribe(), forwarding: forwarding.subscribe(), report: report_to };
        let token = stop.clone();
        // FRONTEND_LOG=1 shows what the frontend logs.
        if std::env::var_os("FRONTEND_LOG").is_some() {
            let _ = tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).try_init();
        }
        let thread = in_ns(&net.fe, move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            runtime.block_on(async {
                tokio::select! {
                    done = drive(&settings, channels, token) => done.expect("drive"),
                    _ = crashed => {}
                }
            });
        });
        Self { attractor, forwarding, report, stop, crash: Some(crash), thread: Some(thread) }
    }

    /// Ends at once, as by SIGKILL: nothing is tidied up.
    pub(crate) fn crash(mut self) {
        drop(self.crash.take());
        self.join();
    }

    /// Ends in order.
    pub(crate) fn stop(mut self) {
        self.stop.cancel();
        self.join();
    }

    fn join(&mut self) {
        self.thread.take().expect("thread").join().expect("frontend");
    }

    pub(crate) fn connected(&self) -> Option<bool> {
        self.report.borrow().connected
    }

    pub(crate) fn advertised(&self) -> bool {
        !self.report.borrow().advertised.is_empty()
    }
}

/// UDP echo through the way out of VIPs, one packet each millisecond.
pub(crate) struct Echo {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<(u32, u32)>>,
}

impl Echo {
    /// From `vip` in the pod to `to` at the gateway.
    pub(crate) fn start(net: &Net, vip: &str, to: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let vip: IpAddr = vip.parse().expect("vip");
        let to = SocketAddr::new(to.parse().expect("address"), 7777);
        let server = in_ns(&net.gw, {
            let stop = stop.clone();
            let socket = move || UdpSocket::bind(to).expect("bind");
            move || {
                let socket = socket();
                socket.set_read_timeout(Some(Duration::from_millis(50))).expect("timeout");
                let mut buffer = [0; 64];
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                        let _ = socket.send_to(&buffer[..length], from);
                    }
                }
                (0, 0)
            }
        });
        std::thread::sleep(Duration::from_millis(20));
        let client = in_ns(&net.fe, {
            let stop = stop.clone();
            move || {
                let socket = UdpSocket::bind(SocketAddr::new(vip, 0)).expect("bind");
                socket.connect(to).expect("connect");
                socket.set_nonblocking(true).expect("non-blocking");
                let (mut sent, mut received, mut buffer) = (0_u32, 0, [0; 64]);
                let mut drain = || {
                    while socket.recv(&mut buffer).is_ok() {
                        received += 1;
                    }
                };
                while !stop.load(Ordering::Relaxed) {
                    // A packet that finds no route counts as sent, and lost.
                    let _ = socket.send(&sent.to_be_bytes());
                    sent += 1;
                    std::thread::sleep(Duration::from_millis(1));
                    drain();
                }
                std::thread::sleep(Duration::from_millis(30));
                drain();
                (sent, received)
            }
        });
        Self { stop, threads: vec![server, client] }
    }

    /// Packets sent and packets that did not come back.
    pub(crate) fn finish(self) -> (u32, u32) {
        // The server has to outlive the last packet.
        std::thread::sleep(Duration::from_millis(20));
        self.stop.store(true, Ordering::Relaxed);
        let results: Vec<_> = self.threads.into_iter().map(|thread| thread.join().expect("echo")).collect();
        let (sent, received) = results[1];
        (sent, sent - received)
    }
}

/// An attractor with both VIPs and the given gateways.
pub(crate) fn attractor(gateways: Vec<nsp::Gateway>) -> nsp::Attractor {
    let vip = |name: &str, address: &str| nsp::Vip { name: name.into(), address: address.into(), trench: None };
    let vips = vec![vip("vip-a", "20.0.0.1/32"), vip("vip-b", "2000::1/128")];
    nsp::Attractor { name: "attractor".into(), trench: None, vips, gateways }
}

/// A gateway with BFD 50 ms x 3.
pub(crate) fn gateway(name: &str, address: &str, protocol: &str) -> nsp::Gateway {
    nsp::Gateway {
        name: name.into(),
        address: address.into(),
        protocol: protocol.into(),
        bfd: true,
        bfd_spec: Some(nsp::gateway::BfdSpec { min_tx: 50, min_rx: 50, multiplier: 3 }),
        ..Default::default()
    }
}
