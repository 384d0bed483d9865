//! From what is in the kernel and what is wanted to the steps between them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::connectivity::Copy;
use crate::gateway::Family;

/// Priority of `from VIP lookup TABLE`; `TABLE + 1` follows at the next one.
pub const RULE_PRIORITY: u32 = 100;
/// Metric of the copy of the default route: worse than what BIRD writes (32).
pub const COPY_METRIC: u32 = 1_000_000;
/// Metric of the drop route, the worst there is.
pub const DROP_METRIC: u32 = u32::MAX;

/// Who wrote a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// BIRD.
    Bird,
    /// The frontend (`proto static`).
    Own,
    /// Somebody else; never touched.
    Other,
}

/// One next hop.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hop {
    /// Gateway, absent for a route to the link.
    pub gateway: Option<IpAddr>,
    /// Interface index.
    pub interface: u32,
    /// The gateway need not be in a connected subnet.
    pub onlink: bool,
    /// Weight minus one, as the kernel has it.
    pub weight: u8,
}

/// A default route in one of the two tables.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Address family.
    pub family: Family,
    /// Table number.
    pub table: u32,
    /// Metric; smaller is better.
    pub metric: u32,
    /// Who wrote it.
    pub origin: Origin,
    /// Next hops in order; empty is a blackhole.
    pub hops: Vec<Hop>,
}

/// `from source lookup table`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// The VIP.
    pub source: IpNet,
    /// Priority.
    pub priority: u32,
    /// Table.
    pub table: u32,
}

/// What is in the kernel: default routes of the two tables, and rules that lead to them from a source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actual {
    /// Default routes.
    pub routes: Vec<Route>,
    /// Rules.
    pub rules: BTreeSet<Rule>,
}

impl Actual {
    /// BIRD's best default route of a family in a table.
    pub fn bird_default(&self, family: Family, table: u32) -> Option<&Route> {
        let own = |route: &&Route| route.family == family && route.table == table && route.origin == Origin::Bird;
        self.routes.iter().filter(own).filter(|route| !route.hops.is_empty()).min_by_key(|route| route.metric)
    }

    /// Whether any default route of a family leads out of a table.
    pub fn way_out(&self, family: Family, table: u32) -> bool {
        self.routes.iter().any(|route| route.family == family && route.table == table && !route.hops.is_empty())
    }
}

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Desired {
    /// Table of learnt routes; the next one is the drop table.
    pub table: u32,
    /// VIPs; `None` as long as the configuration is not known: then no rule is touched.
    pub vips: Option<Vec<IpNet>>,
    /// VIP traffic without a route is dropped, not sent to the primary network.
    pub drop: bool,
    /// What becomes of the copies.
    pub copies: BTreeMap<Family, Copy>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Adds or replaces a route with the same family, table and metric.
    SetRoute(Route),
    /// Removes a route.
    DeleteRoute(Route),
    /// Adds a rule.
    AddRule(Rule),
    /// Removes a rule.
    DeleteRule(Rule),
}

/// The steps from `actual` to `desired`, in an order in which VIP traffic never has a way to the primary network:
/// drop routes before rules, the rule to the drop table before the rule to the learnt routes.
pub fn plan(actual: &Actual, desired: &Desired) -> Vec<Step> {
    let mut steps = Vec::new();
    for family in Family::BOTH {
        if desired.drop {
            let (table, metric) = (desired.table + 1, DROP_METRIC);
            want(&mut steps, actual, Route { family, table, metric, origin: Origin::Own, hops: vec![] });
        }
        let copy = desired.copies.get(&family).copied().unwrap_or(Copy::Keep);
        plan_copy(&mut steps, actual, desired.table, family, copy);
    }
    if let Some(vips) = &desired.vips {
        plan_rules(&mut steps, actual, desired.table, vips);
    }
    steps
}

fn want(steps: &mut Vec<Step>, actual: &Actual, route: Route) {
    if !actual.routes.contains(&route) {
        steps.push(Step::SetRoute(route));
    }
}

fn plan_copy(steps: &mut Vec<Step>, actual: &Actual, table: u32, family: Family, copy: Copy) {
    match (copy, actual.bird_default(family, table)) {
        (Copy::Follow, Some(learnt)) => {
            let hops = learnt.hops.clone();
            want(steps, actual, Route { family, table, metric: COPY_METRIC, origin: Origin::Own, hops });
        }
        // A route that is not there cannot be followed; the judge decides at its next look.
        (Copy::Follow | Copy::Keep, _) => {}
        (Copy::Remove, _) => {
            let is_copy = |route: &&Route| {
                route.family == family
                    && route.table == table
                    && route.origin == Origin::Own
                    && route.metric == COPY_METRIC
            };
            steps.extend(actual.routes.iter().filter(is_copy).cloned().map(Step::DeleteRoute));
        }
    }
}

