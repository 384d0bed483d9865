//! The slow path: rules and routes that take marked packets to their target through the stack, which answers with the
//! ICMP errors that a router owes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use meridio_maglev::{MARK_FLAG, MARK_MASK};
use nsm_kernel::netlink::Netlink;
use nsm_kernel::{Error, Netns, Route, Rule};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::packet_route::AddressFamily;

/// Priority of the rule for errors that this machine makes about marked packets; before those of targets.
const ERRORS: u32 = 199;
/// Priority of targets' rules; behind the frontend's (100, 101), which match other packets.
const TARGETS: u32 = 200;

/// Table number to next hop and interface, per family.
pub(crate) type Wanted = BTreeMap<(bool, u32), (IpAddr, u32)>;

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

/// The difference between what is wanted and what is there. `tables` are the numbers that are ours.
pub(crate) fn plan(wanted: &Wanted, tables: std::ops::Range<u32>, routes: &[Route], rules: &[Rule]) -> Plan {
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
    let keys: BTreeSet<(bool, u32)> = wanted.keys().copied().collect();
    let stale = |v6: bool, table: u32| tables.contains(&table) && !keys.contains(&(v6, table));
    let ours = |r: &&Rule| r.mark.is_some_and(|m| m & !MARK_MASK == MARK_FLAG);
    plan.delete_rules = rules.iter().filter(ours).filter(|r| stale(r.v6, r.table)).cloned().collect();
    plan.delete_routes = routes.iter().filter(|r| stale(r.is_v6(), r.table)).cloned().collect();
    plan
}

/// Brings the kernel to what is wanted.
pub(crate) async fn apply(netns: &Netns, wanted: &Wanted, tables: std::ops::Range<u32>) -> Result<(), Error> {
    let netlink = netns.netlink().await?;
    let plan = plan(wanted, tables, &netlink.routes(None).await?, &netlink.rules().await?);
    if plan == Plan::default() {
        return Ok(());
    }
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

    #[test]
    fn a_plan_is_the_difference_and_leaves_others_alone() {
        let ip: IpAddr = "172.16.0.6".parse().unwrap();
        let wanted = Wanted::from([((false, 5001), (ip, 7))]);
        let first = plan(&wanted, 5000..6000, &[], &[]);
        assert_eq!((first.set_routes.len(), first.add_rules.len()), (1, 1));
        assert_eq!(first.add_rules[0].mark, Some(0x4d00_1389));
        let again = plan(&wanted, 5000..6000, &first.set_routes, &first.add_rules);
        assert_eq!(again, Plan::default());
        let foreign = Rule { mark: Some(5001), ..rule(false, 5001) };
        let gateway = Route::default_of(false, 4096).via(Some(ip), 2, false);
        let mut routes = first.set_routes.clone();
        routes.push(gateway);
        let gone = plan(&Wanted::new(), 5000..6000, &routes, &[first.add_rules[0].clone(), foreign]);
        assert_eq!((gone.delete_rules, gone.delete_routes), (first.add_rules, first.set_routes));
    }
}
