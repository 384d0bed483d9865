//! What a proxy that is killed and comes back does to the data path: nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::io::{BufRead as _, BufReader};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use meridio_demo::cluster::Pod;
use meridio_demo::stage::Stage;
use meridio_demo::status::Observer;
use meridio_demo::topology::{Kind, Trench};
use meridio_tests::scene::{addresses, check_clean, scene, turn};

const PATIENCE: Duration = Duration::from_secs(30);
/// Something that a watch sees when it has begun to listen.
const CANARY: &str = "127.7.7.7";

/// What the kernel says of links, addresses, routes and rules of a pod, until it is dropped.
struct Watch {
    pod: String,
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Watch {
    fn start(pod: &Pod) -> Self {
        let listen = || {
            let mut command = Command::new("ip");
            command.args(["-o", "monitor", "link", "address", "route", "rule"]);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()
        };
        let mut child = pod.namespace.run(listen).unwrap().unwrap();
        let lines = Arc::<Mutex<Vec<String>>>::default();
        let (output, kept) = (BufReader::new(child.stdout.take().unwrap()), lines.clone());
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).for_each(|line| kept.lock().unwrap().push(line))
        });
        let watch = Watch { pod: pod.plan.name.clone(), child, lines };
        let deadline = Instant::now() + PATIENCE;
        while !watch.lines.lock().unwrap().iter().any(|line| line.contains(CANARY) && line.starts_with("Deleted")) {
            assert!(Instant::now() < deadline, "{}: the watch sees nothing", watch.pod);
            let _ = pod.namespace.ip(&format!("address add {CANARY}/32 dev lo\naddress delete {CANARY}/32 dev lo\n"));
            std::thread::sleep(Duration::from_millis(20));
        }
        watch
    }

    /// What has changed, apart from the canary.
    fn changes(&self) -> Vec<String> {
        let lines = self.lines.lock().unwrap();
        lines.iter().filter(|line| !line.contains(CANARY)).map(|line| format!("{}: {line}", self.pod)).collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether a change takes something away, be it for an instant. A link that is only set up again was down.
fn takes_away(change: &str) -> bool {
    let link = change.contains(" mtu ") && change.contains('<');
    change.contains(": Deleted") || link && !change.contains("LOWER_UP")
}

fn whole(observer: &Observer) {
    observer.wait_whole(&observer.targets_of_trench(), PATIENCE, &mut |line| println!("{line}")).unwrap();
}

#[test]
fn a_proxy_that_is_killed_and_comes_back_takes_nothing_away() {
    let _turn = turn();
    let stage = scene("pxkill", vec![Trench::fixture('a', 0)]).unwrap();
    let observer = &stage.observers[0];
    let traffic = observer.traffic().unwrap();
    let pods = [Kind::Proxy, Kind::LoadBalancer, Kind::Target].map(|kind| stage.cluster.pods(kind)).concat();
    let watches: Vec<Watch> = pods.iter().map(|pod| Watch::start(pod)).collect();
    for proxy in stage.cluster.pods(Kind::Proxy) {
        for _ in 0..2 {
            let mark = traffic.mark();
            proxy.process("proxy").unwrap().restart(&proxy.namespace).unwrap();
            std::thread::sleep(Duration::from_secs(1));
            whole(observer);
            let window = traffic.since(mark);
            println!("{}: {} packets sent, {} lost", proxy.plan.name, window.sent, window.losses.len());
            assert!(window.losses.is_empty() && window.breaks.is_empty(), "{:?}", window.losses.first());
        }
    }
    let changes: Vec<String> = watches.iter().flat_map(Watch::changes).collect();
    changes.iter().for_each(|change| println!("{change}"));
    let lost: Vec<&String> = changes.iter().filter(|change| takes_away(change)).collect();
    assert!(lost.is_empty(), "{lost:#?}");
    check_clean(&stage).unwrap();
}

/// Load balancers of the stage forget, or know again, how to answer this proxy itself; what it forwards is not concerned.
fn deaf(stage: &Stage, addresses: &[(IpAddr, u8)], deaf: bool) {
    let change = if deaf { "add" } else { "delete" };
    let route = |(address, _): &(IpAddr, u8)| format!("route {change} blackhole {address}\n");
    let lines: String = addresses.iter().map(route).collect();
    for lb in stage.cluster.pods(Kind::LoadBalancer) {
        lb.namespace.ip(&lines).unwrap();
    }
}

#[test]
fn a_proxy_that_comes_back_without_nsm_and_hears_nobody_leaves_replies_their_way() {
    let _turn = turn();
    let stage = scene("pxdeaf", vec![Trench::fixture('a', 0)]).unwrap();
    let observer = &stage.observers[0];
    let traffic = observer.traffic().unwrap();
    let proxy = stage.cluster.pods(Kind::Proxy).remove(0);
    let node = stage.cluster.pods(Kind::Node).into_iter().find(|node| node.plan.node == proxy.plan.node).unwrap();
    let nsm = node.process("nsm").unwrap();
    let addresses = addresses(&proxy, "bridge0").unwrap();
    assert_eq!(addresses.len(), 2, "{addresses:?}");

    let mark = traffic.mark();
    nsm.kill();
    deaf(&stage, &addresses, true);
    proxy.process("proxy").unwrap().restart(&proxy.namespace).unwrap();
    // Probes are judged after 300 ms.
    std::thread::sleep(Duration::from_secs(3));
    for family in ["-4", "-6"] {
        let routes = proxy.namespace.output("ip", &[family, "route", "show", "table", "1"]).unwrap();
        println!("{routes}");
        assert_eq!(routes.matches("nexthop").count(), 2, "{routes}");
    }
    deaf(&stage, &addresses, false);
    nsm.start(&node.namespace).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    whole(observer);
    let window = traffic.since(mark);
    println!("{} packets sent, {} lost", window.sent, window.losses.len());
    assert!(window.losses.is_empty() && window.breaks.is_empty(), "{:?}", window.losses.first());
    check_clean(&stage).unwrap();
}

/// Nobody on the node knows the connections any more: others are made beside them, and what the load balancer on the other node has of the old
/// one is in the way there.
#[test]
fn a_proxy_that_has_forgotten_everything_with_its_node_is_served_again() {
    let _turn = turn();
    let stage = scene("pxnew", vec![Trench::fixture('a', 0)]).unwrap();
    let observer = &stage.observers[0];
    let traffic = observer.traffic().unwrap();
    for pod in stage.cluster.pods(Kind::Proxy) {
        let node = stage.cluster.pods(Kind::Node).into_iter().find(|node| node.plan.node == pod.plan.node).unwrap();
        let (nsm, proxy) = (node.process("nsm").unwrap(), pod.process("proxy").unwrap());
        nsm.kill();
        proxy.kill();
        pod.namespace
            .run(|| std::fs::remove_dir_all("/run/meridio"))
            .unwrap()
            .expect("the proxy has noted its connections");
        nsm.start(&node.namespace).unwrap();
        proxy.start(&pod.namespace).unwrap();
        std::thread::sleep(Duration::from_secs(1));
        whole(observer);
    }
    // Wires were made anew, which may cost something; what stands now has to work.
    let mark = traffic.mark();
    std::thread::sleep(Duration::from_secs(5));
    let window = traffic.since(mark);
    println!("{} packets sent, {} lost", window.sent, window.losses.len());
    assert!(window.losses.is_empty(), "{:?}", window.losses.first());
    check_clean(&stage).unwrap();
}
