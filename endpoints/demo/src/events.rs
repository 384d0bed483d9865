//! What happens to the trench while traffic flows, and what each of it may cost.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use crate::report::Event;
use crate::status::Observer;
use crate::topology::Kind;
use crate::traffic::continuous::{Continuous, Direction, Mark, Window, first_answer};
use crate::{cleanup, excerpt};

/// Components whose restart is an event, with the kind of pod they live in.
const COMPONENTS: [(&str, Kind); 8] = [
    ("nsp", Kind::Service),
    ("ipam", Kind::Service),
    ("proxy", Kind::Proxy),
    ("tapa", Kind::Target),
    ("frontend", Kind::LoadBalancer),
    ("stateless-lb", Kind::LoadBalancer),
    ("nsm", Kind::Node),
    ("identity", Kind::Node),
];

/// How often a target is opened to measure the time to its first packet.
const OPENINGS: usize = 5;

/// Patience for the trench to be whole again.
const PATIENCE: Duration = Duration::from_secs(45);

/// Log lines of this time before and after a loss are shown, and so many at most.
const AROUND: Duration = Duration::from_millis(150);
const EXCERPT: usize = 40;

/// Names of all events, in order.
pub fn names() -> Vec<String> {
    let mut names: Vec<String> =
        ["target-close", "target-open", "lb-crash", "lb-link", "lb-kill", "lb-return"].map(str::to_owned).to_vec();
    names.extend(COMPONENTS.iter().map(|(component, _)| format!("restart-{component}")));
    names.push("restart-bird".to_owned());
    names
}

/// Runs events against one trench.
pub struct Director<'a> {
    /// Looks at the trench.
    pub observer: &'a Observer,
    /// The traffic that flows meanwhile.
    pub traffic: &'a Continuous,
    /// Told what is waited for.
    pub say: &'a mut dyn FnMut(&str),
    /// Times from `Open` to the first packet, milliseconds.
    pub openings: Vec<u64>,
}

/// How losses are judged.
#[derive(Clone, Debug, Default)]
struct Rules {
    /// Its own packets and connections may be lost or move.
    closed: Option<String>,
    /// Connections may move to it.
    opened: Option<String>,
    /// Losses are allowed for this long after the event; without, none is.
    within: Option<Duration>,
}

