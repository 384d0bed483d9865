//! The reconcile loop: one bridge, its ports, and the reply routes. It reads the kernel back, compares, applies the difference, and
//! does so again when an input or a link changes. At its start it adopts whatever there is.

use std::collections::BTreeSet;
use std::time::Duration;

use ipnet::IpNet;
use meridio_common::Health;
use nsm_kernel::netlink::LinkChange;
use nsm_kernel::{Link, Netlink, Netns, sysctl};
use tokio_util::sync::CancellationToken;

use crate::inputs::{Inputs, Shared};
use crate::routing;
use crate::settings::Families;

/// Name of the bridge.
pub(crate) const BRIDGE: &str = "bridge0";
/// Kind of a bridge in netlink.
const KIND: &str = "bridge";
/// The state is read back this often even if nothing seems to happen: events can be lost.
const RESYNC: Duration = Duration::from_secs(5);
/// Pause after a failure.
const RETRY: Duration = Duration::from_millis(200);

/// The bridge of this pod.
pub(crate) struct Bridge {
    netns: Netns,
    netlink: Netlink,
    families: Families,
    index: u32,
    /// Ports that are new, and of which it is not known yet who is behind them.
    fresh: BTreeSet<String>,
}

impl Bridge {
    /// Makes the bridge, or takes the one there is. Its hardware address follows from `seed`, so that it never changes:
    /// neighbours that have learnt it stay right, whatever is attached or detached.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub(crate) async fn adopt_or_make(seed: &str, families: Families) -> Result<Self, nsm_kernel::Error> {
        let netns = Netns::current()?;
        let netlink = netns.netlink().await?.clone();
        let link = match netlink.link_by_name(BRIDGE).await? {
            Some(link) if link.kind == KIND => link,
            Some(link) => {
                return Err(nsm_kernel::Error::Invalid(format!("interface {BRIDGE} is a {}, not a bridge", link.kind)));
            }
            None => {
                netlink.bridge_create(BRIDGE, nsm_kernel::netlink::mac_from_seed(seed)).await?;
                netlink
                    .link_by_name(BRIDGE)
                    .await?
                    .ok_or_else(|| nsm_kernel::Error::Invalid(format!("{BRIDGE} vanished")))?
            }
        };
        if !link.up {
            netlink.link_up(link.index).await?;
        }
        if families.v4 {
            let quiet = (format!("ipv4/conf/{BRIDGE}/send_redirects"), "0".to_owned());
            if let Err(error) = sysctl::write(&netns, vec![quiet]).await {
                tracing::warn!(%error, "targets may be redirected past the proxy");
            }
        }
        Ok(Self { netns, netlink, families, index: link.index, fresh: BTreeSet::new() })
    }

    /// Next hops that an earlier run of this proxy has left in use.
    ///
    /// # Errors
    /// When the routes cannot be read.
    pub(crate) async fn inherited(&self) -> Result<BTreeSet<std::net::IpAddr>, nsm_kernel::Error> {
        Ok(routing::inherited(&self.netlink.routes(Some(routing::TABLE)).await?))
    }

    /// Whether an earlier run of this proxy has left rules for VIPs.
    ///
    /// # Errors
    /// When the rules cannot be read.
    pub(crate) async fn has_rules(&self) -> Result<bool, nsm_kernel::Error> {
        Ok(self.netlink.rules().await?.iter().any(routing::ours))
    }

    /// Keeps kernel and inputs together until `stop`. What is in the kernel then stays there.
    pub(crate) async fn reconcile(mut self, shared: Shared, health: Health, mtu: u32, stop: CancellationToken) {
        let mut inputs = shared.subscribe();
        let mut links = loop {
            match nsm_kernel::monitor::watch_links(&self.netns).await {
                Ok(links) => break links,
                Err(error) => tracing::warn!(%error, "interfaces cannot be watched, trying again"),
            }
            tokio::time::sleep(RETRY).await;
        };
        loop {
            let now = inputs.borrow_and_update().clone();
            links.mark_unchanged();
            let pause = match self.apply(&now, mtu).await {
                Ok(()) => {
                    self.tell(&now, &health);
                    RESYNC
                }
                Err(error) => {
                    tracing::warn!(%error, "bridge or routes not as wanted, trying again");
                    RETRY
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                changed = inputs.changed() => if changed.is_err() { return },
                changed = links.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn apply(&mut self, inputs: &Inputs, mtu: u32) -> Result<(), nsm_kernel::Error> {
        let links = self.netlink.links().await?;
        for step in ports(&links, inputs, self.index, mtu) {
            tracing::info!(interface = step.1, change = ?step.2, "bridge port");
            // An interface may go while we look: the next turn sees it.
            match self.netlink.link_change(step.0, &step.2).await {
                Ok(()) if step.2.master.is_some() => _ = self.fresh.insert(step.1.to_owned()),
                Ok(()) => {}
                Err(error) => tracing::debug!(%error, interface = step.1, "port not changed"),
            }
        }
        self.addresses(inputs).await?;
        self.forget_connected(&links).await?;
        let names: BTreeSet<String> = links.iter().map(|link| link.name.clone()).collect();
        self.fresh.retain(|name| names.contains(name));
        self.forget_neighbours(inputs).await?;
        let desired = routing::desired(inputs, self.families, self.index, &names);
        self.route(&desired).await
    }

    /// Behind a new port a load balancer or a target may have another link-layer address than behind the old one, and the kernel would
    /// go on sending to that for as long as it believes what it has heard (half a minute): replies would be lost, or a target that
    /// asks whether its gateway is alive would not hear the answer.
    async fn forget_neighbours(&mut self, inputs: &Inputs) -> Result<(), nsm_kernel::Error> {
        let known: Vec<_> = self.fresh.iter().filter_map(|name| Some((name.clone(), inputs.behind(name)?))).collect();
        for (name, addresses) in known {
            for address in addresses {
                nsm_kernel::error::ignore_missing(self.netlink.neighbour_delete(self.index, *address).await)?;
            }
            self.fresh.remove(&name);
        }
        Ok(())
    }

    async fn addresses(&self, inputs: &Inputs) -> Result<(), nsm_kernel::Error> {
        if inputs.bridge.is_empty() {
            return Ok(());
        }
        let have: Vec<IpNet> =
            self.netlink.addresses(Some(self.index)).await?.into_iter().filter(|a| a.global).map(|a| a.net).collect();
        for net in inputs.bridge.iter().filter(|net| !have.contains(net)) {
            tracing::info!(address = %net, "bridge address added");
            self.netlink.address_replace(self.index, *net).await?;
        }
        for net in have.iter().filter(|net| !inputs.bridge.contains(net)) {
            tracing::info!(address = %net, "bridge address removed");
            self.netlink.address_delete(self.index, *net).await?;
        }
        Ok(())
    }

    /// Removes the connected routes of ports. NSM gives ports addresses of the bridge's own network; a route over a port that is
    /// older than the bridge's would send what is meant for the whole network out of this port, and answers to it would not be taken.
    async fn forget_connected(&self, links: &[Link]) -> Result<(), nsm_kernel::Error> {
        let ports: BTreeSet<u32> = links.iter().filter(|l| l.master == Some(self.index)).map(|l| l.index).collect();
        let routes = self.netlink.routes(Some(nsm_kernel::netlink::TABLE_MAIN)).await?;
        for route in routes.iter().filter(|route| connected(route, &ports)) {
            tracing::info!(%route, "route over a port removed");
            // It goes with its port, or its address, at any time.
            nsm_kernel::error::ignore_missing(self.netlink.route_delete(route).await)?;
        }
        Ok(())
    }

    /// What fails does not keep the rest from being done.
    async fn route(&self, desired: &routing::Routing) -> Result<(), nsm_kernel::Error> {
        let rules = self.netlink.rules().await?;
        let routes = self.netlink.routes(Some(routing::TABLE)).await?;
        let plan = routing::plan(desired, &rules, &routes);
        if plan.is_empty() {
            return Ok(());
        }
        let mut result = Ok(());
        for route in &plan.replace_routes {
            tracing::info!(%route, "reply route");
            result = result.and(self.netlink.route_replace(route).await);
        }
        for rule in &plan.add_rules {
            result = result.and(self.netlink.rule_add(rule).await);
        }
        for rule in &plan.delete_rules {
            result = result.and(self.netlink.rule_delete(rule).await);
        }
        for route in &plan.delete_routes {
            tracing::info!(%route, "reply route removed");
            result = result.and(self.netlink.route_delete(route).await);
        }
        result
    }

    fn tell(&self, inputs: &Inputs, health: &Health) {
        if inputs.balancers.values().any(|balancer| balancer.interface.is_some()) {
            health.serving("Egress");
        } else {
            health.waiting("Egress", "a load balancer of the conduit", "look at the frontends: has one a gateway?");
        }
    }
}

/// What to change about links so that each interface of a connection is a port of the bridge, and the bridge has the conduit's MTU.
///
/// Interfaces of connections are known by name, or by NSM's alias: the latter also finds those of an earlier run.
fn ports<'a>(links: &'a [Link], inputs: &Inputs, bridge: u32, mtu: u32) -> Vec<(u32, &'a str, LinkChange)> {
    let ours = |link: &&Link| {
        inputs.ports.contains(&link.name) || link.alias.starts_with("client-") || link.alias.starts_with("server-")
    };
    let attach = links.iter().filter(ours).filter(|link| link.index != bridge).filter_map(|link| {
        let change = LinkChange {
            master: (link.master != Some(bridge)).then_some(bridge),
            up: (!link.up).then_some(true),
            ..LinkChange::default()
        };
        (change.master.is_some() || change.up.is_some()).then_some((link.index, link.name.as_str(), change))
    });
    // A bridge lowers its MTU with its smallest port but never raises it again by itself.
    let raise = links
        .iter()
        .filter(|link| link.index == bridge && link.mtu != mtu)
        .map(|link| (link.index, link.name.as_str(), LinkChange { mtu: Some(mtu), ..LinkChange::default() }));
    attach.chain(raise).collect()
}

/// A route that the kernel made for an address of one of these ports.
fn connected(route: &nsm_kernel::Route, ports: &BTreeSet<u32>) -> bool {
    let by_port = route.hops.iter().all(|hop| hop.gateway.is_none() && hop.oif.is_some_and(|oif| ports.contains(&oif)));
    let link_local = matches!(route.destination, IpNet::V6(net) if net.network().is_unicast_link_local());
    by_port
        && !route.hops.is_empty()
        && !link_local
        && route.destination.prefix_len() < route.destination.max_prefix_len()
}

/// Sets what the proxy's routing needs, or names what is in the way.
///
/// # Errors
/// The faulty setting or interface, and what to do.
pub(crate) async fn prepare(families: Families) -> Result<(), String> {
    let netns = Netns::current().map_err(|error| error.to_string())?;
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    if families.v4 {
        wanted.extend([
            ("net/ipv4/conf/all/forwarding", "1"),
            ("net/ipv4/fib_multipath_hash_policy", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            // Replies leave by the bridge they came in by: a target that is told so would send past the proxy, to one
            // load balancer, dead or alive. The kernel takes the larger one of "all" and the interface.
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
            // A next hop that does not answer ARP is left out even before the probes have noticed.
            ("net/ipv4/fib_multipath_use_neigh", "1"),
        ]);
    }
    if families.v6 {
        wanted.extend([
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv6/fib_multipath_hash_policy", "1"),
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
        ]);
    }
    for (key, value) in wanted {
        let is = sysctl::read(&netns, key).await.map_err(|error| error.to_string())?;
        if is.trim() == value {
            continue;
        }
        if let Err(error) = sysctl::write(&netns, vec![(key.to_owned(), value.to_owned())]).await {
            return Err(format!("{} is {}, not {value}, and cannot be set: {error}", key.replace('/', "."), is.trim()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, alias: &str, master: Option<u32>) -> Link {
        Link {
            index,
            name: name.into(),
            alias: alias.into(),
            kind: "veth".into(),
            mac: None,
            mtu: 1450,
            up: true,
            running: true,
            master,
            peer: None,
            peer_nsid: None,
            vxlan: None,
        }
    }

    #[test]
    fn interfaces_of_connections_become_ports_and_nothing_else() {
        let links = [
            link(1, "eth0", "", None),
            link(2, BRIDGE, "", None),
            link(3, "proxy.cond-abcd", "client-x", None),
            link(4, "known", "", Some(9)),
            link(5, "done", "server-y", Some(2)),
        ];
        let inputs = Inputs { ports: ["known".to_owned()].into(), ..Inputs::default() };
        let steps = ports(&links, &inputs, 2, 1450);
        assert_eq!(steps.iter().map(|step| step.0).collect::<Vec<_>>(), [3, 4]);
        assert!(steps.iter().all(|step| step.2.master == Some(2) && step.2.mtu.is_none()));
        let by =
            |destination: &str, oif| nsm_kernel::Route::new(destination.parse().unwrap(), 254).via(None, oif, false);
        let ports = [5].into();
        assert!(connected(&by("172.16.1.0/24", 5), &ports) && connected(&by("fd00::/64", 5), &ports));
        assert!(!connected(&by("172.16.1.0/24", 2), &ports) && !connected(&by("fe80::/64", 5), &ports));
        let steps = super::ports(&links[..2], &inputs, 2, 1400);
        assert_eq!((steps.len(), steps[0].2.mtu), (1, Some(1400)));
    }

    /// An address on a port that is older than the bridge's own takes the network's route with it; afterwards the bridge has it.
    #[tokio::test]
    async fn the_network_is_reached_over_the_bridge_alone() {
        use nsm_kernel::netlink::{VethEnd, mac_from_seed};
        let (netns, far) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        let netlink = netns.netlink().await.unwrap().clone();
        let index = |name: &'static str| {
            let netlink = netlink.clone();
            async move { netlink.link_by_name(name).await.unwrap().unwrap().index }
        };
        netlink.bridge_create(BRIDGE, mac_from_seed("b")).await.unwrap();
        let end =
            |netns: &Netns, name: &str| VethEnd { netns: netns.clone(), name: name.into(), mac: mac_from_seed(name) };
        netlink.veth_create(&end(&netns, "port"), &end(&far, "lb"), None).await.unwrap();
        let (bridge, port) = (index(BRIDGE).await, index("port").await);
        netlink.link_up(bridge).await.unwrap();
        let attach = LinkChange { up: Some(true), master: Some(bridge), ..LinkChange::default() };
        netlink.link_change(port, &attach).await.unwrap();
        for (net, at) in
            [("172.16.1.3/24", port), ("fd00::3/64", port), ("172.16.1.1/24", bridge), ("fd00::1/64", bridge)]
        {
            netlink.address_replace(at, net.parse().unwrap()).await.unwrap();
        }
        let families = Families { v4: true, v6: true };
        let this = Bridge { netns, netlink: netlink.clone(), families, index: bridge, fresh: BTreeSet::new() };
        this.forget_connected(&netlink.links().await.unwrap()).await.unwrap();
        let routes = netlink.routes(Some(nsm_kernel::netlink::TABLE_MAIN)).await.unwrap();
        let over =
            |oif| routes.iter().filter(|r| r.only_via(oif)).map(|r| r.destination.to_string()).collect::<Vec<_>>();
        assert!(over(port).iter().all(|net| net.starts_with("fe80")), "{routes:?}");
        assert!(
            over(bridge).iter().any(|net| net == "172.16.1.0/24") && over(bridge).iter().any(|net| net == "fd00::/64")
        );
    }

    /// What an earlier version made of a VIP 0.0.0.0/0 goes, no rule of a VIP goes with it, and a rule that the kernel refuses keeps
    /// none of the others from being made.
    #[tokio::test]
    async fn rules_are_as_wanted_whatever_is_in_the_way() {
        use nsm_kernel::Rule;
        let netns = Netns::anonymous().unwrap();
        let netlink = netns.netlink().await.unwrap().clone();
        let families = Families { v4: true, v6: true };
        let this = Bridge { netns, netlink: netlink.clone(), families, index: 1, fresh: BTreeSet::new() };
        assert!(!this.has_rules().await.unwrap());
        let rule =
            |from: &str| Rule::from_source(from.parse().unwrap(), routing::TABLE).with_priority(routing::PRIORITY);
        let vips = ["20.0.0.1/32", "20.0.0.2/32", "2000::1/128"].map(rule);
        // The kernel takes a rule for every source for one that exists if it comes after others, and deletes the first one for it.
        for rule in [rule("0.0.0.0/0"), rule("::/0")].iter().chain(&vips[..2]) {
            netlink.rule_add(rule).await.unwrap();
        }
        let desired = routing::Routing { rules: Some(vips.to_vec()), routes: Vec::new() };
        this.route(&desired).await.unwrap();
        let have = async || {
            let rules = netlink.rules().await.unwrap().into_iter().filter(|rule| rule.table == routing::TABLE);
            rules
                .map(|rule| rule.from.map_or_else(|| "all".to_owned(), |from| from.to_string()))
                .collect::<BTreeSet<_>>()
        };
        assert_eq!(have().await, ["20.0.0.1/32", "20.0.0.2/32", "2000::1/128"].map(String::from).into());
        assert!(this.has_rules().await.unwrap());
        let refused = Rule { v6: true, ..vips[0].clone() };
        let rules = Some(vec![refused, rule("20.0.0.3/32")]);
        let error = this.route(&routing::Routing { rules, routes: Vec::new() }).await.unwrap_err();
        assert!(error.to_string().contains("20.0.0.1"), "{error}");
        assert_eq!(have().await, ["20.0.0.3/32"].map(String::from).into());
    }

    /// Behind a port that is attached anew the neighbour may be another one; behind one that stays it is the same.
    #[tokio::test]
    async fn neighbours_behind_a_new_port_are_asked_for_anew() {
        use crate::inputs::Balancer;
        use nsm_kernel::netlink::{VethEnd, mac_from_seed};
        let (netns, far) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        let netlink = netns.netlink().await.unwrap().clone();
        netlink.bridge_create(BRIDGE, mac_from_seed("b")).await.unwrap();
        let index = netlink.link_by_name(BRIDGE).await.unwrap().unwrap().index;
        netlink.link_up(index).await.unwrap();
        let end =
            |netns: &Netns, name: &str| VethEnd { netns: netns.clone(), name: name.into(), mac: mac_from_seed(name) };
        netlink.veth_create(&end(&netns, "port"), &end(&far, "lb"), None).await.unwrap();
        let addresses = ["172.16.1.4", "fd00::4"].map(|text| text.parse().unwrap());
        let balancer = Balancer { addresses: addresses.into(), interface: Some("port".into()), ..Balancer::default() };
        let families = Families { v4: true, v6: true };
        let mut this = Bridge { netns, netlink: netlink.clone(), families, index, fresh: BTreeSet::new() };
        let bridge = ["172.16.1.1/24", "fd00::1/64"].map(|text| text.parse().unwrap()).into();
        let mut inputs = Inputs { ports: ["port".to_owned()].into(), bridge, ..Inputs::default() };
        for address in addresses {
            netlink.neighbour_replace(index, address, mac_from_seed("old"), false).await.unwrap();
        }
        let known = async || {
            netlink.neighbours(Some(index)).await.unwrap().iter().filter(|n| addresses.contains(&n.ip)).count()
        };
        // The port is there before anybody knows whose it is.
        this.apply(&inputs, 1500).await.unwrap();
        assert_eq!(known().await, 2);
        inputs.balancers.insert("lb".into(), balancer);
        this.apply(&inputs, 1500).await.unwrap();
        assert_eq!(known().await, 0);
        for address in addresses {
            netlink.neighbour_replace(index, address, mac_from_seed("new"), false).await.unwrap();
        }
        this.apply(&inputs, 1500).await.unwrap();
        assert_eq!(known().await, 2, "once");
    }
}
