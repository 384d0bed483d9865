//! Probing the load balancers: a next hop that does not answer takes replies with it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use nsm_kernel::Netns;
use nsm_kernel::ping::{self, Pinger};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::inputs::{Inputs, Shared};
use crate::mesh::FORGET;

/// How often a target is asked before it counts as dead, and how long each answer may take.
const QUESTIONS: u32 = 3;
const ANSWER: Duration = Duration::from_secs(1);

/// How an address is judged from its probes in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Judgement {
    missed: u32,
    answered: bool,
}

impl Judgement {
    /// Takes an answer (or none) note; `Some` says what the address now is: answering or silent.
    fn note(&mut self, answer: bool, misses: u32) -> Option<bool> {
        if answer {
            self.missed = 0;
            self.answered = true;
            return Some(true);
        }
        self.missed = self.missed.saturating_add(1);
        (self.missed >= misses).then_some(false)
    }
}

/// Probes every address of the inputs each `interval` until `stop`. One task an address, so that a dead one delays no other.
pub(crate) async fn run(shared: Shared, interval: Duration, misses: u32, stop: CancellationToken) {
    let mut inputs = shared.subscribe();
    let mut pingers = Pingers::default();
    let mut tasks: BTreeMap<IpAddr, JoinHandle<()>> = BTreeMap::new();
    loop {
        let wanted = inputs.borrow_and_update().probed();
        tasks.retain(|address, task| {
            let keep = wanted.contains(address);
            if !keep {
                task.abort();
            }
            keep
        });
        for address in wanted {
            let Some(pinger) = pingers.of(address).await else { continue };
            tasks
                .entry(address)
                .or_insert_with(|| tokio::spawn(probe(shared.clone(), pinger, address, interval, misses)));
        }
        shared.change(|inputs| {
            let known = inputs.probed();
            inputs.silent.retain(|address| known.contains(address));
            inputs.answering.retain(|address| known.contains(address));
        });
        tokio::select! {
            () = stop.cancelled() => break,
            changed = inputs.changed() => if changed.is_err() { break },
        }
    }
    for task in tasks.into_values() {
        task.abort();
    }
}

/// Whether somebody is there.
#[async_trait::async_trait]
pub(crate) trait Answers: Send + Sync + 'static {
    /// Whether `address` answers.
    async fn answers(&self, address: IpAddr) -> bool;
}

/// Asks a target, when there is reason to, through the bridge.
#[derive(Default)]
pub(crate) struct Asker(tokio::sync::Mutex<Pingers>);

#[async_trait::async_trait]
impl Answers for Asker {
    async fn answers(&self, address: IpAddr) -> bool {
        // Who cannot be asked is not dead for that.
        let Some(pinger) = self.0.lock().await.of(address).await else { return true };
        for _ in 0..QUESTIONS {
            if pinger.probe(address, ANSWER).await {
                return true;
            }
        }
        false
    }
}

/// One socket a family, opened when it is first needed.
#[derive(Default)]
struct Pingers {
    v4: Option<Arc<Pinger>>,
    v6: Option<Arc<Pinger>>,
}

impl Pingers {
    async fn of(&mut self, address: IpAddr) -> Option<Arc<Pinger>> {
        let place = if address.is_ipv6() { &mut self.v6 } else { &mut self.v4 };
        if place.is_none() {
            let netns = Netns::current().ok()?;
            // Ports have addresses of the bridge's network too, and must not be chosen.
            let from = ping::From { device: Some(crate::bridge::BRIDGE.to_owned()), source: None };
            match Pinger::open_from(&netns, address.is_ipv6(), from).await {
                Ok(pinger) => *place = Some(Arc::new(pinger)),
                Err(error) => tracing::error!(%error, "addresses cannot be probed"),
            }
        }
        place.clone()
    }
}

async fn probe(shared: Shared, pinger: Arc<Pinger>, address: IpAddr, interval: Duration, misses: u32) {
    let mut judgement = Judgement::default();
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let answer = pinger.probe(address, interval).await;
        let Some(answering) = judgement.note(answer, misses) else { continue };
        if interval * judgement.missed >= FORGET {
            // Nobody has vouched for it by name in all this time either.
            shared.change(|inputs| _ = inputs.inherited.remove(&address));
        }
        let known = |inputs: &Inputs| {
            inputs.answering.contains(&address) == answering && inputs.silent.contains(&address) != answering
        };
        if shared.look(known) {
            continue;
        }
        tracing::info!(load_balancer = %address, answering, "probe");
        shared.change(|inputs| inputs.judge(address, answering));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_misses_in_a_row_make_it_silent_and_one_answer_brings_it_back() {
        let mut judgement = Judgement::default();
        assert_eq!(judgement.note(true, 3), Some(true));
        assert_eq!(judgement.note(false, 3), None);
        assert_eq!(judgement.note(false, 3), None);
        assert_eq!(judgement.note(true, 3), Some(true));
        assert_eq!([false, false, false].map(|answer| judgement.note(answer, 3)), [None, None, Some(false)]);
        assert_eq!(judgement.note(true, 3), Some(true));
    }

    /// A target is found through the bridge, although the main route to it leads elsewhere.
    #[test]
    fn a_target_answers_through_the_bridge_or_not_at_all() {
        use nsm_kernel::netlink::{LinkChange, VethEnd, mac_from_seed};
        async fn asked(netns: Netns) -> [bool; 2] {
            let (netlink, far) = (netns.netlink().await.unwrap(), Netns::anonymous().unwrap());
            let bridge = crate::bridge::BRIDGE;
            let end = |netns: &Netns, name: &str| VethEnd {
                netns: netns.clone(),
                name: name.into(),
                mac: mac_from_seed(name),
            };
            netlink.bridge_create(bridge, mac_from_seed(bridge)).await.unwrap();
            netlink.veth_create(&end(&netns, "port"), &end(&far, "nsm-0"), None).await.unwrap();
            let index = async |netns: &Netns, name| {
                netns.netlink().await.unwrap().link_by_name(name).await.unwrap().unwrap().index
            };
            let (bridge, port, target) =
                (index(&netns, bridge).await, index(&netns, "port").await, index(&far, "nsm-0").await);
            let attach = LinkChange { up: Some(true), master: Some(bridge), ..LinkChange::default() };
            // A port has an address of the same network, and its route is the older one.
            netlink.link_change(port, &attach).await.unwrap();
            netlink.address_replace(port, "172.16.1.7/24".parse().unwrap()).await.unwrap();
            netlink.link_up(bridge).await.unwrap();
            netlink.address_replace(bridge, "172.16.1.1/24".parse().unwrap()).await.unwrap();
            far.netlink().await.unwrap().link_up(target).await.unwrap();
            far.netlink().await.unwrap().address_replace(target, "172.16.1.6/24".parse().unwrap()).await.unwrap();
            let asker = Asker::default();
            let answers = async |address: &str| asker.answers(address.parse().unwrap()).await;
            [answers("172.16.1.6").await, answers("172.16.1.9").await]
        }
        let netns = Netns::anonymous().unwrap();
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let inside = || runtime().block_on(asked(Netns::current().unwrap()));
        assert_eq!(netns.run_blocking(inside).unwrap(), [true, false]);
    }
}
