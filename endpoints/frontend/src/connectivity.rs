//! Judges from looks at BIRD, the carrier and the kernel's routes whether there is external connectivity, and what
//! becomes of the copy of the last-known default route. Pure: time and observations are handed in.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::gateway::Family;

/// How long a BIRD that is away, or that has just come back, leaves the last judgement standing.
pub const GRACE: Duration = Duration::from_secs(10);
/// How long a reachable gateway may be without a default route before the copy of the last one goes.
pub const NO_DEFAULT_LIMIT: Duration = Duration::from_secs(1);

/// What BIRD and the kernel say about one family.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FamilyView {
    /// At least one gateway of this family is configured.
    pub configured: bool,
    /// At least one of them is up.
    pub up: bool,
    /// BIRD's default route of this family is in the kernel.
    pub default_route: bool,
    /// A default route of this family is in the kernel, BIRD's or our copy.
    pub way_out: bool,
}

/// One look.
#[derive(Clone, Debug, Default)]
pub struct Observation {
    /// The external interface exists and has carrier.
    pub carrier: bool,
    /// `None` while BIRD does not answer.
    pub bird: Option<BTreeMap<Family, FamilyView>>,
}

/// State of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// No gateway of this family.
    NotConfigured,
    /// A gateway is up.
    Up,
    /// All gateways are down.
    Down,
    /// BIRD cannot say: the last judgement stands.
    Unknown,
}

/// What becomes of the copy of the default route in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copy {
    /// It is made equal to BIRD's route.
    Follow,
    /// It stays as it is.
    Keep,
    /// It goes.
    Remove,
}

/// Result of one look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// External connectivity; `None` as long as nothing is known.
    pub connected: Option<bool>,
    /// Per family.
    pub states: BTreeMap<Family, State>,
    /// Per family.
    pub copies: BTreeMap<Family, Copy>,
    /// When another look is due although nothing happens.
    pub again_at: Option<Instant>,
}

/// Families whose VIPs are announced from now on, `last` being those until now. `forwarding` is the word of the load balancer,
/// `None` as long as it is not known, and so is the verdict: where nothing is known nothing changes.
///
/// Each family stands for itself: one without a gateway takes nothing from the other, while the list of the NSP
/// ([`Verdict::connected`]) has but one entry for both.
pub fn announced(last: &BTreeSet<Family>, forwarding: Option<bool>, verdict: Option<&Verdict>) -> BTreeSet<Family> {
    let announce = |family: &Family| {
        let state = verdict.and_then(|verdict| verdict.states.get(family)).copied().unwrap_or(State::Unknown);
        match (forwarding, state) {
            (Some(false), _) | (_, State::Down | State::NotConfigured) => false,
            (Some(true), State::Up) => true,
            _ => last.contains(family),
        }
    };
    Family::BOTH.into_iter().filter(announce).collect()
}

/// What has to be remembered between looks.
#[derive(Debug, Default)]
pub struct Judge {
    last: Option<bool>,
    away_since: Option<Instant>,
    settled_at: BTreeMap<Family, Instant>,
    no_default_since: BTreeMap<Family, Instant>,
    seen: bool,
}

impl Judge {
    /// Sessions of these families were restarted by us: for a while their absence says nothing.
    pub fn restarted(&mut self, families: &BTreeSet<Family>, now: Instant) {
        for family in families {
            self.settled_at.insert(*family, now + GRACE);
        }
    }

    /// Judges one look.
    pub fn look(&mut self, observation: &Observation, now: Instant) -> Verdict {
        if observation.bird.is_none() {
            self.away_since.get_or_insert(now);
        } else if self.away_since.take().is_some() || !self.seen {
            self.seen = true;
            self.restarted(&Family::BOTH.into(), now);
        }
        let mut verdict = Verdict { connected: None, states: BTreeMap::new(), copies: BTreeMap::new(), again_at: None };
        for family in Family::BOTH {
            let (state, copy, again_at) = self.family(observation, family, now);
            verdict.states.insert(family, state);
            verdict.copies.insert(family, copy);
            verdict.again_at = [verdict.again_at, again_at].into_iter().flatten().min();
        }
        verdict.connected = self.connected(&verdict.states);
        self.last = verdict.connected;
        verdict
    }

    /// Every family that has gateways has to have one that is up: the entry in the NSP's list says "this way out" for both, and
    /// with it the proxies would send replies of the family that has none here, while another load balancer has one.
    fn connected(&self, states: &BTreeMap<Family, State>) -> Option<bool> {
        let any = |wanted: State| states.values().any(|state| *state == wanted);
        if any(State::Down) || states.values().all(|state| *state == State::NotConfigured) {
            Some(false)
        } else if any(State::Unknown) {
            self.last
        } else {
            Some(true)
        }
    }

