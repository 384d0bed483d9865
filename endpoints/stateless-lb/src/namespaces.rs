//! Tests with real packets: a client, the load balancer's loops, and two targets, in namespaces. Interfaces and neighbours of the
//! load balancer are the kernel's; the NSP is played by the test.

pub(crate) mod nat;
mod slow;
mod wire;

use std::collections::BTreeSet;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use meridio_common::Health;
use meridio_maglev::{Counters, Live};
use meridio_proto::nsp::v1 as nsp;
use nsm_kernel::Netns;
use tokio_util::sync::CancellationToken;

use crate::availability::Availability;
use crate::dataplane::Dataplane;
use crate::inputs::{Inputs, Shared};
use crate::{cli, links, prepare};

const VIPS: [&str; 2] = ["20.0.0.1", "2000::1"];
const PORT: u16 = 4000;
/// Longer than anything takes here.
const SOON: Duration = Duration::from_secs(30);
/// A packet without an answer by now is lost.
const LOST: Duration = Duration::from_secs(3);

/// Output of a command, which has to succeed.
pub(crate) fn run(command: &str) -> String {
    let (program, args) = command.split_once(' ').unwrap();
    let out = Command::new(program).args(args.split(' ')).output().unwrap();
    assert!(out.status.success(), "{command}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Namespaces of a test. `p` is what the load balancer's default route leads to, where no packet of a VIP has any business.
const PODS: [&str; 5] = ["c", "l", "p", "t1", "t2"];

/// Everything of one test; gone with it.
struct Scene {
    id: String,
    bpf: tempfile::TempDir,
    shared: Shared,
    health: Health,
    process: Option<Process>,
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// The loops of a load balancer, which end and begin as its process does.
struct Process {
    stop: CancellationToken,
    loops: JoinHandle<()>,
}

impl Scene {
    fn new(name: &str) -> Self {
        Self::with(name, configuration(), |_| {})
    }

    /// `prepare` is called before there is a load balancer.
    fn with(name: &str, inputs: Inputs, prepare: impl FnOnce(&Self)) -> Self {
        let bpf = tempfile::Builder::new().prefix("mdt-scene-").tempdir().unwrap();
        let mut scene = Scene {
            id: format!("mds-{:x}-{name}", std::process::id()),
            bpf,
            shared: Shared::new(),
            health: Health::detached("test"),
            process: None,
            ended: Arc::default(),
            threads: Vec::new(),
        };
        run(&format!("mount -t bpf bpf {}", scene.bpf.path().display()));
        for pod in PODS {
            scene.pod(pod);
        }
        scene.cable("c", "ext-vlan0", "10.0.0", "fd0a:");
        scene.cable("p", "primary", "192.168.0", "fd0b:");
        run(&format!("ip -n {} route add {}/32 via 10.0.0.1", scene.name("c"), VIPS[0]));
        run(&format!("ip -n {} route add {}/128 via fd0a::1", scene.name("c"), VIPS[1]));
        run(&format!("ip -n {} route add default via 192.168.0.2", scene.name("l")));
        run(&format!("ip -n {} -6 route add default via fd0b::2", scene.name("l")));
        for n in 1..=2 {
            scene.cable(&format!("t{n}"), &format!("nsm-{n}"), &format!("172.31.{n}"), &format!("fd00:{n}:"));
            let t = scene.name(&format!("t{n}"));
            run(&format!("ip -n {t} addr add {}/32 dev lo", VIPS[0]));
            run(&format!("ip -n {t} addr add {}/128 dev lo nodad", VIPS[1]));
            scene.replies_leave(n);
            run(&format!("ip -n {t} -6 route add default via fd00:{n}::1"));
            let echoes = VIPS.map(|vip| scene.echo(n, vip));
            scene.threads.extend(echoes);
        }
        scene.impatient();
        prepare(&scene);
        scene.begin(inputs);
        scene.until([1, 2]);
        scene
    }

    /// A process begins, and is told everything; returns when it has done all that it does.
    fn begin(&mut self, inputs: Inputs) {
        (self.shared, self.health) = (Shared::new(), Health::detached("test"));
        self.shared.change(|known| *known = inputs);
        let stop = CancellationToken::new();
        self.process = Some(Process { loops: self.load_balancer(stop.clone()), stop });
        // The flows are reported at the end of a round.
        let serves = |name| self.health.report().subservices.get(name).is_some_and(|s| s.serving);
        let serving = || serves("DataPlane") && serves("Flow");
        eventually(serving, || format!("not attached: {:?}", self.health.report()));
    }

    /// The process ends; what it has set up in the kernel stays.
    fn end(&mut self) {
        if let Some(process) = self.process.take() {
            process.stop.cancel();
            let _ = process.loops.join();
        }
    }

    fn name(&self, pod: &str) -> String {
        format!("{}-{pod}", self.id)
    }

    fn netns(&self, pod: &str) -> Netns {
        Netns::named(&self.name(pod)).unwrap()
    }

    fn pod(&self, pod: &str) {
        let name = self.name(pod);
        run(&format!("ip netns add {name}"));
        run(&format!("ip -n {name} link set lo up"));
        let settings = || {
            for (key, value) in [
                ("ipv6/conf/default/accept_dad", "0"),
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
            ] {
                std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
            }
        };
        self.netns(pod).run_blocking(settings).unwrap();
    }

    /// The load balancer has host part 1, the pod 2.
    fn cable(&self, pod: &str, device: &str, v4: &str, v6: &str) {
        let (l, p) = (self.name("l"), self.name(pod));
        run(&format!("ip link add {device} netns {l} type veth peer name eth0 netns {p}"));
        for (ns, device, host) in [(&l, device, 1), (&p, "eth0", 2)] {
            run(&format!("ip -n {ns} addr add {v4}.{host}/24 dev {device}"));
            run(&format!("ip -n {ns} addr add {v6}:{host}/64 dev {device} nodad"));
            run(&format!("ip -n {ns} link set {device} up"));
        }
    }

    fn replies_leave(&self, n: u8) {
        run(&format!("ip -n {} route replace default via 172.31.{n}.1", self.name(&format!("t{n}"))));
    }

    /// Neighbours are asked again after a second or two, not after a minute.
    fn impatient(&self) {
        let settings = || {
            for (key, value) in
                [("base_reachable_time_ms", "500"), ("delay_first_probe_time", "1"), ("retrans_time_ms", "100")]
            {
                std::fs::write(format!("/proc/sys/net/ipv4/neigh/nsm-1/{key}"), value).unwrap();
            }
        };
        self.netns("l").run_blocking(settings).unwrap();
    }

    /// The number of the target, in answer to everything.
    fn echo(&self, n: u8, vip: &'static str) -> JoinHandle<()> {
        let bind = || UdpSocket::bind((vip, PORT)).unwrap();
        let socket = self.netns(&format!("t{n}")).run_blocking(bind).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let ended = self.ended.clone();
        std::thread::spawn(move || {
            let mut bytes = [0; 64];
            while !ended.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut bytes[1..]) {
                    bytes[0] = n;
                    // Nowhere to send it for as long as the test has taken the route away.
                    let _ = socket.send_to(&bytes[..=length], from);
                }
            }
        })
    }

    /// The loops that a load balancer runs, but for those that talk to the NSP.
    fn load_balancer(&self, stop: CancellationToken) -> JoinHandle<()> {
        let base = self.bpf.path().join("lb").to_str().unwrap().to_owned();
        let settings = cli::settings(&["--bpf-dir", &base, "--service-name", "nsm-"]);
        let (netns, shared, health) = (self.netns("l"), self.shared.clone(), self.health.clone());
        let loops = async move {
            let netns = Netns::current().unwrap();
            assert_eq!(prepare::prepare(&settings, &netns).await, [""; 0]);
            let dataplane = Dataplane::new(&settings, netns.clone(), health, Availability::new("test"));
            let (prefix, external) = (settings.interface_prefix(), settings.external_interface.clone());
            let links = links::run(netns, prefix, external, shared.clone(), stop.clone());
            tokio::join!(dataplane.run(shared, stop), links);
        };
        std::thread::spawn(move || {
            // The threads of the runtime inherit the namespace.
            let body = || {
                let runtime =
                    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
                runtime.block_on(loops);
            };
            netns.run_blocking(body).unwrap();
        })
    }

    /// What is counted in the tables that packets go by, once there are some.
    fn counters(&self) -> Option<Counters> {
        let base: PathBuf = self.bpf.path().join("lb");
        let own = self.netns("l").run_blocking(|| meridio_maglev::own_directory(&base).unwrap()).unwrap();
        Live::open(&own).and_then(|live| live.counters()).ok()
    }

    /// Identifiers in the table that packets go by.
    fn ready(&self) -> BTreeSet<u32> {
        let targets = |c: Counters| c.targets.iter().map(|t| t.name.parse().unwrap()).collect();
        self.counters().map(targets).unwrap_or_default()
    }

    fn until<const N: usize>(&self, ready: [u32; N]) {
        let wanted = BTreeSet::from(ready);
        let what = || format!("{:?}, not {wanted:?}: {:?}", self.ready(), self.health.report());
        eventually(|| self.ready() == wanted, what);
    }

    /// A client whose port decides about the target.
    fn flow(&self) -> Flow {
        let open = || UdpSocket::bind("10.0.0.2:0").unwrap();
        let socket = self.netns("c").run_blocking(open).unwrap();
        socket.set_read_timeout(Some(LOST)).unwrap();
        socket.connect((VIPS[0], PORT)).unwrap();
        Flow { socket, sent: 0 }
    }

    /// Flows of each target.
    fn flows(&self) -> [Vec<Flow>; 2] {
        let mut flows = [Vec::new(), Vec::new()];
        while flows.iter().any(|flows| flows.len() < 4) {
            let mut flow = self.flow();
            let target = flow.ask().unwrap();
            flows[target as usize - 1].push(flow);
        }
        flows
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        self.end();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        for pod in PODS {
            let _ = Command::new("ip").args(["netns", "del", &self.name(pod)]).status();
        }
        let _ = Command::new("umount").arg(self.bpf.path()).status();
    }
}

fn eventually(condition: impl Fn() -> bool, what: impl Fn() -> String) {
    let end = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < end, "{}", what());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Both targets, of this stream.
fn targets(stream: &nsp::Stream) -> Vec<nsp::Target> {
    let target = |n: u32| nsp::Target {
        ips: vec![format!("172.31.{n}.2/24"), format!("fd00:{n}::2/64")],
        context: [("identifier".to_owned(), n.to_string())].into(),
        status: nsp::target::Status::Enabled as i32,
        stream: Some(stream.clone()),
        ..Default::default()
    };
    vec![target(1), target(2)]
}

/// What the NSP tells: two targets of one stream.
fn configuration() -> Inputs {
    let vip = |address: &str| {
        let length = if address.contains(':') { 128 } else { 32 };
        nsp::Vip { name: address.into(), address: format!("{address}/{length}"), ..Default::default() }
    };
    let vips = VIPS.map(vip).to_vec();
    let stream = nsp::Stream { name: "s".into(), max_targets: 10, ..Default::default() };
    let flow = nsp::Flow {
        name: "f".into(),
        stream: Some(stream.clone()),
        vips: vips.clone(),
        source_subnets: vec!["0.0.0.0/0".into(), "::/0".into()],
        destination_port_ranges: vec![PORT.to_string()],
        source_port_ranges: vec!["any".into()],
        protocols: vec!["udp".into()],
        ..Default::default()
    };
    Inputs {
        vips: Some(vips),
        conduits: Some(vec![]),
        targets: Some(targets(&stream)),
        streams: Some(vec![stream]),
        flows: Some(vec![flow]),
        ..Inputs::default()
    }
}

struct Flow {
    socket: UdpSocket,
    sent: u32,
}

impl Flow {
    /// Sends a packet; the number of the target that answers it, if one does.
    fn ask(&mut self) -> Option<u8> {
        self.sent += 1;
        let question = self.sent.to_be_bytes();
        // What the kernel remembers of an ICMP error is told by the next call.
        let _ = self.socket.send(&question);
        let end = Instant::now() + LOST;
        let mut answer = [0; 64];
        while Instant::now() < end {
            // Answers to earlier questions may be late.
            match self.socket.recv(&mut answer) {
                Ok(5) if answer[1..5] == question => return Some(answer[0]),
                _ => {}
            }
        }
        None
    }
}

/// Asks without pause until told to stop, and however slow the machine is, often enough to mean something; asked and lost.
fn ask_on(mut flows: Vec<Flow>, target: u8) -> (Arc<AtomicBool>, JoinHandle<(u32, u32)>) {
    let stop = Arc::new(AtomicBool::new(false));
    let told = stop.clone();
    let asking = std::thread::spawn(move || {
        let (mut asked, mut lost) = (0, 0);
        while !told.load(Ordering::Relaxed) || asked <= 100 {
            for flow in &mut flows {
                asked += 1;
                lost += u32::from(flow.ask() != Some(target));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        (asked, lost)
    });
    (stop, asking)
}

/// Target 1 leaves and comes back while the flows of target 2 lose nothing.
fn leaves_and_returns(name: &str, leave: impl Fn(&Scene), come_back: impl Fn(&Scene)) {
    let scene = Scene::new(name);
    let [mut first, second] = scene.flows();
    let (stop, others) = ask_on(second, 2);
    leave(&scene);
    // Packets are what makes the kernel find out.
    let end = Instant::now() + SOON;
    while scene.ready() != BTreeSet::from([2]) {
        assert!(Instant::now() < end, "still in the table: {:?}", scene.health.report());
        first.iter_mut().for_each(|flow| _ = flow.socket.send(b"anybody there?"));
        std::thread::sleep(Duration::from_millis(10));
    }
    let taken_over: Vec<Option<u8>> = first.iter_mut().map(Flow::ask).collect();
    assert!(taken_over.iter().all(|target| *target == Some(2)), "{taken_over:?}");
    come_back(&scene);
    scene.until([1, 2]);
    let back: Vec<Option<u8>> = first.iter_mut().map(Flow::ask).collect();
    assert!(back.iter().all(|target| *target == Some(1)), "{back:?}");
    stop.store(true, Ordering::Relaxed);
    let (asked, lost) = others.join().unwrap();
    println!("{name}: {lost} of {asked} packets of the other target lost");
    assert!(lost == 0, "{lost} of {asked}");
}

#[test]
fn a_target_that_loses_its_address_leaves_and_comes_back_with_it() {
    let t1 = |scene: &Scene, what: &str| run(&format!("ip -n {} addr {what} 172.31.1.2/24 dev eth0", scene.name("t1")));
    leaves_and_returns(
        "addr",
        |scene| _ = t1(scene, "del"),
        |scene| {
            t1(scene, "add");
            scene.replies_leave(1);
        },
    );
}

#[test]
fn a_target_whose_link_goes_down_leaves_and_comes_back_with_it() {
    let t1 = |scene: &Scene, what: &str| run(&format!("ip -n {} link set eth0 {what}", scene.name("t1")));
    leaves_and_returns(
        "down",
        |scene| _ = t1(scene, "down"),
        |scene| {
            t1(scene, "up");
            scene.replies_leave(1);
        },
    );
}

#[test]
fn an_interface_of_the_load_balancer_that_flaps_costs_the_other_target_nothing() {
    let link = |scene: &Scene, what: &str| run(&format!("ip -n {} link set nsm-1 {what}", scene.name("l")));
    leaves_and_returns("flap", |scene| _ = link(scene, "down"), |scene| _ = link(scene, "up"));
}

#[test]
fn programs_that_somebody_takes_away_are_attached_again() {
    let scene = Scene::new("taken");
    let l = scene.name("l");
    let attached = || {
        let filters = ["ingress", "egress"].map(|way| run(&format!("tc -n {l} filter show dev ext-vlan0 {way}")));
        filters.iter().all(|filters| filters.contains("meridio_"))
    };
    for times in 1..=2 {
        assert!(attached());
        run(&format!("tc -n {l} qdisc del dev ext-vlan0 clsact"));
        eventually(attached, || format!("not attached again: {:?}", scene.health.report()));
        let notes = scene.health.report().notes;
        assert!(notes["Attachment"][0].contains(&format!("{times} times")), "{notes:?}");
        assert!(scene.flow().ask().is_some());
    }
}
