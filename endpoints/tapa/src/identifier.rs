//! The identifier protocol as a pure function of what the NSP lists.

use crate::view::Traffic;
use meridio_proto::nsp::v1::{Target, target::Status};
use std::collections::BTreeSet;

/// Key of the identifier in a target's context.
pub(crate) const IDENTIFIER: &str = "identifier";
/// For streams that do not say how many targets they may have.
const DEFAULT_MAX_TARGETS: u32 = 100;

/// What to do next for one target of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// No identifier is left.
    Full,
    /// Register with this identifier and status.
    Register(u32, Status),
    /// Take back the registration, then register DISABLED with this identifier.
    Change(u32),
    /// Registered DISABLED; it may be enabled once traffic would be accepted.
    Hold(u32),
    /// Registered ENABLED.
    Done(u32),
}

/// Whether two lists name the same addresses; their order means nothing.
pub(crate) fn same_ips(one: &[String], other: &[String]) -> bool {
    one.iter().collect::<BTreeSet<_>>() == other.iter().collect::<BTreeSet<_>>()
}

pub(crate) fn identifier_of(target: &Target) -> Option<u32> {
    target.context.get(IDENTIFIER)?.parse().ok()
}

/// Decides. `ips` are ours, `targets` everything registered for the stream, `previous` the identifier to prefer, `traffic` whether
/// the interface accepts it. `pick` chooses one of n: it should be random, so that two targets that collide part.
pub(crate) fn decide(
    ips: &[String],
    targets: &[Target],
    max_targets: u32,
    previous: Option<u32>,
    traffic: Traffic,
    pick: impl FnOnce(usize) -> usize,
) -> Step {
    let max = if max_targets == 0 { DEFAULT_MAX_TARGETS } else { max_targets };
    let others = || targets.iter().filter(|target| !same_ips(&target.ips, ips));
    let taken: BTreeSet<u32> = others().filter_map(identifier_of).collect();
    let free = |id: &u32| (1..=max).contains(id) && !taken.contains(id);
    let choose = || {
        previous.filter(&free).or_else(|| {
            let free: Vec<u32> = (1..=max).filter(&free).collect();
            (!free.is_empty()).then(|| free.get(pick(free.len()) % free.len()).copied())?
        })
    };
    let Some(own) = targets.iter().find(|target| same_ips(&target.ips, ips)) else {
        return choose().map_or(Step::Full, |id| Step::Register(id, Status::Disabled));
    };
    let held = identifier_of(own).filter(|id| (1..=max).contains(id));
    match held {
        Some(id) if free(&id) || keeps(own, id, others()) => match (own.status(), traffic) {
            (Status::Enabled, Traffic::Lost) => Step::Register(id, Status::Disabled),
            (Status::Enabled, _) => Step::Done(id),
            (_, Traffic::Accepted) => Step::Register(id, Status::Enabled),
            (_, Traffic::NotYet | Traffic::Lost) => Step::Hold(id),
        },
        _ => choose().map_or(Step::Full, Step::Change),
    }
}

/// Whether what an earlier run has registered may be renewed as it is: it is ENABLED, and nobody has changed its identifier.
pub(crate) fn renewable(ips: &[String], targets: &[Target], identifier: Option<u32>) -> Option<u32> {
    let own = targets.iter().find(|target| same_ips(&target.ips, ips) && target.status() == Status::Enabled)?;
    identifier.filter(|_| identifier_of(own) == identifier)
}

