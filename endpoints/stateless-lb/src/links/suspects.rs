//! Patience with targets that do not answer on their link.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// Shortest and longest time that a target stays out of the tables.
pub(super) const HOLD: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A target that stayed in for this long starts with the shortest time again.
const FORGIVEN: Duration = Duration::from_secs(60);

/// Targets that do not answer, and how patient to be with each.
#[derive(Debug, Default)]
pub(super) struct Suspects(BTreeMap<IpAddr, Suspect>);

#[derive(Debug)]
struct Suspect {
    out: bool,
    since: Instant,
    hold: Duration,
    /// It has answered since it failed the last time.
    answers: bool,
}

impl Suspects {
    /// The address failed; `true`: it goes out of the tables.
    pub(super) fn fail(&mut self, ip: IpAddr, now: Instant) -> bool {
        let suspect =
            self.0.entry(ip).or_insert(Suspect { out: false, since: now, hold: Duration::ZERO, answers: false });
        suspect.answers = false;
        if suspect.out {
            return false;
        }
        let forgiven = now.duration_since(suspect.since) > FORGIVEN;
        suspect.hold = if forgiven { HOLD.0 } else { (suspect.hold * 2).clamp(HOLD.0, HOLD.1) };
        (suspect.out, suspect.since) = (true, now);
        true
    }

    /// The address answers: it comes back, which takes its time after each failure.
    pub(super) fn answer(&mut self, ip: IpAddr) {
        if let Some(suspect) = self.0.get_mut(&ip) {
            suspect.answers = true;
        }
    }

    /// When the next one comes back unless it fails again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.values().filter(|s| s.out && s.answers).map(|s| s.since + s.hold).min()
    }

    /// Those that answer and have been out for long enough: they are no longer.
    pub(super) fn back(&mut self, now: Instant) -> Vec<IpAddr> {
        let due = |s: &Suspect| s.out && s.answers && now.duration_since(s.since) >= s.hold;
        let mut back = Vec::new();
        for (ip, suspect) in self.0.iter_mut().filter(|(_, suspect)| due(suspect)) {
            (suspect.out, suspect.since) = (false, now);
            back.push(*ip);
        }
        back
    }

    pub(super) fn retain(&mut self, keep: impl Fn(IpAddr) -> bool) {
        self.0.retain(|ip, _| keep(*ip));
    }

    pub(super) fn any(&self) -> bool {
        self.0.values().any(|s| s.out)
    }

    pub(super) fn out(&self) -> Vec<IpAddr> {
        self.0.iter().filter(|(_, s)| s.out).map(|(ip, _)| *ip).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flapping_target_is_held_longer_each_time() {
        let ip: IpAddr = "172.16.0.9".parse().unwrap();
        let mut suspects = Suspects::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let answers = |suspects: &mut Suspects, ms| {
            suspects.answer(ip);
            suspects.back(at(ms)) == [ip]
        };
        assert!(suspects.fail(ip, at(0)) && !suspects.fail(ip, at(1)), "fails once");
        assert!(!answers(&mut suspects, 999) && answers(&mut suspects, 1000), "out for a second");
        assert!(suspects.fail(ip, at(2000)));
        assert!(!answers(&mut suspects, 3900) && answers(&mut suspects, 4000), "out for two");
        assert!(suspects.fail(ip, at(70_000)));
        assert!(answers(&mut suspects, 71_000), "a minute of good conduct is rewarded");
        suspects.answer("172.16.0.10".parse().unwrap());
        assert!(suspects.back(at(71_000)).is_empty(), "who never failed cannot come back");
    }

    #[tokio::test(start_paused = true)]
    async fn one_answer_while_it_is_held_suffices_unless_it_fails_again() {
        let ip: IpAddr = "172.16.0.9".parse().unwrap();
        let mut suspects = Suspects::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        suspects.fail(ip, at(0));
        assert_eq!(suspects.next(), None, "silent");
        suspects.answer(ip);
        assert_eq!((suspects.back(at(100)), suspects.next()), (vec![], Some(at(1000))));
        suspects.fail(ip, at(500));
        assert_eq!((suspects.back(at(1000)), suspects.next()), (vec![], None), "silent again");
        suspects.answer(ip);
        assert_eq!((suspects.back(at(1200)), suspects.next(), suspects.any()), (vec![ip], None, false));
    }
}
