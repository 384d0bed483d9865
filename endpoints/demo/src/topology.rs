//! Which pods there are, where they are plugged in, and what runs in them. Pure: nothing here touches the system.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use crate::process::ProcessPlan;

/// The two nodes.
pub const NODES: [&str; 2] = ["node-a", "node-b"];

/// Bridge of the primary network.
pub const PRIMARY: &str = "primary";

/// Interface of a load balancer on the external network.
pub const EXTERNAL_INTERFACE: &str = "ext-vlan0";

/// Interface of the gateway on the external network.
pub const GATEWAY_INTERFACE: &str = "ext0";

/// MTU of everything on the conduit: that of the primary network less the VXLAN header.
pub const CONDUIT_MTU: u16 = 1450;

/// Priority of components.
const NICE: i32 = -5;

/// Priority of what speaks BFD.
const NICE_BFD: i32 = -15;

/// One trench of the demo; all its names follow from its letter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trench {
    /// `a` gives `trench-a`, `conduit-a-1`, `stream-a-i` ...
    pub letter: char,
    /// 0 for the first trench; moves addresses and prefixes pod names for the others.
    pub index: u8,
    /// IPv4 address of the VIP.
    pub vip4: Ipv4Addr,
    /// IPv6 address of the VIP.
    pub vip6: Ipv6Addr,
    /// Number of targets; the first half on node-a.
    pub targets: u8,
}

impl Trench {
    /// The trench of the original's end-to-end fixture: 20.0.0.1, 2000::1, four targets.
    pub fn fixture(letter: char, index: u8) -> Self {
        Trench {
            letter,
            index,
            vip4: Ipv4Addr::new(20, 0, 0, 1),
            vip6: Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1),
            targets: 4,
        }
    }

    /// `trench-a`.
    pub fn name(&self) -> String {
        format!("trench-{}", self.letter)
    }

    /// `conduit-a-1`.
    pub fn conduit(&self) -> String {
        format!("conduit-{}-1", self.letter)
    }

    /// `stream-a-i`.
    pub fn stream(&self) -> String {
        format!("stream-{}-i", self.letter)
    }

    /// `attractor-a-1`.
    pub fn attractor(&self) -> String {
        format!("attractor-{}-1", self.letter)
    }

    /// Network service of the load balancers.
    pub fn service(&self) -> String {
        format!("{}.{}.default", self.conduit(), self.name())
    }

    /// Name of a pod of this trench: `lb-1`, or `b-lb-1` in a second trench.
    pub fn pod(&self, name: &str) -> String {
        if self.index == 0 { name.to_owned() } else { format!("{}-{name}", self.letter) }
    }

    /// Names of the load balancer pods.
    pub fn lbs(&self) -> [String; 2] {
        [self.pod("lb-1"), self.pod("lb-2")]
    }

    /// Names of the target pods.
    pub fn target_pods(&self) -> Vec<String> {
        (1..=self.targets).map(|n| self.pod(&format!("target-{n}"))).collect()
    }

    /// Bridge of the external network.
    pub fn external_bridge(&self) -> String {
        format!("external-{}", self.letter)
    }

    fn primary(&self, last: u8) -> (Ipv4Addr, Ipv6Addr) {
        primary_address(last.saturating_add(self.index.saturating_mul(100)))
    }
}

/// Address of the gateway on the external network.
pub fn gateway_address() -> (Ipv4Addr, Ipv6Addr) {
    (Ipv4Addr::new(169, 254, 100, 150), Ipv6Addr::new(0x100, 0x100, 0, 0, 0, 0, 0, 0x150))
}

/// Address of load balancer `number` (1 or 2) on the external network.
pub fn lb_address(number: u8) -> (Ipv4Addr, Ipv6Addr) {
    let last = number.saturating_add(1);
    (Ipv4Addr::new(169, 254, 100, last), Ipv6Addr::new(0x100, 0x100, 0, 0, 0, 0, 0, u16::from(last)))
}

/// Address on the primary network; the IPv6 one ends in the same decimal digits.
pub fn primary_address(last: u8) -> (Ipv4Addr, Ipv6Addr) {
    let digits = u16::from_str_radix(&last.to_string(), 16).unwrap_or(0);
    (Ipv4Addr::new(10, 244, 0, last), Ipv6Addr::new(0xfd10, 0x244, 0, 0, 0, 0, 0, digits))
}

