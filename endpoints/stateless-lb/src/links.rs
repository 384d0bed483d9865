//! What the kernel tells: NSM interfaces with their subnets, the external interface, and targets that do not answer on
//! their link.

mod interfaces;
mod suspects;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use futures_util::future::{Fuse, FusedFuture as _, FutureExt as _};
use nsm_kernel::Netns;
use nsm_kernel::monitor::{Event, Monitor, Topic};
use nsm_kernel::netlink::NeighbourState;
use nsm_kernel::ping::Pinger;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::suspects::Suspects;
use crate::inputs::Shared;

/// Events come in bursts; this is the time to let one pass.
const SETTLE: Duration = Duration::from_millis(5);
/// What no event told is seen after this time at the latest.
const RESCAN: Duration = Duration::from_secs(10);
/// A neighbour entry that is deleted is reported as failed just before; a failure counts once it has lasted this long.
const CONFIRM: Duration = Duration::from_millis(30);
/// How often targets that do not answer are asked again, and for how long each.
const PROBE: Duration = Duration::from_millis(500);
/// Follows the kernel until `stop`.
pub(crate) async fn run(netns: Netns, prefix: String, external: String, shared: Shared, stop: CancellationToken) {
    let following = async {
        loop {
            match Monitor::open(&netns, &[Topic::Links, Topic::Routes, Topic::Neighbours]).await {
                Ok(monitor) => {
                    let links = Links {
                        netns: netns.clone(),
                        prefix: prefix.clone(),
                        external: external.clone(),
                        shared: shared.clone(),
                    };
                    links.follow(monitor).await;
                }
                Err(error) => tracing::warn!(%error, "kernel events cannot be followed"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = following => {}
    }
}

struct Links {
    netns: Netns,
    prefix: String,
    external: String,
    shared: Shared,
}

impl Links {
    async fn follow(&self, mut monitor: Monitor) {
        let mut suspects = Suspects::default();
        let mut rescan = tokio::time::interval(RESCAN);
        let mut probe = tokio::time::interval(PROBE);
        probe.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut due: Option<Instant> = None;
        let mut doubted: BTreeMap<IpAddr, Instant> = BTreeMap::new();
        // Beside the events: who is silent takes all of the time there is, and others may fail meanwhile.
        let mut asking = std::pin::pin!(Fuse::terminated());
        loop {
            let settle = at(due);
            let confirm = at(doubted.values().min().copied());
            tokio::select! {
                event = monitor.next() => match event {
                    Event::Neighbour(n) if n.state == NeighbourState::Failed => {
                        if self.is_target(n.ip) {
                            doubted.entry(n.ip).or_insert_with(|| Instant::now() + CONFIRM);
                        }
                    }
                    Event::Neighbour(n) if n.state == NeighbourState::Reachable => {
                        doubted.remove(&n.ip);
                        suspects.answer(n.ip);
                        self.back(&mut suspects);
                    }
                    Event::NeighbourGone(n) => _ = doubted.remove(&n.ip),
                    Event::Neighbour(_) => {}
                    _ => due = due.or(Some(Instant::now() + SETTLE)),
                },
                () = settle => {
                    due = None;
                    self.scan().await;
                }
                () = confirm => {
                    let now = Instant::now();
                    let failed: Vec<IpAddr> = doubted.extract_if(.., |_, at| *at <= now).map(|(ip, _)| ip).collect();
                    for ip in failed {
                        if suspects.fail(ip, now) {
                            tracing::warn!(%ip, "target does not answer on its link: out of the tables");
                        }
                    }
                    self.publish(&suspects);
                }
                () = at(suspects.next()) => self.back(&mut suspects),
                _ = rescan.tick() => self.scan().await,
                _ = probe.tick(), if suspects.any() && asking.is_terminated() => {
                    suspects.retain(|ip| self.is_target(ip));
                    self.publish(&suspects);
                    asking.set(self.probe(suspects.out()).fuse());
                }
                answers = &mut asking, if !asking.is_terminated() => {
                    for ip in answers {
                        suspects.answer(ip);
                    }
                    self.publish(&suspects);
                    self.back(&mut suspects);
                }
            }
        }
    }

    fn is_target(&self, ip: IpAddr) -> bool {
        let inputs = self.shared.get();
        let text = ip.to_string();
        let ours = |t: &str| t == text || t.split('/').next() == Some(text.as_str());
        inputs.targets.iter().flatten().any(|t| t.ips.iter().any(|i| ours(i)))
    }

    /// Lets those in whose time is over.
    fn back(&self, suspects: &mut Suspects) {
        let back = suspects.back(Instant::now());
        for ip in &back {
            tracing::info!(%ip, "target answers on its link again");
        }
        if !back.is_empty() {
            self.publish(suspects);
        }
    }

    fn publish(&self, suspects: &Suspects) {
        let out: BTreeSet<IpAddr> = suspects.out().into_iter().collect();
        self.shared.change(|inputs| inputs.unreachable = out);
    }

    /// Asks each address once; asking makes the kernel resolve it anew, which is what counts.
    async fn probe(&self, addresses: Vec<IpAddr>) -> Vec<IpAddr> {
        let asking = addresses.into_iter().map(|ip| async move {
            let pinger = Pinger::open(&self.netns, ip.is_ipv6(), None).await.ok()?;
            pinger.probe(ip, PROBE * 4 / 5).await.then_some(ip)
        });
        futures_util::future::join_all(asking).await.into_iter().flatten().collect()
    }

    async fn scan(&self) {
        let read = async {
            let netlink = self.netns.netlink().await?;
            interfaces::read(netlink, &self.prefix, &self.external).await
        };
        match read.await {
            Ok(read) => self.shared.change(|inputs| {
                inputs.subnets = Some(read.subnets);
                inputs.unusable = read.unusable;
                inputs.external = read.external;
            }),
            Err(error) => tracing::warn!(%error, "interfaces cannot be read"),
        }
    }
}

/// Waits until `time`; for ever if there is none.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
