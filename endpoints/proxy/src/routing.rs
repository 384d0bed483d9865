//! Which replies go where: rules for the VIPs, and one multipath default over the load balancers that are alive.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use nsm_kernel::{Route, RouteKind, Rule};

use crate::inputs::{Balancer, Inputs};
use crate::settings::Families;

/// Table of the reply routes.
pub(crate) const TABLE: u32 = 1;
/// Priority of the rules that send replies to it.
pub(crate) const PRIORITY: u32 = 100;
/// Metric of the blackhole behind the default route: without a load balancer replies must not reach the primary network.
pub(crate) const BLACKHOLE_METRIC: u32 = 4_294_967_294;

/// The routing that shall be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Routing {
    /// Rules, or `None` while it is not known which: then those that exist stay.
    pub(crate) rules: Option<Vec<Rule>>,
    /// Routes of [`TABLE`].
    pub(crate) routes: Vec<Route>,
}

/// What has to be done; routes first, so that no rule ever leads into an empty table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RoutingPlan {
    pub(crate) replace_routes: Vec<Route>,
    pub(crate) add_rules: Vec<Rule>,
    pub(crate) delete_rules: Vec<Rule>,
    pub(crate) delete_routes: Vec<Route>,
}

impl RoutingPlan {
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// The next hops of one family.
///
/// What the data path says (the link is there, probes are answered) counts more than what the control plane says
/// (registered, up): a load balancer that only the control plane has lost stays if there is no better one, and if no
/// probe is answered at all, the probes are believed less than the links. What was in use when the proxy began stays beside what it
/// has connected to until one of these has answered, and if it answers itself until all of them are connected to (for some seconds at
/// most): a restart moves no reply to another load balancer.
pub(crate) fn next_hops(inputs: &Inputs, links: &BTreeSet<String>, v6: bool) -> BTreeSet<IpAddr> {
    let of_family = |addresses: &BTreeSet<IpAddr>| -> Vec<IpAddr> {
        addresses.iter().copied().filter(|address| address.is_ipv6() == v6).collect()
    };
    let linked = |balancer: &&Balancer| balancer.interface.as_ref().is_some_and(|name| links.contains(name));
    let usable: Vec<&Balancer> = inputs.balancers.values().filter(linked).collect();

    let pick = |wanted: &dyn Fn(&Balancer) -> bool| -> BTreeSet<IpAddr> {
        usable.iter().filter(|balancer| wanted(balancer)).flat_map(|balancer| of_family(&balancer.addresses)).collect()
    };
    let inherited = of_family(&inputs.inherited).into_iter().collect::<BTreeSet<_>>();
    let alive = |addresses: BTreeSet<IpAddr>| -> BTreeSet<IpAddr> {
        addresses.into_iter().filter(|address| !inputs.silent.contains(address)).collect()
    };

    let good = alive(pick(&|balancer| balancer.registered && balancer.up));
    if good.iter().any(|address| inputs.answering.contains(address)) {
        let vouched = |address: &IpAddr| !inputs.settled && inputs.answering.contains(address);
        return good.into_iter().chain(inherited.into_iter().filter(vouched)).collect();
    }
    if !good.is_empty() {
        return &good | &alive(inherited);
    }
    let known = pick(&|_| true);
    let any = &known | &inherited;
    let answering = alive(any.clone());
    if answering.is_empty() { any } else { answering }
}

/// The routing that follows from the inputs. `bridge` is the bridge's interface index, `links` the names of the interfaces there are.
pub(crate) fn desired(inputs: &Inputs, families: Families, bridge: u32, links: &BTreeSet<String>) -> Routing {
    let mut routes = Vec::new();
    for v6 in families.each() {
        let empty = Route::default_of(v6, TABLE);
        routes.push(Route::blackhole(empty.destination, TABLE, BLACKHOLE_METRIC));
        let hops = next_hops(inputs, links, v6);
        if !hops.is_empty() {
            routes.push(hops.into_iter().fold(empty, |route, hop| route.via(Some(hop), bridge, true)));
        }
    }
    let of_families = |vip: &&IpNet| families.each().any(|v6| matches!(vip, IpNet::V6(_)) == v6);
    let rules = inputs.vips.as_ref().map(|vips| {
        let rule = |vip: &IpNet| Rule::from_source(*vip, TABLE).with_priority(PRIORITY);
        vips.iter().filter(of_families).map(rule).collect()
    });
    Routing { rules, routes }
}

/// The difference between `desired` and what was read back.
pub(crate) fn plan(desired: &Routing, rules: &[Rule], routes: &[Route]) -> RoutingPlan {
    let replace_routes =
        desired.routes.iter().filter(|wanted| !routes.iter().any(|have| wanted.same(have))).cloned().collect();
    let delete_routes = routes
        .iter()
        .filter(|have| have.table == TABLE && have.kind != RouteKind::Other)
        .filter(|have| !desired.routes.iter().any(|wanted| wanted.key() == have.key()))
        .cloned()
        .collect();
    let (add_rules, delete_rules) =
        desired.rules.as_ref().map_or_else(Default::default, |wanted| plan_rules(wanted, rules));
    RoutingPlan { replace_routes, add_rules, delete_rules, delete_routes }
}

/// A rule that sends replies to [`TABLE`].
pub(crate) fn ours(rule: &Rule) -> bool {
    rule.lookup && rule.table == TABLE && rule.from.is_some()
}

/// The kernel says no source where it is every address. A rule with other conditions is somebody else's.
fn sourced(rule: &Rule) -> Rule {
    let every = Rule::from_source(Route::default_of(rule.v6, TABLE).destination, TABLE);
    let unconditional = rule.same_selector(&Rule { from: None, ..every.clone() });
    if unconditional { Rule { from: every.from, ..rule.clone() } } else { rule.clone() }
}

/// Rules to add, and rules to delete.
fn plan_rules(wanted: &[Rule], existing: &[Rule]) -> (Vec<Rule>, Vec<Rule>) {
    let existing: Vec<Rule> = existing.iter().map(sourced).collect();
    let add = wanted.iter().filter(|rule| !existing.iter().any(|have| rule.matches(have))).cloned().collect();
    let unwanted = |have: &Rule| ours(have) && !wanted.iter().any(|rule| rule.matches(have));
    (add, existing.into_iter().filter(unwanted).collect())
}

/// The next hops of the default routes in `routes`: what a proxy finds at its start.
pub(crate) fn inherited(routes: &[Route]) -> BTreeSet<IpAddr> {
    let defaults = routes.iter().filter(|route| route.table == TABLE && route.destination.prefix_len() == 0);
    defaults.flat_map(|route| route.hops.iter().filter_map(|hop| hop.gateway)).collect()
}

#[cfg(test)]
mod tests;