/// What a pod is, where that matters for its sysctls and its file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A node: manager, forwarder and identity issuer.
    Node,
    /// Load balancer and frontend.
    LoadBalancer,
    /// The bridge of a conduit on one node.
    Proxy,
    /// An application with its TAPA.
    Target,
    /// NSP or IPAM.
    Service,
    /// The router outside.
    Gateway,
}

/// One end of a cable into a bridge of the fabric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Bridge it is plugged into.
    pub bridge: String,
    /// Interface name in the pod.
    pub interface: String,
    /// IPv4 address, /24.
    pub v4: Ipv4Addr,
    /// IPv6 address, /64.
    pub v6: Ipv6Addr,
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlan {
    /// Its name, also its host name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Node whose NSM socket it sees.
    pub node: &'static str,
    /// Letter of its trench; nodes have none.
    pub trench: Option<char>,
    /// Cables, the primary network's first.
    pub ports: Vec<Port>,
    /// (directory below the demo's, place in the pod).
    pub binds: Vec<(PathBuf, PathBuf)>,
    /// Containers.
    pub processes: Vec<ProcessPlan>,
}

/// Values that the environments of processes need.
#[derive(Clone, Debug)]
pub struct Options {
    /// Log level of every component.
    pub log_level: String,
    /// The BIRD of gateways.
    pub bird: PathBuf,
    /// More settings of every load balancer, by environment variable.
    pub load_balancers: Vec<(String, String)>,
}

/// All pods of a demo with these trenches, nodes first.
pub fn pods(trenches: &[Trench], options: &Options) -> Vec<PodPlan> {
    let mut pods: Vec<PodPlan> = NODES.iter().enumerate().map(|(index, node)| node_pod(node, index, options)).collect();
    for trench in trenches {
        pods.push(gateway_pod(trench, options));
        pods.push(nsp_pod(trench, options));
        pods.push(ipam_pod(trench, options));
        pods.extend([1, 2].map(|number| lb_pod(trench, number, options)));
        pods.extend([1, 2].map(|number| proxy_pod(trench, number, options)));
        pods.extend((1..=trench.targets).map(|number| target_pod(trench, number, options)));
    }
    pods
}

/// Lines of `/etc/hosts` that every pod sees: services by their cluster names, pods by theirs.
pub fn hosts(pods: &[PodPlan], trenches: &[Trench]) -> String {
    let mut lines = String::from("127.0.0.1 localhost\n::1 localhost\n");
    for pod in pods {
        if let Some(port) = pod.ports.iter().find(|port| port.bridge == PRIMARY) {
            lines.push_str(&format!("{} {}\n", port.v4, pod.name));
        }
    }
    for trench in trenches {
        let name = trench.name();
        lines.push_str(&format!("{} nsp-service-{name}.default\n", trench.primary(10).0));
        lines.push_str(&format!("{} ipam-service-{name}.default\n", trench.primary(11).0));
    }
    lines
}

fn primary_port((v4, v6): (Ipv4Addr, Ipv6Addr)) -> Port {
    Port { bridge: PRIMARY.to_owned(), interface: "eth0".to_owned(), v4, v6 }
}

/// A pod of kind `kind` on `node` with the bind mounts that every pod has.
fn pod(name: String, kind: Kind, node: &'static str, trench: Option<char>, ports: Vec<Port>) -> PodPlan {
    let binds = vec![
        (Path::new("nodes").join(node).join("nsm"), PathBuf::from("/var/lib/networkservicemesh")),
        (Path::new("nodes").join(node).join("workloads").join(&name), PathBuf::from("/run/spire/sockets")),
    ];
    PodPlan { name, kind, node, trench, ports, binds, processes: Vec::new() }
}

