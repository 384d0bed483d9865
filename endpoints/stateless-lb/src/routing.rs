//! The slow path: rules and routes that take marked packets to their target through the stack, which answers with the
//! ICMP errors that a router owes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use meridio_maglev::{MARK_FLAG, MARK_MASK};
use nsm_kernel::netlink::Netlink;
use nsm_kernel::{Error, Netns, Route, Rule};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

/// Priority of the rule for errors that this machine makes about marked packets; before those of targets.
const ERRORS: u32 = 199;
/// Priority of targets' rules; behind the frontend's (100, 101), which match other packets.
const TARGETS: u32 = 200;

/// Priority of the rules that end the way of a packet to a VIP which no target's rule has taken: the primary network must never
/// see one.
const GUARD: u32 = 201;
/// Table of these rules. What the stack itself says to a VIP (an error about a reply that is too big) takes the load
/// balancer's detour, which lets nothing else pass; where there is none it drops.
const GUARD_TABLE: u32 = 4098;
/// Metrics in it: the detour before the drop.
const DETOUR: u32 = 100;
/// See [`DETOUR`].
const DROP: u32 = 2000;

/// Table number to next hop and interface, per family.
pub(crate) type Wanted = BTreeMap<(bool, u32), (IpAddr, u32)>;

/// What is the load balancer's own.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    /// Numbers of the tables of targets.
    pub(crate) tables: std::ops::Range<u32>,
    /// Interface of the engine's detour.
    pub(crate) detour: Option<u32>,
}

/// What to change.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) set_routes: Vec<Route>,
    pub(crate) add_rules: Vec<Rule>,
    pub(crate) delete_rules: Vec<Rule>,
    pub(crate) delete_routes: Vec<Route>,
}

fn rule(v6: bool, table: u32) -> Rule {
    let any = Route::default_of(v6, table).destination;
    Rule { from: None, mark: Some(MARK_FLAG | table), ..Rule::from_source(any, table) }.with_priority(TARGETS)
}

fn guard(vip: &IpNet) -> Rule {
    Rule { from: None, to: Some(*vip), ..Rule::from_source(*vip, GUARD_TABLE) }.with_priority(GUARD)
}

/// VIPs whose packets must not leave by any other way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guarded<'a> {
    pub(crate) vips: &'a [IpNet],
    /// What is guarded besides stays so: it may be in use.
    pub(crate) keep: bool,
}

/// The guards of VIPs: a table that drops, before the rules that lead into it.
fn plan_guards(plan: &mut Plan, guarded: Guarded<'_>, detour: Option<u32>, routes: &[Route], rules: &[Rule]) {
    for v6 in [false, true] {
        let all = Route::default_of(v6, GUARD_TABLE);
        let drop = Route::blackhole(all.destination, GUARD_TABLE, DROP);
        let detour = detour.map(|index| Route { metric: DETOUR, link_scope: true, ..all.via(None, index, false) });
        for route in [Some(drop), detour].into_iter().flatten() {
            if !routes.iter().any(|existing| route.same(existing)) {
                plan.set_routes.push(route);
            }
        }
    }
    let wanted: Vec<Rule> = guarded.vips.iter().map(guard).collect();
    plan.add_rules.extend(wanted.iter().filter(|rule| !rules.iter().any(|have| rule.matches(have))).cloned());
    if guarded.keep {
        return;
    }
    let stale = |have: &&Rule| have.table == GUARD_TABLE && !wanted.iter().any(|rule| rule.matches(have));
    plan.delete_rules.extend(rules.iter().filter(stale).cloned());
}

/// Routes and rules of targets that are not there.
fn plan_targets(wanted: &Wanted, routes: &[Route], rules: &[Rule]) -> Plan {
    let mut plan = Plan::default();
    for ((v6, table), (ip, index)) in wanted {
        let route = Route::default_of(*v6, *table).via(Some(*ip), *index, false);
        if !routes.iter().any(|existing| route.same(existing)) {
            plan.set_routes.push(route);
        }
        if !rules.iter().any(|existing| rule(*v6, *table).matches(existing)) {
            plan.add_rules.push(rule(*v6, *table));
        }
    }
    plan
}

/// The difference between what is wanted and what is there.
pub(crate) fn plan(wanted: &Wanted, guarded: Guarded<'_>, own: &Own, routes: &[Route], rules: &[Rule]) -> Plan {
    let mut plan = plan_targets(wanted, routes, rules);
    let keys: BTreeSet<(bool, u32)> = wanted.keys().copied().collect();
    let stale = |v6: bool, table: u32| own.tables.contains(&table) && !keys.contains(&(v6, table));
    let ours = |r: &&Rule| r.mark.is_some_and(|m| m & !MARK_MASK == MARK_FLAG);
    plan.delete_rules = rules.iter().filter(ours).filter(|r| stale(r.v6, r.table)).cloned().collect();
    plan.delete_routes = routes.iter().filter(|r| stale(r.is_v6(), r.table)).cloned().collect();
    plan_guards(&mut plan, guarded, own.detour, routes, rules);
    plan
}

/// Brings the kernel to what is wanted.
pub(crate) async fn apply(netns: &Netns, wanted: &Wanted, guarded: Guarded<'_>, own: &Own) -> Result<(), Error> {
    let netlink = netns.netlink().await?;
    let plan = plan(wanted, guarded, own, &netlink.routes(None).await?, &netlink.rules().await?);
    carry_out(netlink, &plan).await
}