/// Two targets with one identifier: who is enabled keeps it; of two that are, the one with the smaller addresses.
fn keeps<'a>(own: &Target, id: u32, others: impl Iterator<Item = &'a Target>) -> bool {
    if own.status() != Status::Enabled {
        return false;
    }
    let mut rivals = others.filter(|other| identifier_of(other) == Some(id) && other.status() == Status::Enabled);
    rivals.all(|rival| own.ips < rival.ips)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(n: u32) -> Vec<String> {
        vec![format!("172.16.1.{n}/24"), format!("fd00::{n}/64")]
    }

    fn target(n: u32, id: &str, status: Status) -> Target {
        let context = [(IDENTIFIER.to_owned(), id.to_owned())].into();
        Target { ips: ips(n), context, status: status.into(), ..Target::default() }
    }

    fn step(targets: &[Target], max: u32, previous: Option<u32>, accepted: bool) -> Step {
        let traffic = if accepted { Traffic::Accepted } else { Traffic::NotYet };
        decide(&ips(1), targets, max, previous, traffic, |_| 0)
    }

    #[test]
    fn a_free_identifier_is_chosen_and_the_previous_one_preferred() {
        let others = [target(2, "1", Status::Enabled), target(3, "2", Status::Disabled)];
        assert_eq!(step(&others, 100, None, true), Step::Register(3, Status::Disabled));
        assert_eq!(step(&others, 100, Some(9), true), Step::Register(9, Status::Disabled));
        assert_eq!(step(&others, 100, Some(2), true), Step::Register(3, Status::Disabled));
        assert_eq!(step(&others, 100, Some(101), true), Step::Register(3, Status::Disabled));
        assert_eq!(step(&others, 2, None, true), Step::Full);
        assert_eq!(step(&[], 0, Some(100), true), Step::Register(100, Status::Disabled));
        assert_eq!(
            decide(&ips(1), &others, 4, None, Traffic::Accepted, |n| n - 1),
            Step::Register(4, Status::Disabled)
        );
    }

    #[test]
    fn enabled_only_when_traffic_is_accepted() {
        let own = target(1, "5", Status::Disabled);
        assert_eq!(step(std::slice::from_ref(&own), 100, None, false), Step::Hold(5));
        assert_eq!(step(&[own], 100, None, true), Step::Register(5, Status::Enabled));
        assert_eq!(step(&[target(1, "5", Status::Enabled)], 100, Some(9), false), Step::Done(5));
    }

    #[test]
    fn disabled_while_the_wire_is_dead_with_the_identifier_it_has() {
        let step = |status| decide(&ips(1), &[target(1, "5", status)], 100, Some(5), Traffic::Lost, |_| 0);
        assert_eq!(step(Status::Enabled), Step::Register(5, Status::Disabled));
        assert_eq!(step(Status::Disabled), Step::Hold(5));
    }

    #[test]
    fn renewed_blindly_is_only_what_is_as_it_was() {
        let listed = [target(2, "6", Status::Enabled), target(1, "5", Status::Enabled)];
        assert_eq!(renewable(&ips(1), &listed, Some(5)), Some(5));
        assert_eq!(renewable(&ips(1), &listed, Some(6)), None);
        assert_eq!(renewable(&ips(1), &listed, None), None);
        assert_eq!(renewable(&ips(3), &listed, Some(5)), None);
        assert_eq!(renewable(&[], &listed, Some(5)), None);
        assert_eq!(renewable(&ips(1), &[target(1, "5", Status::Disabled)], Some(5)), None);
        assert_eq!(renewable(&ips(1), &[target(1, "x", Status::Enabled)], None), None);
    }

    #[test]
    fn the_order_of_addresses_means_nothing() {
        let mut own = target(1, "5", Status::Enabled);
        own.ips.reverse();
        assert_eq!(step(&[own], 100, None, true), Step::Done(5));
    }

    #[test]
    fn who_collides_while_disabled_moves() {
        let (own, other) = (target(1, "5", Status::Disabled), target(2, "5", Status::Disabled));
        assert_eq!(step(&[own.clone(), other.clone()], 100, Some(5), true), Step::Change(1));
        assert_eq!(step(&[own, other], 1, Some(5), true), Step::Change(1), "5 is out of range");
        let (own, other) = (target(1, "1", Status::Disabled), target(2, "1", Status::Enabled));
        assert_eq!(step(&[own, other], 1, None, true), Step::Full);
    }

    #[test]
    fn of_two_enabled_one_stays() {
        let (one, two) = (target(1, "5", Status::Enabled), target(2, "5", Status::Enabled));
        assert_eq!(step(&[one.clone(), two.clone()], 100, None, true), Step::Done(5));
        assert_eq!(decide(&ips(2), &[one, two], 100, None, Traffic::Accepted, |_| 0), Step::Change(1));
        let (own, other) = (target(2, "5", Status::Enabled), target(1, "5", Status::Disabled));
        assert_eq!(decide(&ips(2), &[own, other], 100, None, Traffic::Accepted, |_| 0), Step::Done(5));
    }

    #[test]
    fn garbage_in_the_registry_is_replaced() {
        for id in ["", "x", "-1", "0", "101"] {
            assert_eq!(step(&[target(1, id, Status::Enabled)], 100, None, true), Step::Change(1), "{id}");
            assert_eq!(
                step(&[target(2, id, Status::Enabled)], 100, Some(1), true),
                Step::Register(1, Status::Disabled)
            );
        }
    }

    #[test]
    fn many_targets_that_start_together_end_with_different_identifiers() {
        let max = 20;
        let mut registry: Vec<Target> = Vec::new();
        for round in 0..1000u32 {
            // Each of them decides on what it sees, in turns that differ from round to round.
            let n = (round * 7 + round / 20) % max + 1;
            let pick = |count: usize| (n as usize * 31 + round as usize * 17) % count;
            let step = decide(&ips(n), &registry, max, None, Traffic::Accepted, pick);
            let (id, status) = match step {
                Step::Register(id, status) => (id, status),
                Step::Change(id) => (id, Status::Disabled),
                Step::Done(_) => continue,
                other => panic!("{other:?}"),
            };
            registry.retain(|target| target.ips != ips(n));
            registry.push(target(n, &id.to_string(), status));
        }
        let ids: BTreeSet<_> = registry.iter().filter_map(identifier_of).collect();
        assert_eq!(ids.len(), max as usize);
        assert!(registry.iter().all(|target| target.status() == Status::Enabled));
    }
}