    fn family(&mut self, look: &Observation, family: Family, now: Instant) -> (State, Copy, Option<Instant>) {
        let Some(views) = &look.bird else {
            let away_until = self.away_since.unwrap_or(now) + GRACE;
            // Without carrier nothing has to be asked of BIRD.
            return match (look.carrier, now < away_until) {
                (false, _) => (State::Down, Copy::Remove, None),
                (true, true) => (State::Unknown, Copy::Keep, Some(away_until)),
                (true, false) => (State::Down, Copy::Keep, None),
            };
        };
        let view = views.get(&family).copied().unwrap_or_default();
        if !view.configured {
            return (State::NotConfigured, Copy::Remove, None);
        }
        if !look.carrier {
            self.settled_at.remove(&family);
            return (State::Down, Copy::Remove, None);
        }
        let settling = self.settled_at.get(&family).copied().filter(|until| *until > now);
        if view.up && view.default_route {
            self.settled_at.remove(&family);
            self.no_default_since.remove(&family);
            return (State::Up, Copy::Follow, None);
        }
        if !view.up {
            self.no_default_since.remove(&family);
            return match settling {
                // Where nothing leads out there is nothing to lose by saying so, and an entry of an earlier pod may have to go.
                Some(_) if view.way_out => (State::Unknown, Copy::Keep, settling),
                _ => (State::Down, Copy::Remove, None),
            };
        }
        // A session that has just come up is no way out before its route is in the kernel, and a route that is
        // withdrawn often comes back: until the limit nothing is decided.
        let limit = *self.no_default_since.entry(family).or_insert(now) + NO_DEFAULT_LIMIT;
        if now < limit {
            return (State::Unknown, Copy::Keep, Some(limit));
        }
        let copy = if settling.is_some() { Copy::Keep } else { Copy::Remove };
        (State::Up, copy, settling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: FamilyView = FamilyView { configured: true, up: true, default_route: true, way_out: true };
    const DOWN: FamilyView = FamilyView { configured: true, up: false, default_route: false, way_out: true };
    const BARE: FamilyView = FamilyView { configured: true, up: true, default_route: false, way_out: true };
    const NONE: FamilyView = FamilyView { configured: false, up: false, default_route: false, way_out: false };

    fn seen(v4: FamilyView, v6: FamilyView) -> Observation {
        Observation { carrier: true, bird: Some([(Family::V4, v4), (Family::V6, v6)].into()) }
    }

    fn away() -> Observation {
        Observation { carrier: true, bird: None }
    }

    fn after(start: Instant, millis: u64) -> Instant {
        start + Duration::from_millis(millis)
    }

    #[tokio::test]
    async fn both_families_have_to_be_up() {
        let (mut judge, now) = (Judge::default(), Instant::now());
        assert_eq!(judge.look(&seen(DOWN, DOWN), now).connected, None, "sessions have just begun");
        assert_eq!(judge.look(&seen(UP, DOWN), now).connected, None);
        assert_eq!(judge.look(&seen(UP, UP), now).connected, Some(true));
        assert_eq!(judge.look(&seen(UP, DOWN), now).connected, Some(false));
        assert_eq!(judge.look(&seen(UP, NONE), now).connected, Some(true));
        assert_eq!(judge.look(&seen(NONE, NONE), now).connected, Some(false));
    }

    #[tokio::test]
    async fn a_family_is_announced_while_the_other_is_down() {
        let (mut judge, now, both) = (Judge::default(), Instant::now(), BTreeSet::from(Family::BOTH));
        let mut told = |look: &Observation| announced(&both, Some(true), Some(&judge.look(look, now)));
        assert_eq!(told(&seen(UP, UP)), both);
        assert_eq!(told(&seen(UP, DOWN)), [Family::V4].into());
        assert_eq!(told(&seen(DOWN, UP)), [Family::V6].into());
        assert_eq!(told(&seen(UP, NONE)), [Family::V4].into(), "there is nobody to tell it to");
        assert_eq!(told(&seen(DOWN, DOWN)), [].into());
        assert_eq!(told(&Observation { carrier: false, ..seen(UP, UP) }), [].into());
    }

    #[tokio::test]
    async fn what_is_not_known_changes_no_announcement() {
        let (now, both, none) = (Instant::now(), BTreeSet::from(Family::BOTH), BTreeSet::new());
        let (begun, up) = (Judge::default().look(&seen(DOWN, UP), now), Judge::default().look(&seen(UP, UP), now));
        for last in [&both, &none, &[Family::V4].into()] {
            assert_eq!(announced(last, Some(true), None), *last);
            assert_eq!(announced(last, None, Some(&up)), *last);
            assert_eq!(announced(last, Some(false), Some(&up)), none);
        }
        assert_eq!(announced(&both, Some(true), Some(&begun)), both, "IPv4's session has just begun");
        assert_eq!(announced(&none, Some(true), Some(&begun)), [Family::V6].into());
    }

    #[tokio::test]
    async fn a_new_pod_has_no_connectivity_from_its_first_look() {
        let (mut judge, now) = (Judge::default(), Instant::now());
        let bare = FamilyView { way_out: false, ..DOWN };
        assert_eq!(judge.look(&seen(bare, bare), now).connected, Some(false));
        assert_eq!(judge.look(&seen(UP, UP), after(now, 900)).connected, Some(true));
    }

    #[tokio::test]
    async fn a_gateway_that_never_comes_is_down_after_the_grace() {
        let (mut judge, now) = (Judge::default(), Instant::now());
        let verdict = judge.look(&seen(DOWN, NONE), now);
        assert_eq!(verdict.again_at, Some(now + GRACE), "a look is due when the grace ends");
        assert_eq!(judge.look(&seen(DOWN, NONE), now + GRACE).connected, Some(false));
    }

    #[tokio::test]
    async fn a_restart_of_bird_changes_nothing() {
        let (mut judge, now) = (Judge::default(), Instant::now());
        judge.look(&seen(UP, UP), now);
        let verdict = judge.look(&away(), after(now, 10));
        assert_eq!((verdict.connected, verdict.copies[&Family::V4]), (Some(true), Copy::Keep));
        let verdict = judge.look(&seen(DOWN, DOWN), after(now, 100));
        assert_eq!((verdict.connected, verdict.copies[&Family::V4]), (Some(true), Copy::Keep));
        // Established, the route not yet there.
        let verdict = judge.look(&seen(BARE, DOWN), after(now, 2000));
        assert_eq!((verdict.connected, verdict.copies[&Family::V4]), (Some(true), Copy::Keep));
        let verdict = judge.look(&seen(UP, UP), after(now, 2100));
        assert_eq!((verdict.connected, verdict.copies[&Family::V4]), (Some(true), Copy::Follow));
        // Settled: from here on a living BIRD is believed at once.
        let verdict = judge.look(&seen(DOWN, UP), after(now, 2200));
        assert_eq!((verdict.connected, verdict.copies[&Family::V4]), (Some(false), Copy::Remove));
    }

    #[tokio::test]
    async fn a_bird_that_stays_away_ends_connectivity_but_not_the_route() {
        let (mut judge, now) = (Judge::default(), Instant::now());
        judge.look(&seen(UP, NONE), now);
        judge.look(&away(), now);
        let verdict = judge.look(&away(), now + GRACE);
        assert_eq!((verdict.connected, verdict.copies[&Family::V4]), (Some(false), Copy::Keep));
    }

    #[tokio::test]
    async fn carrier_loss_counts_at_once() {
        let (mut judge, now) = (Judge::default(), Instant::now());
        judge.look(&seen(UP, UP), now);
        for look in [Observation { carrier: false, ..seen(UP, UP) }, Observation { carrier: false, bird: None }] {
            let verdict = judge.look(&look, now);
            assert_eq!((verdict.connected, verdict.copies[&Family::V6]), (Some(false), Copy::Remove));
        }
    }

    #[tokio::test]
    async fn a_session_without_its_route_in_the_kernel_is_no_way_out_yet() {
        let (mut judge, now) = (Judge::default(), Instant::now());
        judge.look(&seen(DOWN, NONE), now);
        let late = now + GRACE;
        assert_eq!(judge.look(&seen(DOWN, NONE), late).connected, Some(false));
        assert_eq!(judge.look(&seen(BARE, NONE), late).connected, Some(false));
        assert_eq!(judge.look(&seen(UP, NONE), after(late, 10)).connected, Some(true));
    }

    #[tokio::test]
    async fn a_withdrawn_default_goes_after_a_moment() {
        let (mut judge, now) = (Judge::default(), Instant::now());
        judge.look(&seen(UP, NONE), now);
        let verdict = judge.look(&seen(BARE, NONE), now);
        assert_eq!((verdict.copies[&Family::V4], verdict.again_at), (Copy::Keep, Some(now + NO_DEFAULT_LIMIT)));
        let verdict = judge.look(&seen(BARE, NONE), now + NO_DEFAULT_LIMIT);
        assert_eq!((verdict.connected, verdict.copies[&Family::V4]), (Some(true), Copy::Remove));
    }
}
