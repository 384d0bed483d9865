//! What a connection wants of its interface: MTU, addresses, routes, policy routes, neighbours; as a desired state, a pure plan,
//! and a loop that applies it.
//!
//! Ownership decides what may be deleted: addresses of global scope on the interface; static routes of the main table
//! over the interface; rules `from ... lookup T` and the routes of T if every route of T leaves by the interface. Tables
//! 253 to 255 (default, main, local) are never used for policies.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::error::{ignore_exists, ignore_missing};
use crate::netlink::{
    Address, Link, LinkChange, Mac, Neighbour, NeighbourState, Netlink, PortRange, Route, Rule, TABLE_MAIN,
};
use crate::{Error, Netns, sysctl};

/// First of the tables that have a meaning of their own.
const TABLE_RESERVED: u32 = 253;
/// A table number above all byte-sized ones is free of reserved meanings again.
const TABLE_LARGE: u32 = 256;
/// Where changes may undo each other ([`look_again`]) the loop looks again, a few times.
const ROUNDS: usize = 4;

/// A route over the interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InterfaceRoute {
    /// Destination prefix.
    pub destination: IpNet,
    /// Next hop, taken to be on the link whatever the addresses say; none: the destination is on the link.
    pub gateway: Option<IpAddr>,
}

/// Packets that match are routed by a table of their own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Policy {
    /// Source prefix.
    pub from: IpNet,
    /// IP protocol number.
    pub protocol: Option<u8>,
    /// Source ports.
    pub sport: Option<PortRange>,
    /// Destination ports.
    pub dport: Option<PortRange>,
    /// Routes of the table. Empty: a default route on the link.
    pub routes: Vec<InterfaceRoute>,
}

/// A neighbour to set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceNeighbour {
    /// Address.
    pub ip: IpAddr,
    /// Link-layer address.
    pub mac: Mac,
    /// Never to be probed.
    pub permanent: bool,
}

/// The desired state of one interface.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct InterfaceConfig {
    /// MTU, if it is to be set.
    pub mtu: Option<u32>,
    /// Addresses of global scope; others are removed. `None`: addresses are left alone.
    pub addresses: Option<Vec<IpNet>>,
    /// Routes of the main table.
    pub routes: Vec<InterfaceRoute>,
    /// Policies; `None`: rules are left alone.
    pub policies: Option<Vec<Policy>>,
    /// Whether what comes from the source of a policy is dropped where the policy's table does not take it, and from then on: also
    /// when the policy and the interface are gone, until the namespace ends or the rule `from <source> lookup 252` is deleted.
    pub guarded: bool,
    /// Neighbours to set.
    pub neighbours: Vec<InterfaceNeighbour>,
}

/// What was read back.
#[derive(Clone, Debug)]
pub struct Observed {
    /// The interface.
    pub link: Link,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Routes of all tables.
    pub routes: Vec<Route>,
    /// All rules.
    pub rules: Vec<Rule>,
    /// Its neighbours.
    pub neighbours: Vec<Neighbour>,
}

/// Table of the guards: it drops.
const GUARD_TABLE: u32 = 252;
/// Priority of guards: behind every rule that the kernel places by itself, before the main table's.
const GUARD_PRIORITY: u32 = 32_765;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Set the interface up, and its MTU.
    Link {
        /// MTU to set, if it differs.
        mtu: Option<u32>,
    },
    /// Add an address.
    AddAddress(IpNet),
    /// Delete an address.
    DeleteAddress(IpNet),
    /// Tell neighbours where the addresses of the interface are now.
    Announce,
    /// Add or replace a route.
    SetRoute(Route),
    /// Delete a route.
    DeleteRoute(Route),
    /// Add a rule.
    AddRule(Rule),
    /// Delete a rule.
    DeleteRule(Rule),
    /// Set a neighbour.
    SetNeighbour(InterfaceNeighbour),
}

fn route(wanted: &InterfaceRoute, table: u32, oif: u32) -> Route {
    let mut route = Route::new(wanted.destination, table).via(wanted.gateway, oif, wanted.gateway.is_some());
    route.link_scope = wanted.gateway.is_none() && !route.is_v6();
    route
}

impl Policy {
    fn rule(&self, table: u32) -> Rule {
        let mut rule = Rule::from_source(self.from, table);
        (rule.protocol, rule.sport, rule.dport) = (self.protocol, self.sport, self.dport);
        rule
    }

