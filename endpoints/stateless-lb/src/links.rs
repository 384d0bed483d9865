//! What the kernel tells: NSM interfaces with their subnets, the external interface, and targets that do not answer on
//! their link.

mod asking;
mod interfaces;
mod neighbours;
mod suspects;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::future::{Fuse, FusedFuture as _, FutureExt as _};
use nsm_kernel::Netns;
use nsm_kernel::monitor::{Event, Monitor, Topic};
use nsm_kernel::netlink::{Neighbour, Netlink};
use nsm_kernel::ping::Pinger;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::asking::answering;
use self::neighbours::{CONFIRM, Neighbours};
use crate::inputs::{Inputs, Shared};

/// Events come in bursts; this is the time to let one pass.
const SETTLE: Duration = Duration::from_millis(5);
/// What no event told is seen after this time at the latest.
const RESCAN: Duration = Duration::from_secs(10);
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
        let mut known = Neighbours::default();
        let mut inputs = self.shared.subscribe();
        inputs.mark_changed();
        // The kernel remembers who did not answer an earlier process.
        let mut unread = true;
        let mut rescan = tokio::time::interval(RESCAN);
        let mut probe = tokio::time::interval(PROBE);
        probe.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut due: Option<Instant> = None;
        // Beside the events: who is silent takes all of the time there is, and others may fail meanwhile.
        let mut asking = std::pin::pin!(Fuse::terminated());
        loop {
            let (settle, confirm, back) = (at(due), at(known.doubt()), at(known.next()));
            tokio::select! {
                event = monitor.next() => {
                    self.renew(&mut inputs, &mut known);
                    match event {
                        Event::Neighbour(n) => self.told(&n, &mut known),
                        Event::NeighbourGone(n) => known.gone(n.ip),
                        other => {
                            unread |= other == Event::Resync;
                            due = due.or(Some(Instant::now() + SETTLE));
                        }
                    }
                }
                () = settle => {
                    due = None;
                    self.renew(&mut inputs, &mut known);
                    self.scan(&mut known, &mut unread).await;
                }
                _ = rescan.tick() => {
                    self.renew(&mut inputs, &mut known);
                    self.scan(&mut known, &mut unread).await;
                }
                () = confirm => {
                    self.renew(&mut inputs, &mut known);
                    for ip in known.confirm(Instant::now()) {
                        tracing::warn!(%ip, "target does not answer on its link: out of the tables");
                    }
                    self.publish(&known);
                }
                () = back => self.back(&mut known),
                _ = probe.tick(), if known.any_out() && asking.is_terminated() => {
                    self.renew(&mut inputs, &mut known);
                    let open = |v6| Pinger::open(&self.netns, v6, None);
                    asking.set(answering(known.to_ask(), PROBE * 4 / 5, open).fuse());
                }
                answers = &mut asking, if !asking.is_terminated() => {
                    answers.into_iter().for_each(|ip| known.answer(ip));
                    self.back(&mut known);
                }
            }
        }
    }

    /// Who the targets are is looked up as often as it may have changed, not as often as somebody fails.
    fn renew(&self, inputs: &mut watch::Receiver<Inputs>, known: &mut Neighbours) {
        if inputs.has_changed().unwrap_or(false) {
            known.targets(inputs.borrow_and_update().targets.as_deref());
            self.publish(known);
        }
    }

    fn told(&self, neighbour: &Neighbour, known: &mut Neighbours) {
        if known.told(neighbour, Instant::now()) {
            tracing::info!(ip = %neighbour.ip, "target has another link-layer address");
            self.publish(known);
        }
        self.back(known);
    }

    /// Lets those in whose time is over.
    fn back(&self, known: &mut Neighbours) {
        let back = known.back(Instant::now());
        for ip in &back {
            tracing::info!(%ip, "target answers on its link again");
        }
        if !back.is_empty() {
            self.publish(known);
        }
    }

    fn publish(&self, known: &Neighbours) {
        let out: BTreeSet<IpAddr> = known.out().into_iter().collect();
        let changes = known.mac_changes();
        if self.shared.look(|inputs| inputs.unreachable != out || inputs.mac_changes != *changes) {
            self.shared.change(|inputs| (inputs.unreachable, inputs.mac_changes) = (out, changes.clone()));
        }
    }

    async fn scan(&self, known: &mut Neighbours, unread: &mut bool) {
        let read = async {
            let netlink = self.netns.netlink().await?;
            let interfaces = interfaces::read(netlink, &self.prefix, &self.external).await?;
            Ok::<_, nsm_kernel::Error>((netlink, interfaces))
        };
        let (netlink, interfaces) = match read.await {
            Ok(read) => read,
            Err(error) => return tracing::warn!(%error, "interfaces cannot be read"),
        };
        known.interfaces(&interfaces.nsm);
        if *unread {
            match self.recall(netlink, &interfaces.nsm, known).await {
                Ok(()) => *unread = false,
                Err(error) => tracing::warn!(%error, "neighbours cannot be read"),
            }
            self.publish(known);
        }
        self.shared.change(|inputs| {
            inputs.subnets = Some(interfaces.subnets);
            inputs.unusable = interfaces.unusable;
            inputs.external = interfaces.external;
        });
    }

    /// Takes in what the kernel knows of the neighbours. Before the first word about interfaces, who is silent is out at once: an
    /// earlier process has seen to that, or would have.
    async fn recall(
        &self,
        netlink: &Netlink,
        interfaces: &BTreeSet<u32>,
        known: &mut Neighbours,
    ) -> Result<(), nsm_kernel::Error> {
        let read = async || {
            let mut neighbours = netlink.neighbours(None).await?;
            neighbours.retain(|n| interfaces.contains(&n.index));
            Ok::<_, nsm_kernel::Error>(neighbours)
        };
        let silent = known.read(&read().await?, Instant::now());
        if silent.is_empty() || self.shared.look(|inputs| inputs.subnets.is_some()) {
            return Ok(());
        }
        // Not who is asked for just now and answers.
        tokio::time::sleep(CONFIRM).await;
        let still = known.read(&read().await?, Instant::now());
        for ip in silent.intersection(&still) {
            if known.silent(*ip, Instant::now()) {
                tracing::warn!(%ip, "does not answer on its link since before the start: not in the tables");
            }
        }
        Ok(())
    }
}

/// Waits until `time`; for ever if there is none.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
