//! The loop that keeps the engine in step with what is known.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::Context;
use meridio_common::{Backoff, Health};
use meridio_maglev::{Engine, Error, Options};
use nsm_kernel::{Netns, error::ignore_missing};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::availability::Availability;
use crate::desired::{Desired, desired};
use crate::inputs::{Inputs, Shared};
use crate::routing::{self, Wanted};
use crate::settings::Settings;

/// Numbers that marks and tables of targets can have, from the offset's start on.
const TABLES: u32 = 32_768;
/// How long targets out of reach may hold back a load balancer that has just started.
const COMPLETE_WITHIN: Duration = Duration::from_secs(10);

/// The engine and what surrounds it.
pub(crate) struct Dataplane {
    engine: Option<Engine>,
    netns: Netns,
    settings: Settings,
    health: Health,
    availability: Availability,
    /// Interface that the programs are attached to.
    attached: Option<u32>,
    /// The last desired state that was applied, and faults of the last one that was not.
    applied: Option<Desired>,
    gate: Gate,
}

impl Dataplane {
    /// Loads the programs and adopts what an earlier process has left; that forwards on meanwhile.
    ///
    /// # Errors
    /// No BPF file system, no rights, a kernel that refuses.
    pub(crate) fn open(
        settings: &Settings,
        netns: Netns,
        health: Health,
        availability: Availability,
    ) -> anyhow::Result<Self> {
        let maglev = meridio_maglev::Settings {
            kernel: Options::new(&settings.bpf_dir),
            offset_start: settings.identifier_offset_start,
        };
        let engine = Engine::open(maglev).context("load balancer in the kernel")?;
        if engine.adopted() {
            availability.set(forwarding(&engine));
        }
        let settings = settings.clone();
        let gate = Gate { open: engine.adopted(), since: None };
        Ok(Dataplane {
            engine: Some(engine),
            netns,
            settings,
            health,
            availability,
            attached: None,
            applied: None,
            gate,
        })
    }

