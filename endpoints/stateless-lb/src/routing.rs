//! The slow path: rules and routes that take marked packets to their target through the stack, which answers with the
//! ICMP errors that a router owes.

use std::collections::{BTreeMap, HashMap, HashSet};
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
pub(crate) const GUARD_TABLE: u32 = 4098;
/// Metrics in it: the detour before the drop.
const DETOUR: u32 = 100;
/// See [`DETOUR`].
const DROP: u32 = 2000;

/// Table number to next hop and interface, per family.
pub(crate) type Wanted = BTreeMap<(bool, u32), (IpAddr, u32)>;

/// What is the load balancer's own.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    /// Numbers of the tables of targets by today's settings.
    pub(crate) tables: std::ops::Range<u32>,
    /// Interface of the engine's detour.
    pub(crate) detour: Option<u32>,
}

/// What is there, by IP version and table: of tens of thousands of targets none can be compared with all others.
struct Found<'a> {
    routes: HashMap<(bool, u32), Vec<&'a Route>>,
    rules: HashSet<&'a Rule>,
}

impl<'a> Found<'a> {
    fn new(routes: &'a [Route], rules: &'a [Rule]) -> Self {
        let mut found = Found { routes: HashMap::new(), rules: rules.iter().collect() };
        for route in routes {
            found.routes.entry((route.is_v6(), route.table)).or_default().push(route);
        }
        found
    }

    fn has_route(&self, wanted: &Route) -> bool {
        let table = self.routes.get(&(wanted.is_v6(), wanted.table));
        table.is_some_and(|routes| routes.iter().any(|there| wanted.same(there)))
    }