    fn routes(&self, table: u32, oif: u32) -> Vec<Route> {
        if self.routes.is_empty() {
            let all = crate::netlink::any(matches!(self.from, IpNet::V6(_)));
            return vec![route(&InterfaceRoute { destination: all, gateway: None }, table, oif)];
        }
        self.routes.iter().map(|r| route(r, table, oif)).collect()
    }
}

/// A table that a policy of an interface may live in.
fn policy_table(table: u32) -> bool {
    table != 0 && table != GUARD_TABLE && !(TABLE_RESERVED..TABLE_LARGE).contains(&table)
}

/// The lowest table that nobody uses.
fn free_table(used: &BTreeSet<u32>) -> u32 {
    (1..).find(|t| policy_table(*t) && !used.contains(t)).unwrap_or(TABLE_LARGE)
}

/// The guard of a policy that takes all traffic of its source: what the policy's own table does not take is dropped.
///
/// It stays when the policy goes, on request or without a word. Sockets outlive their address, and what they still send must not leave by
/// another way, from which an answer could come or an address be learnt. So guards are for those that ask for them, whose namespace
/// ends with them (pods): in another one they pile up, and silence an address that is used otherwise later.
fn guard(policy: &Policy) -> Option<Rule> {
    let all = policy.protocol.is_none() && policy.sport.is_none() && policy.dport.is_none();
    all.then(|| Rule::from_source(policy.from, GUARD_TABLE).with_priority(GUARD_PRIORITY))
}

fn plan_guards(policies: &[Policy], seen: &Observed, steps: &mut Vec<Step>) {
    for rule in policies.iter().filter_map(guard).filter(|rule| !seen.rules.iter().any(|have| rule.matches(have))) {
        let drop = Route::blackhole(crate::netlink::any(rule.v6), GUARD_TABLE, 0);
        if !seen.routes.iter().any(|have| drop.same(have)) && !steps.contains(&Step::SetRoute(drop.clone())) {
            steps.push(Step::SetRoute(drop));
        }
        steps.push(Step::AddRule(rule));
    }
}

/// Compares what is wanted with what is there. An empty plan means: nothing to write.
///
/// New things come before the rules that need them, deletions last, and addresses last of all.
pub fn plan(wanted: &InterfaceConfig, seen: &Observed) -> Vec<Step> {
    let index = seen.link.index;
    let mut steps = Vec::new();
    let mtu = wanted.mtu.filter(|m| *m > 0 && *m != seen.link.mtu);
    if !seen.link.up || mtu.is_some() {
        steps.push(Step::Link { mtu });
    }
    let mut late = plan_addresses(wanted, seen, &mut steps);
    let routes: Vec<_> = wanted.routes.iter().map(|r| route(r, TABLE_MAIN, index)).collect();
    set_missing(&routes, &seen.routes, &mut steps);
    if let Some(policies) = &wanted.policies {
        if wanted.guarded {
            plan_guards(policies, seen, &mut steps);
        }
        plan_policies(policies, seen, &mut steps);
    }
    for neighbour in &wanted.neighbours {
        let known = |n: &Neighbour| {
            let state = n.state == NeighbourState::Permanent || !neighbour.permanent;
            n.ip == neighbour.ip && n.mac == Some(neighbour.mac) && state
        };
        if !seen.neighbours.iter().any(known) {
            steps.push(Step::SetNeighbour(neighbour.clone()));
        }
    }
    let ours = |r: &&Route| r.table == TABLE_MAIN && r.protocol == Route::new(r.destination, 0).protocol;
    for stale in seen.routes.iter().filter(ours).filter(|r| r.only_via(index)) {
        if !routes.iter().any(|r| r.key() == stale.key()) {
            steps.push(Step::DeleteRoute(stale.clone()));
        }
    }
    steps.append(&mut late);
    steps
}