impl Director<'_> {
    /// Runs the event `name`. What goes wrong is in its failures.
    pub fn run(&mut self, name: &str) -> Event {
        let mut event = Event { name: name.to_owned(), ..Event::default() };
        if let Err(error) = self.dispatch(name, &mut event) {
            event.failures.push(format!("{error:#}"));
        }
        event
    }

    fn dispatch(&mut self, name: &str, event: &mut Event) -> Result<()> {
        match name {
            "target-close" => self.target_close(event),
            "target-open" => self.target_open(event),
            "lb-crash" => self.lb_crash(event),
            "lb-link" => self.lb_link(event),
            "lb-kill" => self.lb_kill(event),
            "lb-return" => self.lb_return(event),
            "restart-bird" => self.restart_bird(event),
            _ => {
                let component = name
                    .strip_prefix("restart-")
                    .and_then(|name| COMPONENTS.iter().find(|(component, _)| *component == name));
                let Some(&(component, kind)) = component else {
                    bail!("there is no event {name}; there are {}", names().join(", "))
                };
                self.restart(component, kind, event)
            }
        }
    }

    /// All targets, or all but the last.
    fn targets(&self, without_last: bool) -> (BTreeSet<String>, String) {
        let mut names = self.observer.trench.target_pods();
        let last = names.last().cloned().unwrap_or_default();
        if without_last {
            names.pop();
        }
        (names.into_iter().collect(), last)
    }

    fn wait_whole(&mut self, targets: &BTreeSet<String>, from: Instant, event: &mut Event) {
        match self.observer.wait_whole(targets, PATIENCE, self.say) {
            Ok(_) => event.whole_ms = event.whole_ms.max(millis(from.elapsed())),
            Err(error) => event.failures.push(format!("{error:#}")),
        }
    }

    /// Adds what happened since `mark` to the event.
    fn account(&mut self, mark: Mark, rules: &Rules, event: &mut Event) {
        let window = self.traffic.since(mark);
        let before = event.failures.len();
        tally(&window, mark.at, rules, event);
        let times = window.losses.iter().map(|loss| loss.sent);
        if event.failures.len() > before
            && let (Some(first), Some(last)) = (times.clone().min(), times.max())
        {
            let at = |time: Instant| SystemTime::now() - time.elapsed();
            let logs = &self.observer.cluster.blueprint().logs;
            match excerpt::of(logs, at(first) - AROUND, at(last) + AROUND) {
                Ok(lines) => event.log.extend(lines.into_iter().take(EXCERPT)),
                Err(error) => event.log.push(format!("{error:#}")),
            }
        }
    }

    fn target_close(&mut self, event: &mut Event) -> Result<()> {
        let (rest, last) = self.targets(true);
        let mark = self.traffic.mark();
        self.observer.close(&last)?;
        self.wait_whole(&rest, mark.at, event);
        std::thread::sleep(Duration::from_secs(1));
        self.account(mark, &Rules { closed: Some(last), ..Rules::default() }, event);
        Ok(())
    }

    /// Opens the target that `target-close` left closed; closes and opens it a few times more for the measurement.
    fn target_open(&mut self, event: &mut Event) -> Result<()> {
        let (all, last) = self.targets(false);
        let (rest, _) = self.targets(true);
        for opening in 0..OPENINGS {
            if opening > 0 || self.observer.stream_state(&last)?.is_some() {
                self.observer.close(&last)?;
                let from = Instant::now();
                self.wait_whole(&rest, from, event);
                std::thread::sleep(Duration::from_millis(500));
            }
            let mark = self.traffic.mark();
            let took = self.open_and_time(&last)?;
            self.openings.push(millis(took));
            self.wait_whole(&all, mark.at, event);
            self.account(mark, &Rules { opened: Some(last.clone()), ..Rules::default() }, event);
        }
        Ok(())
    }

    /// From the call of `Open` to the first packet that the gateway gets answered by `target`.
    fn open_and_time(&self, target: &str) -> Result<Duration> {
        let (found, answer) = std::sync::mpsc::channel();
        let search = first_answer(self.observer.trench.vip4.into(), target.to_owned(), Instant::now() + PATIENCE);
        self.observer.generator.handle()?.spawn(async move {
            let _ = found.send(search.await);
        });
        std::thread::sleep(Duration::from_millis(200));
        let called = self.observer.open(target, Duration::from_secs(5))?;
        let first = answer.recv().context("the search for the first answer ended")?;
        Ok(first
            .with_context(|| format!("{target} answered nothing within {PATIENCE:?} of its Open"))?
            .duration_since(called))
    }

    fn lb_crash(&mut self, event: &mut Event) -> Result<()> {
        let (all, _) = self.targets(false);
        let [lb, _] = self.observer.trench.lbs();
        let mark = self.traffic.mark();
        self.observer.cluster.crash_pod(&lb)?;
        std::thread::sleep(Duration::from_secs(3));
        self.observer.cluster.start_pod(&lb)?;
        self.wait_whole(&all, mark.at, event);
        self.account(mark, &Rules::default(), event);
        Ok(())
    }

    fn lb_link(&mut self, event: &mut Event) -> Result<()> {
        let (all, _) = self.targets(false);
        let [lb, _] = self.observer.trench.lbs();
        let pod = self.observer.cluster.pod(&lb)?;
        let bridge = self.observer.trench.external_bridge();
        let fabric = self.observer.cluster.fabric()?;
        let mark = self.traffic.mark();
        fabric.set_port(&pod.plan, &bridge, false)?;
        std::thread::sleep(Duration::from_secs(4));
        self.account(mark, &Rules { within: Some(Duration::from_millis(300)), ..Rules::default() }, event);
        // The way back must cost nothing.
        let mark = self.traffic.mark();
        fabric.set_port(&pod.plan, &bridge, true)?;
        let mut back = Event::default();
        self.wait_whole(&all, mark.at, &mut back);
        self.account(mark, &Rules::default(), &mut back);
        event.whole_ms = back.whole_ms;
        event.attempted += back.attempted;
        event.failures.extend(back.failures.into_iter().map(|failure| format!("when the link came back: {failure}")));
        Ok(())
    }

    fn lb_kill(&mut self, event: &mut Event) -> Result<()> {
        let [lb, _] = self.observer.trench.lbs();
        let mark = self.traffic.mark();
        self.observer.cluster.delete_pod(&lb)?;
        std::thread::sleep(Duration::from_secs(5));
        self.account(mark, &Rules { within: Some(Duration::from_secs(2)), ..Rules::default() }, event);
        Ok(())
    }

    fn lb_return(&mut self, event: &mut Event) -> Result<()> {
        let (all, _) = self.targets(false);
        let [lb, _] = self.observer.trench.lbs();
        if self.observer.cluster.pod(&lb).is_ok() {
            self.observer.cluster.delete_pod(&lb)?;
            std::thread::sleep(Duration::from_secs(5));
        }
        let mark = self.traffic.mark();
        self.observer.cluster.recreate_pod(&lb)?;
        self.wait_whole(&all, mark.at, event);
        self.account(mark, &Rules::default(), event);
        Ok(())
    }

    /// Each instance of a component, one after the other.
    fn restart(&mut self, component: &str, kind: Kind, event: &mut Event) -> Result<()> {
        let (all, _) = self.targets(false);
        for pod in self.observer.cluster.pods(kind) {
            let Ok(process) = pod.process(component) else { continue };
            let mark = self.traffic.mark();
            process.restart(&pod.namespace)?;
            std::thread::sleep(Duration::from_secs(1));
            self.wait_whole(&all, mark.at, event);
            self.account(mark, &Rules::default(), event);
        }
        Ok(())
    }

    /// BIRD of each load balancer pod; its frontend starts it again.
    fn restart_bird(&mut self, event: &mut Event) -> Result<()> {
        let (all, _) = self.targets(false);
        for pod in self.observer.cluster.pods(Kind::LoadBalancer) {
            let birds: Vec<u32> =
                pod.pids().into_iter().filter(|&pid| cleanup::command_name(pid).as_deref() == Some("bird")).collect();
            if birds.is_empty() {
                bail!("no bird runs in {}", pod.plan.name);
            }
            let mark = self.traffic.mark();
            // One whose frontend was restarted is a child of ours by now.
            cleanup::kill_and_reap(&birds, Duration::from_secs(2));
            std::thread::sleep(Duration::from_secs(1));
            self.wait_whole(&all, mark.at, event);
            self.account(mark, &Rules::default(), event);
        }
        Ok(())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Adds a window to an event and judges it by `rules`.
fn tally(window: &Window, begin: Instant, rules: &Rules, event: &mut Event) {
    let own = |target: Option<&String>| rules.closed.is_some() && target == rules.closed.as_ref();
    let losses: Vec<_> = window.losses.iter().filter(|loss| !own(loss.target.as_ref())).collect();
    event.own_lost += (window.losses.len() - losses.len()) as u64;
    let after = |loss: &&crate::traffic::continuous::Loss| millis(loss.sent.duration_since(begin));
    let last = |direction| {
        losses.iter().filter(|loss| loss.direction == direction).map(|loss| after(loss) + 1).max().unwrap_or(0)
    };
    let (ingress, egress) = (last(Direction::Ingress), last(Direction::Egress));
    event.ingress_recovered_ms = event.ingress_recovered_ms.max(ingress);
    event.egress_recovered_ms = event.egress_recovered_ms.max(egress);
    event.recovered_ms = event.recovered_ms.max(ingress).max(egress);

    let moves = |broken: &&crate::traffic::continuous::Break| {
        own(Some(&broken.target)) && broken.after.is_some() || rules.opened.is_some() && broken.after == rules.opened
    };
    let (moved, broken): (Vec<_>, Vec<_>) = window.breaks.iter().partition(moves);
    event.moved += moved.len() as u64;
    event.broken += broken.len() as u64;
    event.longest_stall_ms = event.longest_stall_ms.max(millis(window.longest_stall));
    event.lost += losses.len() as u64 + broken.len() as u64;
    event.attempted += window.sent + window.connections;

    if let Some(first) = broken.first() {
        let place = first.after.as_deref().unwrap_or("nobody");
        event.failures.push(format!(
            "{} TCP connections broke, the first one {} -> {place}: {}",
            broken.len(),
            first.target,
            first.how
        ));
    }
    match rules.within {
        Some(limit) if u128::from(ingress.max(egress)) > limit.as_millis() => {
            event.failures.push(format!(
                "back after {ingress} ms (ingress) and {egress} ms (egress), {} ms is the limit",
                limit.as_millis()
            ));
        }
        None if !losses.is_empty() => {
            let count = |direction| losses.iter().filter(|loss| loss.direction == direction).count();
            let first = losses.iter().map(after).min().unwrap_or(0);
            let v6 = losses.iter().filter(|loss| loss.is_ipv6()).count();
            let mut of_targets = BTreeMap::<&str, u64>::new();
            for loss in &losses {
                *of_targets.entry(loss.target.as_deref().unwrap_or("nobody")).or_default() += 1;
            }
            let of_targets: Vec<_> =
                of_targets.into_iter().map(|(target, count)| format!("{target} {count}")).collect();
            event.failures.push(format!(
                "{} of {} packets lost ({} IPv4, {v6} IPv6; {} on the way in, {} on the way out; {}), the first after {first} ms, the last after {} ms",
                losses.len(),
                window.sent,
                losses.len() - v6,
                count(Direction::Ingress),
                count(Direction::Egress),
                of_targets.join(", "),
                ingress.max(egress)
            ));
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::continuous::{Break, Loss};

    fn loss(begin: Instant, after_ms: u64, target: &str, direction: Direction) -> Loss {
        Loss { sent: begin + Duration::from_millis(after_ms), flow: 1, target: Some(target.into()), direction }
    }

    #[test]
    fn losses_of_the_closed_target_are_its_own_and_others_fail() {
        let begin = Instant::now();
        let broken = |target: &str, after: Option<&str>| Break {
            at: begin,
            target: target.into(),
            after: after.map(str::to_owned),
            how: "reset".into(),
        };
        let window = Window {
            sent: 100,
            losses: vec![loss(begin, 5, "target-4", Direction::Ingress)],
            breaks: vec![broken("target-4", Some("target-1"))],
            ..Window::default()
        };
        let rules = Rules { closed: Some("target-4".into()), ..Rules::default() };
        let mut event = Event::default();
        tally(&window, begin, &rules, &mut event);
        assert_eq!((event.lost, event.own_lost, event.moved, event.failures.len()), (0, 1, 1, 0));
        let window = Window {
            losses: vec![loss(begin, 5, "target-1", Direction::Egress)],
            breaks: vec![broken("target-2", None)],
            ..window
        };
        let mut event = Event::default();
        tally(&window, begin, &rules, &mut event);
        assert_eq!((event.lost, event.moved, event.failures.len(), event.egress_recovered_ms), (2, 0, 2, 6));
    }

    #[test]
    fn a_failover_may_lose_packets_for_a_limited_time() {
        let begin = Instant::now();
        let window = Window {
            sent: 9,
            losses: vec![loss(begin, 150, "a", Direction::Ingress), loss(begin, 250, "a", Direction::Egress)],
            ..Window::default()
        };
        let mut event = Event::default();
        tally(&window, begin, &Rules { within: Some(Duration::from_millis(300)), ..Rules::default() }, &mut event);
        assert_eq!(
            (event.lost, event.recovered_ms, event.ingress_recovered_ms, event.failures.len()),
            (2, 251, 151, 0)
        );
        tally(&window, begin, &Rules { within: Some(Duration::from_millis(200)), ..Rules::default() }, &mut event);
        assert_eq!(event.failures.len(), 1);
    }
}