    /// The rules asked for here leave nothing open, so that only an equal one serves.
    fn has_rule(&self, wanted: &Rule) -> bool {
        self.rules.contains(wanted)
    }
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
fn plan_guards(plan: &mut Plan, vips: &[IpNet], detour: Option<u32>, found: &Found<'_>) {
    for v6 in [false, true] {
        let all = Route::default_of(v6, GUARD_TABLE);
        let drop = Route::blackhole(all.destination, GUARD_TABLE, DROP);
        let detour = detour.map(|index| Route { metric: DETOUR, link_scope: true, ..all.via(None, index, false) });
        plan.set_routes.extend([Some(drop), detour].into_iter().flatten().filter(|route| !found.has_route(route)));
    }
    plan.add_rules.extend(vips.iter().map(guard).filter(|rule| !found.has_rule(rule)));
}

/// Routes and rules of targets that are not there.
fn plan_targets(plan: &mut Plan, wanted: &Wanted, found: &Found<'_>) {
    for ((v6, table), (ip, index)) in wanted {
        let route = Route::default_of(*v6, *table).via(Some(*ip), *index, false);
        if !found.has_route(&route) {
            plan.set_routes.push(route);
        }
        let rule = rule(*v6, *table);
        if !found.has_rule(&rule) {
            plan.add_rules.push(rule);
        }
    }
}

/// Whether a load balancer has made a rule for a target, whatever its settings were: the mark says the table once more.
fn to_target(rule: &Rule) -> bool {
    rule.lookup && rule.mark == Some(MARK_FLAG | rule.table) && rule.table & MARK_MASK != 0
}

/// Whether a route looks like those of targets.
fn like_ours(route: &Route) -> bool {
    let ours = Route::default_of(route.is_v6(), route.table);
    (route.kind, route.protocol, route.key()) == (ours.kind, ours.protocol, ours.key())
}

/// The difference between what is wanted and what is there.
pub(crate) fn plan(wanted: &Wanted, guarded: Guarded<'_>, own: &Own, routes: &[Route], rules: &[Rule]) -> Plan {
    let (mut plan, found) = (Plan::default(), Found::new(routes, rules));
    plan_targets(&mut plan, wanted, &found);
    plan_guards(&mut plan, guarded.vips, own.detour, &found);
    // Numbers of other settings are those of an earlier process, and what it forwards may be in use as the guards are.
    let stale = |v6, table| !wanted.contains_key(&(v6, table)) && (own.tables.contains(&table) || !guarded.keep);
    plan.delete_rules = rules.iter().filter(|r| to_target(r) && stale(r.v6, r.table)).cloned().collect();
    let named: HashSet<(bool, u32)> = plan.delete_rules.iter().map(|r| (r.v6, r.table)).collect();
    let ours = |r: &&Route| own.tables.contains(&r.table) || named.contains(&(r.is_v6(), r.table));
    let routes = routes.iter().filter(|r| stale(r.is_v6(), r.table) && like_ours(r));
    plan.delete_routes = routes.filter(ours).cloned().collect();
    if !guarded.keep {
        let vips: HashSet<Rule> = guarded.vips.iter().map(guard).collect();
        let stale = |have: &&Rule| have.table == GUARD_TABLE && !vips.contains(have);
        plan.delete_rules.extend(rules.iter().filter(stale).cloned());
    }
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
    let mut plan = Plan::default();
    plan_targets(&mut plan, wanted, &Found::new(&[], &[]));
    carry_out(netns.netlink().await?, &plan).await
}

/// Sets the guards of VIPs and the way into the detour; nothing else changes, because an earlier process may have left it for packets
/// that are on their way.
pub(crate) async fn guards(netns: &Netns, vips: &[IpNet], detour: Option<u32>) -> Result<(), Error> {
    let netlink = netns.netlink().await?;
    let (routes, rules) = (netlink.routes(Some(GUARD_TABLE)).await?, netlink.rules().await?);
    let mut plan = Plan::default();
    plan_guards(&mut plan, vips, detour, &Found::new(&routes, &rules));
    carry_out(netlink, &plan).await
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
    for rule in plan.delete_rules.iter().cloned().chain(errors(&rules)) {
        nsm_kernel::error::ignore_missing(netlink.rule_delete(&rule).await)?;
    }
    let guards = routes.iter().filter(|route| route.table == GUARD_TABLE);
    for route in plan.delete_routes.iter().chain(guards) {
        nsm_kernel::error::ignore_missing(netlink.route_delete(route).await)?;
    }
    Ok(())
}

/// The rules of [`errors_to_gateways`], as they are deleted: without the mark, because a request with one means a full mask.
fn errors(rules: &[Rule]) -> impl Iterator<Item = Rule> {
    let errors = rules.iter().filter(|rule| rule.priority == Some(ERRORS) && rule.mark == Some(MARK_FLAG));
    errors.map(|rule| Rule { mark: None, ..rule.clone() })
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
    // The first one would win, with the table of settings that count no more.
    let rules = netlink.rules().await.map_err(|e| e.to_string())?;
    for rule in errors(&rules).filter(|rule| rule.table != table) {
        nsm_kernel::error::ignore_missing(netlink.rule_delete(&rule).await).map_err(|e| e.to_string())?;
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
    fn the_work_grows_with_the_number_of_targets_not_with_its_square() {
        let target = |n: u32| {
            let v6 = std::net::Ipv6Addr::from((0xfd00 << 112) + u128::from(n));
            let v4 = std::net::Ipv4Addr::from(0xac10_0000 + n);
            [((false, 5000 + n), (v4.into(), 7)), ((true, 5000 + n), (v6.into(), 7))]
        };
        let wanted: Wanted = (1..=10_000).flat_map(target).collect();
        let vips: Vec<IpNet> =
            (0..2_000).map(|n| format!("20.0.{}.{}/32", n / 250, n % 250).parse().unwrap()).collect();
        let own = Own { tables: 5000..37_768, detour: Some(9) };
        let begun = std::time::Instant::now();
        let first = plan(&wanted, only(&vips), &own, &[], &[]);
        assert_eq!((first.set_routes.len(), first.add_rules.len()), (20_004, 22_000));
        assert_eq!(plan(&wanted, only(&vips), &own, &first.set_routes, &first.add_rules), Plan::default());
        // What is missing is set, what is too much goes, and only that.
        let (mut routes, mut rules) = (first.set_routes.clone(), first.add_rules.clone());
        let missing = (routes.swap_remove(77), rules.swap_remove(777));
        let mut less = wanted.clone();
        less.retain(|key, _| *key != (true, 9_000));
        let kept = plan(&less, only(&vips[1..]), &own, &routes, &rules);
        assert_eq!((kept.set_routes, kept.add_rules), (vec![missing.0], vec![missing.1]));
        assert_eq!((kept.delete_rules, kept.delete_routes.len()), (vec![rule(true, 9_000), guard(&vips[0])], 1));
        assert!(begun.elapsed() < std::time::Duration::from_secs(10), "{:?}", begun.elapsed());
    }

    #[test]
    fn what_other_settings_have_named_goes_and_what_others_have_made_stays() {
        let ip: IpAddr = "172.16.0.6".parse().unwrap();
        let route = |table| Route::default_of(false, table).via(Some(ip), 7, false);
        let guarded = |keep| Guarded { vips: &[], keep };
        // 9001: another start of the numbers; 4096: where gateways are; the last rule is for ICMP errors.
        let errors = Rule { mark: Some(MARK_FLAG), table: 4096, ..rule(false, 4096) }.with_priority(ERRORS);
        let rules = [rule(false, 9001), rule(false, 5001), errors, Rule { mark: Some(9002), ..rule(false, 9002) }];
        let mut routes = vec![route(9001), route(5001), route(9002), route(4096)];
        routes.extend(plan(&Wanted::new(), guarded(false), &OWN, &[], &[]).set_routes);
        let gone = plan(&Wanted::new(), guarded(false), &OWN, &routes, &rules);
        assert_eq!((gone.delete_rules, gone.delete_routes), (rules[..2].to_vec(), routes[..2].to_vec()));
        let gone = plan(&Wanted::new(), guarded(true), &OWN, &routes, &rules);
        assert_eq!((gone.delete_rules, gone.delete_routes), (rules[1..2].to_vec(), routes[1..2].to_vec()));
        // Numbers that once were those of gateways' tables too: BIRD's routes, the frontend's copy, what drops.
        let shared = [rule(false, 4096), rule(false, 5001)];
        let theirs = [
            Route { protocol: 12, ..route(4096) },
            Route { protocol: 12, ..route(5001) },
            Route { metric: 10_000, ..route(4096) },
            Route::blackhole(route(0).destination, 4096, 0),
        ];
        assert_eq!(plan(&Wanted::new(), guarded(false), &OWN, &theirs, &shared).delete_routes, []);
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