/// Pushes additions; returns deletions.
fn plan_addresses(wanted: &InterfaceConfig, seen: &Observed, steps: &mut Vec<Step>) -> Vec<Step> {
    let Some(addresses) = &wanted.addresses else { return Vec::new() };
    let have: BTreeSet<IpNet> = seen.addresses.iter().filter(|a| a.global).map(|a| a.net).collect();
    let want: BTreeSet<IpNet> = addresses.iter().copied().collect();
    let host = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
    let missing = addresses.iter().copied().filter(|a| !have.contains(a));
    let (hosts, nets): (Vec<IpNet>, Vec<IpNet>) = missing.partition(host);
    // Whoever has heard of an address before believes that it is behind another link. An interface that gets single addresses of a
    // service beside its own one is a target's, and by then it mostly is in its place; for others, of which a namespace may have a thousand,
    // it costs the kernel too much. The single addresses themselves are those of others as well.
    let own = !nets.is_empty() || have.iter().any(|net| !host(net));
    let announce = own && !hosts.is_empty() && !have.iter().any(host);
    steps.extend(nets.into_iter().map(Step::AddAddress));
    steps.extend(announce.then_some(Step::Announce));
    steps.extend(hosts.into_iter().map(Step::AddAddress));
    have.difference(&want).map(|a| Step::DeleteAddress(*a)).collect()
}

fn set_missing(wanted: &[Route], have: &[Route], steps: &mut Vec<Step>) {
    let missing = wanted.iter().filter(|w| !have.iter().any(|h| w.same(h)));
    steps.extend(missing.map(|w| Step::SetRoute(w.clone())));
}

/// Whether a rule may be one of a policy, by what it selects.
fn of_a_policy(rule: &Rule) -> bool {
    let source = rule.lookup && rule.from.is_some() && rule.to.is_none() && rule.mark.is_none();
    source && policy_table(rule.table)
}

fn plan_policies(policies: &[Policy], seen: &Observed, steps: &mut Vec<Step>) {
    let index = seen.link.index;
    let in_table = |table: u32| seen.routes.iter().filter(move |r| r.table == table);
    let ours_or_empty = |table: u32| policy_table(table) && in_table(table).all(|r| r.only_via(index));
    let mut used: BTreeSet<u32> = seen.routes.iter().map(|r| r.table).collect();
    used.extend(seen.rules.iter().map(|r| r.table));
    let mut kept = BTreeSet::new();
    for policy in policies {
        let same = |r: &&Rule| r.lookup && policy.rule(0).same_selector(r) && ours_or_empty(r.table);
        let existing = seen.rules.iter().find(|r| same(r) && !kept.contains(&r.table));
        let table = existing.map_or_else(|| free_table(&used), |r| r.table);
        used.insert(table);
        kept.insert(table);
        let routes = policy.routes(table, index);
        set_missing(&routes, &seen.routes, steps);
        let stale = in_table(table).filter(|have| !routes.iter().any(|w| w.key() == have.key()));
        steps.extend(stale.map(|r| Step::DeleteRoute(r.clone())));
        if existing.is_none() {
            steps.push(Step::AddRule(policy.rule(table)));
        }
    }
    for rule in &seen.rules {
        let filled = in_table(rule.table).next().is_some();
        if of_a_policy(rule) && filled && ours_or_empty(rule.table) && !kept.contains(&rule.table) {
            steps.push(Step::DeleteRule(rule.clone()));
            steps.extend(in_table(rule.table).map(|r| Step::DeleteRoute(r.clone())));
        }
    }
}

async fn observe(netlink: &Netlink, name: &str, wanted: &InterfaceConfig) -> Result<Observed, Error> {
    let link = netlink.link_by_name(name).await?.ok_or_else(|| Error::NoLink(name.to_string()))?;
    let index = Some(link.index);
    let rules = if wanted.policies.is_some() { netlink.rules().await? } else { Vec::new() };
    // Only policies look into other tables, and a namespace with a thousand interfaces has many thousands of routes.
    let all = wanted.policies.as_ref().is_some_and(|policies| !policies.is_empty()) || rules.iter().any(of_a_policy);
    Ok(Observed {
        addresses: if wanted.addresses.is_some() { netlink.addresses(index).await? } else { Vec::new() },
        routes: if all { netlink.routes(None).await? } else { netlink.routes_over(TABLE_MAIN, link.index).await? },
        rules,
        neighbours: if wanted.neighbours.is_empty() { Vec::new() } else { netlink.neighbours(index).await? },
        link,
    })
}

