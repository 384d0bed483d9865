//! From when on a load balancer attracts traffic.

use std::time::Duration;

use tokio::time::Instant;

/// How long targets out of reach may hold back a load balancer that has just started.
const COMPLETE_WITHIN: Duration = Duration::from_secs(10);

/// One that has just started does so when it reaches all targets, not the first one: what belongs to the
/// others would be sent to the wrong ones. A target that stays out of reach holds it back for a while only.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    pub(crate) open: bool,
    since: Option<Instant>,
}

impl Gate {
    /// `missing`: targets out of reach.
    pub(crate) fn look(&mut self, forwarding: bool, missing: usize, now: Instant) -> bool {
        if forwarding && !self.open {
            let since = *self.since.get_or_insert(now);
            self.open = missing == 0 || now.duration_since(since) >= COMPLETE_WITHIN;
        }
        self.open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_fresh_load_balancer_waits_for_all_targets_but_not_for_ever() {
        let now = Instant::now();
        let mut gate = Gate::default();
        assert!(!gate.look(false, 0, now), "nothing to forward to");
        assert!(!gate.look(true, 2, now) && gate.look(true, 0, now), "all there");
        assert!(gate.look(true, 1, now), "a target that is lost later closes nothing");
        let mut gate = Gate::default();
        assert!(!gate.look(true, 1, now) && gate.look(true, 1, now + COMPLETE_WITHIN));
    }
}