fn plan_rules(steps: &mut Vec<Step>, actual: &Actual, table: u32, vips: &[IpNet]) {
    let mut wanted = Vec::new();
    for step in [1, 0] {
        wanted.extend(vips.iter().map(|vip| Rule {
            source: *vip,
            priority: RULE_PRIORITY + step,
            table: table + step,
        }));
    }
    steps.extend(wanted.iter().filter(|rule| !actual.rules.contains(rule)).cloned().map(Step::AddRule));
    let own = |rule: &&Rule| {
        (rule.priority == RULE_PRIORITY && rule.table == table)
            || (rule.priority == RULE_PRIORITY + 1 && rule.table == table + 1)
    };
    let superfluous = actual.rules.iter().filter(own).filter(|rule| !wanted.contains(rule));
    steps.extend(superfluous.cloned().map(Step::DeleteRule));
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: u32 = 4096;

    fn learnt(metric: u32, gateways: &[&str]) -> Route {
        let hop = |gateway: &&str| Hop {
            gateway: Some(gateway.parse().expect("address")),
            interface: 7,
            onlink: false,
            weight: 0,
        };
        let hops = gateways.iter().map(hop).collect();
        Route { family: Family::V4, table: TABLE, metric, origin: Origin::Bird, hops }
    }

    fn desired(copy: Copy, vips: &[&str]) -> Desired {
        let vips = Some(vips.iter().map(|vip| vip.parse().expect("vip")).collect());
        Desired { table: TABLE, vips, drop: true, copies: [(Family::V4, copy), (Family::V6, Copy::Keep)].into() }
    }

    /// Applies steps to a model of the kernel.
    fn apply(actual: &mut Actual, steps: &[Step]) {
        for step in steps {
            match step {
                Step::SetRoute(route) => {
                    actual
                        .routes
                        .retain(|old| (old.family, old.table, old.metric) != (route.family, route.table, route.metric));
                    actual.routes.push(route.clone());
                }
                Step::DeleteRoute(route) => actual.routes.retain(|old| old != route),
                Step::AddRule(rule) => {
                    actual.rules.insert(rule.clone());
                }
                Step::DeleteRule(rule) => {
                    actual.rules.remove(rule);
                }
            }
        }
    }

    #[test]
    fn drop_comes_before_rules_and_a_second_plan_is_empty() {
        let mut actual = Actual { routes: vec![learnt(32, &["169.254.100.150"])], ..Default::default() };
        let wanted = desired(Copy::Follow, &["20.0.0.1/32", "2000::1/128"]);
        let steps = plan(&actual, &wanted);
        let first_rule = steps.iter().position(|step| matches!(step, Step::AddRule(_))).expect("rules");
        assert!(steps[first_rule..].iter().all(|step| matches!(step, Step::AddRule(_))));
        assert!(matches!(&steps[first_rule], Step::AddRule(rule) if rule.table == TABLE + 1));
        apply(&mut actual, &steps);
        assert_eq!(plan(&actual, &wanted), []);
        assert_eq!(actual.rules.len(), 4);
    }

    #[test]
    fn the_copy_follows_stays_and_goes() {
        let mut actual =
            Actual { routes: vec![learnt(32, &["169.254.100.150", "169.254.100.151"])], ..Default::default() };
        let steps = plan(&actual, &desired(Copy::Follow, &[]));
        apply(&mut actual, &steps);
        let copy = actual.routes.iter().find(|route| route.metric == COPY_METRIC).expect("copy").clone();
        assert_eq!((copy.origin, copy.hops.len()), (Origin::Own, 2));
        // BIRD is gone and its route with it.
        actual.routes.retain(|route| route.origin != Origin::Bird);
        assert_eq!(plan(&actual, &desired(Copy::Keep, &[])), []);
        assert_eq!(plan(&actual, &desired(Copy::Follow, &[])), [], "nothing to follow is no reason to remove");
        assert_eq!(plan(&actual, &desired(Copy::Remove, &[])), [Step::DeleteRoute(copy)]);
    }

    #[test]
    fn rules_of_others_and_of_an_unknown_configuration_stay() {
        let rule = |source: &str, priority, table| Rule { source: source.parse().expect("net"), priority, table };
        let rules =
            [rule("20.0.0.1/32", 100, TABLE), rule("20.0.0.1/32", 101, TABLE + 1), rule("9.0.0.0/8", 50, TABLE)].into();
        let actual = Actual { rules, ..Default::default() };
        let unknown = Desired { vips: None, ..desired(Copy::Keep, &[]) };
        assert!(!plan(&actual, &unknown).iter().any(|step| matches!(step, Step::DeleteRule(_))));
        let gone: Vec<_> = plan(&actual, &desired(Copy::Keep, &[]))
            .into_iter()
            .filter(|step| matches!(step, Step::DeleteRule(_)))
            .collect();
        assert_eq!(gone.len(), 2);
    }
}