    /// Follows the inputs until `stop`. The kernel goes on forwarding afterwards.
    pub(crate) async fn run(mut self, shared: Shared, stop: CancellationToken) {
        let mut inputs = shared.subscribe();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let now = inputs.borrow_and_update().clone();
            let done = self.step(&now).await;
            let wait = async {
                if done {
                    backoff.reset();
                    let _ = inputs.changed().await;
                } else {
                    changed_or_later(&mut inputs, &mut backoff).await;
                }
            };
            tokio::select! {
                () = stop.cancelled() => break,
                () = wait => {}
            }
        }
        self.availability.set(false);
    }

    /// One round; `false`: try again although nothing has changed.
    async fn step(&mut self, inputs: &Inputs) -> bool {
        let adopted = self.engine.as_ref().is_some_and(Engine::adopted);
        let mut done = true;
        if adopted {
            done &= self.attach(inputs.external).await;
        }
        let Some(desired) = desired(inputs) else {
            self.waiting(inputs);
            return done;
        };
        let configured = self.configure(&desired).await;
        // Maps without a configuration would let packets for VIPs pass to the stack: attach afterwards.
        if configured || adopted {
            done &= self.attach(inputs.external).await;
        }
        done &= self.route(&desired).await;
        done &= self.announce(&desired);
        self.report(&desired);
        done && configured
    }

    fn waiting(&self, inputs: &Inputs) {
        let missing = [
            ("VIPs", inputs.vips.is_none()),
            ("the conduit", inputs.conduits.is_none()),
            ("streams", inputs.streams.is_none()),
            ("flows", inputs.flows.is_none()),
            ("targets", inputs.targets.is_none()),
            ("interfaces", inputs.subnets.is_none()),
        ];
        let missing: Vec<&str> = missing.iter().filter(|(_, missing)| *missing).map(|(name, _)| *name).collect();
        self.health.waiting("Configuration", &missing.join(", "), "is the NSP running?");
    }

    /// Takes the desired state into the engine; `false`: it could not, and what was before forwards on.
    async fn configure(&mut self, desired: &Desired) -> bool {
        if self.applied.as_ref() == Some(desired) {
            return true;
        }
        self.forget_neighbours(desired).await;
        let Some(mut engine) = self.engine.take() else { return false };
        let wanted = desired.clone();
        let work = tokio::task::spawn_blocking(move || {
            let started = std::time::Instant::now();
            let result = apply(&mut engine, &wanted);
            (engine, result, started.elapsed())
        });
        let (engine, result, took) = match work.await {
            Ok(done) => done,
            Err(error) => {
                tracing::error!(%error, "engine lost");
                self.health.waiting("Configuration", "the engine, which has failed", "restart the load balancer");
                return false;
            }
        };
        self.engine = Some(engine);
        match result {
            Ok(()) => {
                let ready: usize = desired.targets.values().map(|t| t.len()).sum();
                tracing::info!(
                    flows = desired.config.flows.len(),
                    ready,
                    took_us = took.as_micros() as u64,
                    "tables in use"
                );
                self.applied = Some(desired.clone());
                self.health.serving("Configuration");
                true
            }
            Err(faults) => {
                let configured = self.engine.as_ref().is_some_and(Engine::configured);
                let kept = if configured { "the last good one forwards on" } else { "nothing is forwarded" };
                for fault in &faults {
                    tracing::error!(fault, kept, "configuration refused");
                }
                self.health.waiting(
                    "Configuration",
                    &format!("a configuration without faults; {kept}"),
                    &faults.join("; "),
                );
                // Trying the same again helps only against the kernel's faults, not against the configuration's.
                if desired.faults.is_empty() {
                    return false;
                }
                self.applied = Some(desired.clone());
                true
            }
        }
    }

    /// Targets that are new get no neighbour entry of a predecessor with their address.
    async fn forget_neighbours(&self, desired: &Desired) {
        let known = self.applied.as_ref().map(hops).unwrap_or_default();
        let Some(applied) = &self.applied else { return };
        let new: Vec<(u32, IpAddr)> = hops(desired).difference(&known).copied().collect();
        if new.is_empty() || applied.config.streams.is_empty() {
            return;
        }
        let Ok(netlink) = self.netns.netlink().await else { return };
        for (index, ip) in new {
            if let Err(error) = ignore_missing(netlink.neighbour_delete(index, ip).await) {
                tracing::debug!(%ip, %error, "neighbour entry stays");
            }
        }
    }

    /// Tells the frontend whether this load balancer can forward; `false`: look again soon.
    fn announce(&mut self, desired: &Desired) -> bool {
        let Some(engine) = &self.engine else { return false };
        let forwarding = forwarding(engine);
        let open = self.gate.look(forwarding, desired.missing, Instant::now());
        self.availability.set(forwarding && open);
        open || !forwarding
    }

    /// Attaches the programs to the external interface whenever it is a new one.
    async fn attach(&mut self, external: Option<u32>) -> bool {
        let name = self.settings.external_interface.clone();
        let Some(index) = external else {
            self.attached = None;
            self.health.waiting(
                "DataPlane",
                &format!("interface {name}"),
                "is the external network attached to this pod?",
            );
            return true;
        };
        if self.attached == Some(index) {
            return true;
        }
        let Some(mut engine) = self.engine.take() else { return false };
        let interface = name.clone();
        let work = tokio::task::spawn_blocking(move || {
            let result = engine.attach(&interface);
            (engine, result)
        });
        let Ok((engine, result)) = work.await else { return false };
        self.engine = Some(engine);
        match result {
            Ok(()) => {
                tracing::info!(interface = name, index, "attached");
                self.attached = Some(index);
                self.health.serving("DataPlane");
                true
            }
            Err(error) => {
                tracing::error!(%error, "not attached");
                self.health.waiting("DataPlane", &error.to_string(), "see the log");
                false
            }
        }
    }

    /// Rules and routes of the slow path.
    async fn route(&mut self, desired: &Desired) -> bool {
        let Some(engine) = &self.engine else { return false };
        let mut wanted = Wanted::new();
        for (stream, targets) in &desired.targets {
            let Some(offset) = engine.offset(stream) else { continue };
            for (identifier, target) in targets {
                if let Some((ip, index)) = target.v4 {
                    wanted.insert((false, offset + identifier), (ip.into(), index));
                }
                if let Some((ip, index)) = target.v6 {
                    wanted.insert((true, offset + identifier), (ip.into(), index));
                }
            }
        }
        let start = self.settings.identifier_offset_start;
        match routing::apply(&self.netns, &wanted, &desired.config.vips, start..start + TABLES).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "slow path incomplete");
                false
            }
        }
    }

    fn report(&self, desired: &Desired) {
        let waits = |name: &str, there: bool, what: &str| {
            if there { self.health.serving(name) } else { self.health.waiting(name, what, "is one configured?") }
        };
        waits("Stream", !desired.config.streams.is_empty(), "a stream");
        waits("Flow", !desired.config.flows.is_empty(), "a flow");
        self.health.note("Targets", desired.notes.clone());
    }
}