/// A component: `meridio <name>` with its settings in the environment, and what all components have in common.
fn component(name: &str, level: (&str, &Options), env: &[(&str, String)]) -> ProcessPlan {
    let mut all = vec![
        ("SPIFFE_ENDPOINT_SOCKET".to_owned(), "unix:///run/spire/sockets/agent.sock".to_owned()),
        ("HEALTH_SOCKET".to_owned(), format!("unix:///tmp/health-{name}.sock")),
        ("RUST_BACKTRACE".to_owned(), "1".to_owned()),
        (level.0.to_owned(), level.1.log_level.clone()),
    ];
    all.extend(env.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    let program = Path::new(crate::namespace::BINARY_DIR).join("meridio");
    // The frontend's BIRD inherits its priority.
    let nice = if name == "frontend" { NICE_BFD } else { NICE };
    ProcessPlan { name: name.to_owned(), program, args: vec![name.to_owned()], env: all, nice }
}

/// The same with more settings.
fn with(mut process: ProcessPlan, more: &[(String, String)]) -> ProcessPlan {
    process.env.extend_from_slice(more);
    process
}

fn text(value: &str) -> String {
    value.to_owned()
}

fn node_pod(node: &'static str, index: usize, options: &Options) -> PodPlan {
    let number = if index == 0 { 1 } else { 2 };
    let address = primary_address(number);
    let mut pod = pod(text(node), Kind::Node, node, None, vec![primary_port(address)]);
    let registry = format!("tcp://{}:5002", primary_address(1).0);
    pod.binds.push((PathBuf::from("identity"), PathBuf::from("/run/identity")));
    pod.binds.push((Path::new("nodes").join(node).join("workloads"), PathBuf::from("/run/workloads")));
    pod.binds.push((Path::new("nodes").join(node).join("state"), PathBuf::from("/var/lib/nsm")));
    let mut identity = component("identity", ("LOG_LEVEL", options), &[]);
    for arg in ["--state-dir", "/run/identity", "--trust-domain", "example.org", "--workloads", "/run/workloads"] {
        identity.args.push(text(arg));
    }
    let mut env = vec![
        ("NSM_NAME", format!("nsmgr-{node}")),
        ("NODE_NAME", text(node)),
        ("NSM_TUNNEL_IP", address.0.to_string()),
        ("NSM_LISTEN_ON", format!("unix:///var/lib/networkservicemesh/nsm.io.sock,tcp://{}:5001", address.0)),
        ("NSM_STATE_DIR", text("/var/lib/nsm")),
        ("NSM_MAX_TOKEN_LIFETIME", text("10m")),
    ];
    if index == 0 {
        env.extend([("NSM_REGISTRY_URL", String::new()), ("NSM_REGISTRY_LISTEN_ON", registry)]);
    } else {
        env.push(("NSM_REGISTRY_URL", registry));
    }
    pod.processes = vec![identity, component("nsm", ("NSM_LOG_LEVEL", options), &env)];
    pod
}

fn gateway_pod(trench: &Trench, options: &Options) -> PodPlan {
    let (v4, v6) = gateway_address();
    let port = Port { bridge: trench.external_bridge(), interface: text(GATEWAY_INTERFACE), v4, v6 };
    let mut pod = pod(trench.pod("gateway"), Kind::Gateway, NODES[0], Some(trench.letter), vec![port]);
    pod.binds = vec![(PathBuf::from("gateways").join(trench.letter.to_string()), PathBuf::from("/run/gateway"))];
    let args = ["-f", "-c", "/run/gateway/bird.conf", "-s", "/run/gateway/bird.ctl", "-P", "/run/gateway/bird.pid"];
    pod.processes = vec![ProcessPlan {
        name: text("bird"),
        program: options.bird.clone(),
        args: args.iter().map(|&arg| text(arg)).collect(),
        env: Vec::new(),
        nice: NICE_BFD,
    }];
    pod
}

fn nsp_service(trench: &Trench) -> String {
    format!("nsp-service-{}.default:7778", trench.name())
}

fn nsp_pod(trench: &Trench, options: &Options) -> PodPlan {
    let mut pod =
        pod(trench.pod("nsp"), Kind::Service, NODES[0], Some(trench.letter), vec![primary_port(trench.primary(10))]);
    pod.binds.push((Path::new("trenches").join(trench.letter.to_string()).join("nsp"), PathBuf::from("/run/nsp/data")));
    pod.binds
        .push((Path::new("trenches").join(trench.letter.to_string()).join("config"), PathBuf::from("/run/nsp/config")));
    let env = [
        ("NSP_NAMESPACE", text("default")),
        ("NSP_PORT", text("7778")),
        ("NSP_CONFIG_MAP_NAME", format!("meridio-configuration-{}", trench.name())),
        ("NSP_CONFIG_FILE", text("/run/nsp/config/configuration.yaml")),
        ("NSP_DATASOURCE", text("/run/nsp/data/registry.db")),
    ];
    pod.processes = vec![component("nsp", ("NSP_LOG_LEVEL", options), &env)];
    pod
}

fn ipam_pod(trench: &Trench, options: &Options) -> PodPlan {
    let mut pod =
        pod(trench.pod("ipam"), Kind::Service, NODES[0], Some(trench.letter), vec![primary_port(trench.primary(11))]);
    pod.binds
        .push((Path::new("trenches").join(trench.letter.to_string()).join("ipam"), PathBuf::from("/run/ipam/data")));
    let env = [
        ("IPAM_PORT", text("7777")),
        ("IPAM_TRENCH_NAME", trench.name()),
        ("IPAM_NSP_SERVICE", nsp_service(trench)),
        ("IPAM_PREFIX_IPV4", text("172.16.0.0/16")),
        ("IPAM_PREFIX_IPV6", text("fd00::/48")),
        ("IPAM_DATASOURCE", text("/run/ipam/data/registry.db")),
        ("IPAM_IP_FAMILY", text("dualstack")),
    ];
    pod.processes = vec![component("ipam", ("IPAM_LOG_LEVEL", options), &env)];
    pod
}

/// Where the BPF file system of a node is, below the demo's directory: one for the load balancers of all trenches.
pub fn node_bpffs(node: &str) -> PathBuf {
    Path::new("nodes").join(node).join("bpf")
}

fn lb_pod(trench: &Trench, number: u8, options: &Options) -> PodPlan {
    let name = trench.pod(&format!("lb-{number}"));
    let (v4, v6) = lb_address(number);
    let external = Port { bridge: trench.external_bridge(), interface: text(EXTERNAL_INTERFACE), v4, v6 };
    let ports = vec![primary_port(trench.primary(20 + number)), external];
    let node = NODES[usize::from(number != 1)];
    let mut pod = pod(name.clone(), Kind::LoadBalancer, node, Some(trench.letter), ports);
    pod.binds.push((node_bpffs(node), PathBuf::from("/sys/fs/bpf")));
    let lb = [
        ("NSM_NAME", name.clone()),
        ("NSM_SERVICE_NAME", trench.service()),
        ("NSM_CONDUIT_NAME", trench.conduit()),
        ("NSM_TRENCH_NAME", trench.name()),
        ("NSM_NSP_SERVICE", nsp_service(trench)),
        ("NSM_MAX_TOKEN_LIFETIME", text("10m")),
        ("NSM_SOCKET", text("unix:///var/lib/meridio/lb.sock")),
        ("NSM_EXTERNAL_INTERFACE", text(EXTERNAL_INTERFACE)),
        ("NSM_METRICS_ENABLED", text("true")),
    ];
    let frontend = [
        ("NFE_NSP_SERVICE", nsp_service(trench)),
        ("NFE_TRENCH_NAME", trench.name()),
        ("NFE_ATTRACTOR_NAME", trench.attractor()),
        ("NFE_NAMESPACE", text("default")),
        ("NFE_EXTERNAL_INTERFACE", text(EXTERNAL_INTERFACE)),
        ("NFE_ECMP", text("true")),
        ("NFE_LOG_BIRD", text("true")),
        ("NFE_BIRD_CONFIG_PATH", text("/run/bird-config")),
        ("NFE_BIRD_COMMUNICATION_SOCK", text("/run/bird/bird.ctl")),
        ("NFE_LB_SOCKET", text("unix:///var/lib/meridio/lb.sock")),
    ];
    pod.processes = vec![
        with(component("stateless-lb", ("NSM_LOG_LEVEL", options), &lb), &options.load_balancers),
        component("frontend", ("NFE_LOG_LEVEL", options), &frontend),
    ];
    pod
}

fn proxy_pod(trench: &Trench, number: u8, options: &Options) -> PodPlan {
    let node = NODES[usize::from(number != 1)];
    let name = trench.pod(if number == 1 { "proxy-a" } else { "proxy-b" });
    let mut pod =
        pod(name.clone(), Kind::Proxy, node, Some(trench.letter), vec![primary_port(trench.primary(30 + number))]);
    let env = [
        ("NSM_NAME", name),
        ("NSM_SERVICE_NAME", format!("proxy.{}", trench.service())),
        ("NSM_HOST", text(node)),
        ("NSM_NETWORK_SERVICE_NAME", trench.service()),
        ("NSM_IPAM_SERVICE", format!("ipam-service-{}.default:7777", trench.name())),
        ("NSM_NSP_SERVICE_NAME", text("nsp-service")),
        ("NSM_NSP_SERVICE_PORT", text("7778")),
        ("NSM_NAMESPACE", text("default")),
        ("NSM_TRENCH", trench.name()),
        ("NSM_CONDUIT", trench.conduit()),
        ("NSM_IP_FAMILY", text("dualstack")),
        ("NSM_MTU", CONDUIT_MTU.to_string()),
        ("NSM_MAX_TOKEN_LIFETIME", text("10m")),
    ];
    pod.processes = vec![component("proxy", ("NSM_LOG_LEVEL", options), &env)];
    pod
}

fn target_pod(trench: &Trench, number: u8, options: &Options) -> PodPlan {
    let node = NODES[usize::from(number > trench.targets.div_ceil(2))];
    let name = trench.pod(&format!("target-{number}"));
    let mut pod =
        pod(name.clone(), Kind::Target, node, Some(trench.letter), vec![primary_port(trench.primary(40 + number))]);
    pod.binds.push((Path::new("targets").join(&name), PathBuf::from("/run/ambassador")));
    let tapa = [
        ("MERIDIO_NAME", name.clone()),
        ("MERIDIO_NODE", text(node)),
        ("MERIDIO_NAMESPACE", text("default")),
        ("MERIDIO_SOCKET", text("/run/ambassador/ambassador.sock")),
        ("MERIDIO_NSP_SERVICE_NAME", text("nsp-service")),
        ("MERIDIO_NSP_SERVICE_PORT", text("7778")),
        ("MERIDIO_MAX_TOKEN_LIFETIME", text("10m")),
        ("MERIDIO_STATE_DIR", text("/run/meridio")),
    ];
    // The demo opens and closes the stream itself, to know when.
    let app = [("MERIDIO_SOCKET", text("unix:///run/ambassador/ambassador.sock")), ("TARGET_STREAM", String::new())];
    pod.processes = vec![
        component("tapa", ("MERIDIO_LOG_LEVEL", options), &tapa),
        component("target-app", ("LOG_LEVEL", options), &app),
    ];
    pod
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options { log_level: "INFO".into(), bird: "/usr/sbin/bird".into(), load_balancers: Vec::new() }
    }

    #[test]
    fn two_trenches_share_nodes_and_no_address_name_or_bridge() {
        let pods = pods(&[Trench::fixture('a', 0), Trench::fixture('b', 1)], &options());
        assert_eq!(pods.len(), 2 + 2 * (1 + 2 + 2 + 2 + 4));
        let mut names: Vec<_> = pods.iter().map(|pod| pod.name.clone()).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), pods.len());
        let mut primary: Vec<_> =
            pods.iter().flat_map(|pod| &pod.ports).filter(|port| port.bridge == PRIMARY).map(|port| port.v6).collect();
        let count = primary.len();
        primary.sort();
        primary.dedup();
        assert_eq!(primary.len(), count);
        assert!(
            pods.iter().flat_map(|pod| &pod.ports).all(|port| port.interface.len() <= 15 && port.bridge.len() <= 15)
        );
    }

    #[test]
    fn targets_sit_half_on_each_node_and_names_resolve() {
        let trenches = [Trench::fixture('a', 0)];
        let pods = pods(&trenches, &options());
        let nodes: Vec<_> = pods.iter().filter(|pod| pod.kind == Kind::Target).map(|pod| pod.node).collect();
        assert_eq!(nodes, ["node-a", "node-a", "node-b", "node-b"]);
        let hosts = hosts(&pods, &trenches);
        assert!(hosts.contains("10.244.0.10 nsp-service-trench-a.default\n"), "{hosts}");
        assert!(hosts.contains("10.244.0.41 target-1\n"), "{hosts}");
        assert_eq!(primary_address(43).1.to_string(), "fd10:244::43");
    }
}
