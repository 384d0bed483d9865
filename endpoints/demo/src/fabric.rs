//! The networks between pods: bridges in namespaces of their own, and cables (veth pairs) whose bridge end is a switch port.

use std::sync::Arc;

use anyhow::Result;

use crate::namespace::Namespace;
use crate::topology::{Kind, PRIMARY, PodPlan, Port};

/// Namespaces that hold the bridges. The primary network has its own, so that one packet socket sees all of it and nothing else.
#[derive(Debug)]
pub struct Fabric {
    primary: Arc<Namespace>,
    external: Arc<Namespace>,
}

impl Fabric {
    /// Makes the bridge of the primary network and one external bridge for each name.
    ///
    /// # Errors
    /// If the kernel refuses a namespace or a bridge.
    pub fn create(prefix: &str, externals: &[String]) -> Result<Self> {
        let primary = Arc::new(Namespace::create(&format!("{prefix}primary"), None)?);
        let external = Arc::new(Namespace::create(&format!("{prefix}external"), None)?);
        for (namespace, bridges) in [(&primary, &[PRIMARY.to_owned()][..]), (&external, externals)] {
            namespace.sysctls(&quiet())?;
            let mut lines = String::from("link set lo up\n");
            for bridge in bridges {
                lines +=
                    &format!("link add {bridge} type bridge forward_delay 0 mcast_snooping 0\nlink set {bridge} up\n");
            }
            namespace.ip(&lines)?;
        }
        // The primary network has a router, so that a packet that leaks finds a way out and is seen.
        primary
            .ip(&format!("addr add 10.244.0.254/24 dev {PRIMARY}\naddr add fd10:244::254/64 dev {PRIMARY} nodad\n"))?;
        Ok(Fabric { primary, external })
    }

    /// Namespace of the primary network.
    pub fn primary(&self) -> &Arc<Namespace> {
        &self.primary
    }

    fn side(&self, bridge: &str) -> &Namespace {
        if bridge == PRIMARY { &self.primary } else { &self.external }
    }

    /// Plugs a pod in: each cable, its addresses, and the default route of the primary network.
    ///
    /// # Errors
    /// If the kernel refuses a link or an address.
    pub fn plug(&self, plan: &PodPlan, namespace: &Namespace) -> Result<()> {
        namespace.sysctls(&sysctls(plan.kind))?;
        let mut inside = String::from("link set lo up\n");
        for port in &plan.ports {
            let Port { bridge, interface, v4, v6 } = port;
            let outside = port_name(plan, port);
            self.side(bridge).ip(&format!(
                "link add {outside} type veth peer name {interface} address {} netns {}\nlink set {outside} master {bridge} up\n",
                mac(port),
                namespace.name()
            ))?;
            inside += &format!(
                "link set {interface} up\naddr add {v4}/24 dev {interface}\naddr add {v6}/64 dev {interface} nodad\n"
            );
            if bridge == PRIMARY {
                inside += "route add default via 10.244.0.254\nroute add ::/0 via fd10:244::254\n";
            }
        }
        namespace.ip(&inside)
    }

    /// Removes the switch ports of a pod whose namespace is gone or going.
    pub fn unplug(&self, plan: &PodPlan) {
        for port in &plan.ports {
            let _ = self.side(&port.bridge).ip(&format!("link del {}\n", port_name(plan, port)));
        }
    }

    /// Sets the switch port of `plan` on `bridge` up or down.
    ///
    /// # Errors
    /// If the pod has no such port.
    pub fn set_port(&self, plan: &PodPlan, bridge: &str, up: bool) -> Result<()> {
        let state = if up { "up" } else { "down" };
        for port in plan.ports.iter().filter(|port| port.bridge == bridge) {
            self.side(bridge).ip(&format!("link set {} {state}\n", port_name(plan, port)))?;
        }
        Ok(())
    }
}

/// Interface name of the bridge end: the pod's name, at most 15 bytes.
fn port_name(plan: &PodPlan, port: &Port) -> String {
    let letter = if port.bridge == PRIMARY { 'p' } else { 'x' };
    format!("{letter}-{}", plan.name).chars().take(15).collect()
}

/// A locally administered address that a pod which comes back has again, as its IP addresses; derived from the latter.
fn mac(port: &Port) -> String {
    let [a, b, c, d] = port.v4.octets();
    let network = if port.bridge == PRIMARY { 0 } else { 1 };
    format!("02:{network:02x}:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

fn pairs(values: &[(&str, &str)]) -> Vec<(String, String)> {
    values.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// Of a namespace that only switches: no IPv6 chatter on its ports.
fn quiet() -> Vec<(String, String)> {
    pairs(&[
        ("net/ipv6/conf/default/autoconf", "0"),
        ("net/ipv6/conf/default/accept_ra", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
    ])
}

/// What an init container, or the node, sets in a pod before its components start.
fn sysctls(kind: Kind) -> Vec<(String, String)> {
    let mut values = quiet();
    values.extend(pairs(&[
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        ("net/ipv4/conf/default/arp_notify", "1"),
        ("net/ipv6/conf/default/ndisc_notify", "1"),
    ]));
    match kind {
        Kind::LoadBalancer | Kind::Proxy => values.extend(pairs(&[
            ("net/ipv4/conf/all/forwarding", "1"),
            ("net/ipv4/conf/default/forwarding", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv6/conf/default/forwarding", "1"),
            ("net/ipv4/fib_multipath_hash_policy", "1"),
            ("net/ipv6/fib_multipath_hash_policy", "1"),
            ("net/ipv4/fwmark_reflect", "1"),
            ("net/ipv6/fwmark_reflect", "1"),
            ("net/ipv4/ip_local_port_range", "49152\t65535"),
        ])),
        Kind::Gateway => values.extend(pairs(&[
            ("net/ipv4/fib_multipath_hash_policy", "1"),
            ("net/ipv6/fib_multipath_hash_policy", "1"),
            ("net/ipv4/ip_local_port_range", "1024\t65535"),
        ])),
        Kind::Target => {
            values.extend(pairs(&[("net/core/somaxconn", "4096"), ("net/ipv4/tcp_max_syn_backlog", "4096")]))
        }
        Kind::Node | Kind::Service => {}
    }
    values
}