/// A load balancer that has just started attracts traffic when it reaches all targets, not the first one: what belongs to the
/// others would be sent to the wrong ones. A target that stays out of reach holds it back for a while only.
#[derive(Debug)]
struct Gate {
    open: bool,
    since: Option<Instant>,
}

impl Gate {
    fn look(&mut self, forwarding: bool, missing: usize, now: Instant) -> bool {
        if forwarding && !self.open {
            let since = *self.since.get_or_insert(now);
            self.open = missing == 0 || now.duration_since(since) >= COMPLETE_WITHIN;
        }
        self.open
    }
}

/// Interface and address of each next hop.
fn hops(desired: &Desired) -> BTreeSet<(u32, IpAddr)> {
    let targets = desired.targets.values().flat_map(|t| t.values());
    targets
        .flat_map(|t| [t.v4.map(|(ip, index)| (index, ip.into())), t.v6.map(|(ip, index)| (index, ip.into()))])
        .flatten()
        .collect()
}

fn forwarding(engine: &Engine) -> bool {
    engine.streams().iter().any(|s| engine.targets(s).is_some_and(|t| !t.is_empty()))
}

/// With a faultless configuration everything, else the targets of the streams that are in use.
fn apply(engine: &mut Engine, desired: &Desired) -> Result<(), Vec<String>> {
    let lines = |errors: Vec<Error>| errors.iter().map(ToString::to_string).collect::<Vec<_>>();
    if desired.faults.is_empty() || !engine.configured() && desired.config.faults().is_empty() {
        engine.apply(&desired.config, &desired.targets).map_err(lines)?;
    } else {
        for stream in engine.streams() {
            let ready = desired.targets.get(&stream).cloned().unwrap_or_default();
            engine.set_targets(&stream, &ready).map_err(|e| lines(vec![e]))?;
        }
    }
    if desired.faults.is_empty() { Ok(()) } else { Err(desired.faults.clone()) }
}

async fn changed_or_later(inputs: &mut watch::Receiver<Inputs>, backoff: &mut Backoff) {
    tokio::select! {
        _ = inputs.changed() => {}
        () = backoff.wait() => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_fresh_load_balancer_waits_for_all_targets_but_not_for_ever() {
        let now = Instant::now();
        let mut gate = Gate { open: false, since: None };
        assert!(!gate.look(false, 0, now), "nothing to forward to");
        assert!(!gate.look(true, 2, now) && gate.look(true, 0, now), "all there");
        assert!(gate.look(true, 1, now), "a target that is lost later closes nothing");
        let mut gate = Gate { open: false, since: None };
        assert!(!gate.look(true, 1, now) && gate.look(true, 1, now + COMPLETE_WITHIN));
    }
}