/// Has the kernel send a gratuitous ARP request and an unsolicited neighbour advertisement (RFC 5227, RFC 4861 7.2.6) for each address
/// that the interface has now, as it does when the link-layer address changes: it is set to what it is. The kernel forgets the neighbours
/// of the interface with that.
async fn announce(netns: &Netns, link: &Link) -> Result<(), Error> {
    let Some(mac) = link.mac else { return Ok(()) };
    let before = sysctl::notify(netns, &link.name).await?;
    let again = LinkChange { mac: Some(mac), ..LinkChange::default() };
    let announced = netns.netlink().await?.link_change(link.index, &again).await;
    // The single addresses that come later are announced only where somebody else wants that.
    sysctl::write(netns, before).await?;
    announced
}

async fn apply_step(netns: &Netns, link: &Link, step: &Step) -> Result<(), Error> {
    let (netlink, index) = (netns.netlink().await?, link.index);
    match step {
        Step::Link { mtu } => {
            netlink.link_change(index, &LinkChange { up: Some(true), mtu: *mtu, ..Default::default() }).await
        }
        Step::AddAddress(net) => netlink.address_replace(index, *net).await,
        Step::Announce => {
            if let Err(error) = announce(netns, link).await {
                tracing::debug!(interface = link.name, %error, "neighbours are not told of new addresses");
            }
            Ok(())
        }
        Step::DeleteAddress(net) => ignore_missing(netlink.address_delete(index, *net).await),
        Step::SetRoute(route) => netlink.route_replace(route).await,
        Step::DeleteRoute(route) => ignore_missing(netlink.route_delete(route).await),
        Step::AddRule(rule) => ignore_exists(netlink.rule_add(rule).await),
        Step::DeleteRule(rule) => ignore_missing(netlink.rule_delete(rule).await),
        Step::SetNeighbour(n) => netlink.neighbour_replace(index, n.ip, n.mac, n.permanent).await,
    }
}

/// Whether some of these steps may have undone others: deleting an address takes routes along, and announcing addresses takes neighbours.
fn look_again(wanted: &InterfaceConfig, steps: &[Step]) -> bool {
    let takes = |step: &Step| matches!(step, Step::DeleteAddress(_) | Step::DeleteRoute(_) | Step::DeleteRule(_));
    steps.iter().any(takes) || steps.contains(&Step::Announce) && !wanted.neighbours.is_empty()
}

/// Makes the interface be as wanted. Returns how many changes were written: 0 if it was so already.
///
/// # Errors
/// The interface does not exist, or the kernel refused a change; what was done until then stays and the next call goes on.
pub async fn apply(netns: &Netns, interface: &str, wanted: &InterfaceConfig) -> Result<usize, Error> {
    // Free tables are found by looking; two connections of one namespace must not find the same one.
    let _alone = netns.configuring().await?;
    let netlink = netns.netlink().await?;
    let mut written = 0;
    for _ in 0..ROUNDS {
        let seen = observe(netlink, interface, wanted).await?;
        let steps = plan(wanted, &seen);
        if steps.is_empty() {
            break;
        }
        if steps.iter().any(|s| matches!(s, Step::AddAddress(_))) {
            let name = interface.to_string();
            netns.run(move || sysctl::prepare_interface_here(&name)).await?;
        }
        for step in &steps {
            apply_step(netns, &seen.link, step).await?;
        }
        written += steps.len();
        if !look_again(wanted, &steps) {
            break;
        }
    }
    Ok(written)
}

/// Removes the rules and tables of an interface's policies (the interface itself takes its addresses and routes along).
pub async fn clear_policies(netns: &Netns, interface: &str) -> Result<(), Error> {
    let wanted = InterfaceConfig { policies: Some(Vec::new()), ..Default::default() };
    let _alone = netns.configuring().await?;
    let netlink = netns.netlink().await?;
    let Some(link) = netlink.link_by_name(interface).await? else { return Ok(()) };
    let rules = netlink.rules().await?;
    if !rules.iter().any(of_a_policy) {
        return Ok(());
    }
    let routes = netlink.routes(None).await?;
    let seen = Observed { addresses: Vec::new(), routes, rules, neighbours: Vec::new(), link };
    let mut steps = Vec::new();
    plan_policies(wanted.policies.as_deref().unwrap_or_default(), &seen, &mut steps);
    for step in &steps {
        apply_step(netns, &seen.link, step).await?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