/// Sets routes and rules of targets that no packet is marked for yet; nothing else changes.
pub(crate) async fn prepare(netns: &Netns, wanted: &Wanted) -> Result<(), Error> {
    carry_out(netns.netlink().await?, &plan_targets(wanted, &[], &[])).await
}

async fn carry_out(netlink: &Netlink, plan: &Plan) -> Result<(), Error> {
    let mut result = Ok(());
    // One route that the kernel refuses is no reason to leave the others alone.
    for route in &plan.set_routes {
        result = result.and(netlink.route_replace(route).await);
    }
    for rule in &plan.add_rules {
        result = result.and(nsm_kernel::error::ignore_exists(netlink.rule_add(rule).await));
    }
    for rule in &plan.delete_rules {
        result = result.and(nsm_kernel::error::ignore_missing(netlink.rule_delete(rule).await));
    }
    for route in &plan.delete_routes {
        result = result.and(nsm_kernel::error::ignore_missing(netlink.route_delete(route).await));
    }
    result
}

/// No VIP at all.
const NONE: Guarded<'static> = Guarded { vips: &[], keep: false };

/// Takes all rules and routes of load balancers away.
pub(crate) async fn remove(netns: &Netns, tables: std::ops::Range<u32>) -> Result<(), Error> {
    let netlink = netns.netlink().await?;
    let (routes, rules) = (netlink.routes(None).await?, netlink.rules().await?);
    let plan = plan(&Wanted::new(), NONE, &Own { tables, detour: None }, &routes, &rules);
    // Without the mark, because a request with one means a full mask.
    let errors = rules.iter().filter(|rule| rule.priority == Some(ERRORS) && rule.mark == Some(MARK_FLAG));
    let errors = errors.map(|rule| Rule { mark: None, ..rule.clone() });
    for rule in plan.delete_rules.iter().cloned().chain(errors) {
        nsm_kernel::error::ignore_missing(netlink.rule_delete(&rule).await)?;
    }
    let guards = routes.iter().filter(|route| route.table == GUARD_TABLE);
    for route in plan.delete_routes.iter().chain(guards) {
        nsm_kernel::error::ignore_missing(netlink.route_delete(route).await)?;
    }
    Ok(())
}

/// Lets ICMP errors that the stack makes about marked packets (they carry the mark, `fwmark_reflect`) leave towards the
/// gateways instead of following the mark to the target. They are told apart by coming from this machine (`iif lo`).
pub(crate) async fn errors_to_gateways(netlink: &Netlink, table: u32) -> Result<(), String> {
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = netlink.handle().rule().add();
        let message: &mut RuleMessage = request.message_mut();
        message.header.family = family;
        message.header.action = RuleAction::ToTable;
        message.attributes = vec![
            RuleAttribute::Priority(ERRORS),
            RuleAttribute::Iifname("lo".to_owned()),
            RuleAttribute::FwMark(MARK_FLAG),
            RuleAttribute::FwMask(!MARK_MASK),
            RuleAttribute::Table(table),
        ];
        match request.execute().await {
            Ok(()) => {}
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -17 => {}
            Err(error) => return Err(format!("rule for ICMP errors: {error}")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Own = Own { tables: 5000..6000, detour: Some(9) };

    fn only(vips: &[IpNet]) -> Guarded<'_> {
        Guarded { vips, keep: false }
    }

    #[test]
    fn a_plan_is_the_difference_and_leaves_others_alone() {
        let ip: IpAddr = "172.16.0.6".parse().unwrap();
        let vips: [IpNet; 1] = ["20.0.0.1/32".parse().unwrap()];
        let wanted = Wanted::from([((false, 5001), (ip, 7))]);
        let first = plan(&wanted, only(&vips), &OWN, &[], &[]);
        assert_eq!((first.set_routes.len(), first.add_rules.len()), (5, 2));
        assert_eq!(first.add_rules[0].mark, Some(0x4d00_1389));
        let again = plan(&wanted, only(&vips), &OWN, &first.set_routes, &first.add_rules);
        assert_eq!(again, Plan::default());
        let foreign = Rule { mark: Some(5001), ..rule(false, 5001) };
        let gateway = Route::default_of(false, 4096).via(Some(ip), 2, false);
        let mut routes = first.set_routes.clone();
        routes.push(gateway);
        let mut rules = first.add_rules.clone();
        rules.push(foreign);
        let gone = plan(&Wanted::new(), only(&vips), &OWN, &routes, &rules);
        assert_eq!(
            (gone.delete_rules, gone.delete_routes),
            (first.add_rules[..1].to_vec(), first.set_routes[..1].to_vec())
        );
    }

    #[test]
    fn a_packet_to_a_vip_that_no_target_takes_is_dropped_and_so_is_its_rule_with_the_vip() {
        let vips: [IpNet; 2] = ["20.0.0.1/32".parse().unwrap(), "2000::1/128".parse().unwrap()];
        let first = plan(&Wanted::new(), only(&vips), &OWN, &[], &[]);
        assert!(first.add_rules.iter().all(|rule| rule.to.is_some() && rule.priority > Some(TARGETS)));
        let gone = plan(&Wanted::new(), only(&vips[..1]), &OWN, &first.set_routes, &first.add_rules);
        assert_eq!((gone.delete_rules, gone.delete_routes.len()), (first.add_rules[1..].to_vec(), 0));
        let kept = Guarded { vips: &vips[..1], keep: true };
        assert_eq!(plan(&Wanted::new(), kept, &OWN, &first.set_routes, &first.add_rules), Plan::default());
    }
}
