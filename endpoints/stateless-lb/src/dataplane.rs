//! The loop that keeps the engine in step with what is known.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use meridio_common::{Backoff, Health};
use meridio_maglev::{Engine, Options};
use nsm_kernel::{Netns, error::ignore_missing};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::apply::{self, Outcome};
use crate::availability::Availability;
use crate::desired::{Desired, Ready, desired, ready};
use crate::inputs::{Inputs, Shared};
use crate::routing::{self, Guarded, Wanted};
use crate::settings::Settings;

/// How long targets out of reach may hold back a load balancer that has just started.
const COMPLETE_WITHIN: Duration = Duration::from_secs(10);
/// How often is looked whether everything is still attached.
const VERIFY: Duration = Duration::from_secs(1);

/// What the engine was told, and what it made of it.
struct Round {
    desired: Desired,
    outcome: Outcome,
}

/// The engine and what surrounds it.
pub(crate) struct Dataplane {
    engine: Option<Engine>,
    /// Why the kernel refused the engine the last time.
    refused: Option<String>,
    netns: Netns,
    settings: Settings,
    health: Health,
    availability: Availability,
    /// Interface that the programs are attached to.
    attached: Option<u32>,
    /// The last round with the engine.
    last: Option<Round>,
    gate: Gate,
    /// Whether an earlier process has left targets in the tables; `None`: not known yet.
    kept: Option<bool>,
    /// How often something that was attached had to be attached again.
    restored: u64,
}

impl Dataplane {
    /// What is to follow the inputs; the kernel is asked for nothing yet.
    pub(crate) fn new(settings: &Settings, netns: Netns, health: Health, availability: Availability) -> Self {
        Dataplane {
            engine: None,
            refused: None,
            netns,
            settings: settings.clone(),
            health,
            availability,
            attached: None,
            last: None,
            gate: Gate { open: false, since: None },
            kept: None,
            restored: 0,
        }
    }

    /// Loads the programs and adopts what an earlier process has left, which forwards on meanwhile; `false`: the kernel
    /// refuses, for whatever reason, and readiness says which.
    async fn open(&mut self) -> bool {
        if self.engine.is_some() {
            return true;
        }
        let (base, offset_start) = (self.settings.bpf_dir.clone(), self.settings.identifier_offset_start);
        let (chunks, interface) = (self.settings.table_chunks, self.settings.external_interface.clone());
        let open = move || {
            let kernel = Options { chunks, ..Options::new(meridio_maglev::own_directory(&base)?) };
            let engine = Engine::open(meridio_maglev::Settings { kernel, offset_start })?;
            // By maps of another version, too.
            let forwards = engine.adopted() || Engine::attached(&interface)?;
            Ok::<_, meridio_maglev::Error>((engine, forwards))
        };
        let opened = tokio::task::spawn_blocking(open).await;
        let reason = match opened {
            Ok(Ok((engine, forwards))) => {
                if engine.adopted() {
                    self.availability.set(forwarding(&engine));
                }
                self.note_chunks(engine.chunks());
                self.kept = Some(engine.adopted() && forwarding(&engine));
                // What an earlier process forwards need not be taken away until all targets are there again.
                self.gate.open = forwards;
                self.refused = None;
                self.health.waiting("DataPlane", "a configuration to attach with", "is the NSP running?");
                self.engine = Some(engine);
                return true;
            }
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        };
        let kept = "what an earlier process has attached forwards on";
        self.health.waiting(
            "DataPlane",
            &format!("the kernel: {reason}; {kept}"),
            "see deploy/README.md for what it needs",
        );
        if self.refused.as_ref() != Some(&reason) {
            tracing::error!(reason, kept, "no load balancer in the kernel");
            self.refused = Some(reason);
        }
        false
    }

    /// Follows the inputs until `stop`. The kernel goes on forwarding afterwards.
    pub(crate) async fn run(mut self, shared: Shared, stop: CancellationToken) {
        let mut inputs = shared.subscribe();
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        loop {
            let now = inputs.borrow_and_update().clone();
            let done = self.step(&now).await;
            shared.change(|inputs| inputs.kept = self.kept);
            let mut wait = std::pin::pin!(async {
                if done {
                    backoff.reset();
                    let _ = inputs.changed().await;
                } else {
                    changed_or_later(&mut inputs, &mut backoff).await;
                }
            });
            loop {
                tokio::select! {
                    () = stop.cancelled() => return self.availability.set(false),
                    () = &mut wait => break,
                    () = tokio::time::sleep(VERIFY), if self.attached.is_some() => {
                        if !self.verify().await {
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Looks whether what was attached is still there; `false`: it was not, and another round is needed.
    pub(crate) async fn verify(&mut self) -> bool {
        let Some(mut engine) = self.engine.take() else { return false };
        let interface = self.settings.external_interface.clone();
        let work = tokio::task::spawn_blocking(move || {
            let before = engine.detour();
            engine.tend();
            let missing = engine.missing(&interface);
            let moved = engine.detour() != before;
            (engine, missing, moved)
        });
        let Ok((engine, missing, moved)) = work.await else { return false };
        self.engine = Some(engine);
        // Also if it has ended by itself and it is not time yet to make another.
        self.note_detour();
        match missing {
            Ok(missing) if missing.is_empty() => !moved,
            Ok(missing) => {
                self.restored += 1;
                self.attached = None;
                let (interface, missing) = (&self.settings.external_interface, missing.join(", "));
                tracing::error!(interface, missing, times = self.restored, "taken away by somebody; attached again");
                let times = self.restored;
                let line =
                    format!("somebody takes programs off interface {interface}: {missing}; {times} times so far");
                self.health.note("Attachment", vec![line]);
                false
            }
            Err(error) => {
                tracing::warn!(%error, "not known whether everything is attached");
                !moved
            }
        }
    }

    /// Maps of an earlier process keep the size that they have.
    fn note_chunks(&self, chunks: u32) {
        let wanted = self.settings.table_chunks;
        let line = || {
            format!(
                "the tables in use have {chunks} chunks, not {wanted} (NSM_TABLE_CHUNKS): they are made anew after stateless-lb --remove"
            )
        };
        self.health.note("Tables", (chunks != wanted).then(line).into_iter().collect());
    }

    fn note_detour(&self) {
        let fault = self.engine.as_ref().and_then(|engine| engine.detour().err());
        let line = |fault| format!("fragments that arrive before their first one are dropped: {fault}");
        self.health.note("Detour", fault.map(line).into_iter().collect());
    }

    /// One round; `false`: try again although nothing has changed.
    pub(crate) async fn step(&mut self, inputs: &Inputs) -> bool {
        if !self.open().await {
            return false;
        }
        let adopted = self.engine.as_ref().is_some_and(Engine::adopted);
        let mut done = true;
        if adopted {
            done &= self.attach(inputs.external).await;
        }
        let Some(desired) = desired(inputs, &self.settings.sctp_ports_only) else {
            self.waiting(inputs);
            return done;
        };
        done &= self.configure(&desired, inputs).await;
        let outcome = self.last.as_ref().map(|last| last.outcome.clone());
        // Before the first packet is marked: without its rules it would go wherever this pod's default route leads.
        if let Some(outcome) = &outcome {
            done &= self.route(&desired, outcome).await;
        }
        // Maps without a configuration would let packets for VIPs pass to the stack: attach afterwards.
        if self.engine.as_ref().is_some_and(Engine::configured) {
            done &= self.attach(inputs.external).await;
        }
        if let Some(outcome) = outcome {
            done &= self.announce(outcome.ready.missing);
            let odd = inputs.unusable.iter().map(|name| format!("interface {name} has no Ethernet header: not used"));
            self.report(&desired, outcome.ready.notes.into_iter().chain(odd).collect());
        }
        done
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

    /// Takes the desired state into the engine; `false`: not all of it yet, to be tried again.
    async fn configure(&mut self, desired: &Desired, inputs: &Inputs) -> bool {
        let Some(mut engine) = self.engine.take() else { return false };
        let in_use = ready(&engine.limits(), inputs).unwrap_or_default();
        let same = |last: &Round| last.desired == *desired && last.outcome.ready == in_use;
        if self.last.as_ref().is_some_and(|last| same(last) && last.outcome.failed.is_empty()) {
            self.engine = Some(engine);
            return true;
        }
        let next = if desired.faults.is_empty() { &desired.ready } else { &in_use };
        self.forget_neighbours(next).await;
        if let Some(last) = &self.last {
            self.prepare(&engine, &last.outcome.ready, next).await;
        }
        let (wanted, inputs) = (desired.clone(), inputs.clone());
        let work = tokio::task::spawn_blocking(move || {
            let started = std::time::Instant::now();
            let outcome = apply::apply(&mut engine, &wanted, &inputs);
            (engine, outcome, started.elapsed())
        });
        let (engine, outcome, took) = match work.await {
            Ok(done) => done,
            Err(error) => {
                tracing::error!(%error, "engine lost");
                self.last = None;
                self.health.waiting("Configuration", "the engine, which has failed", "restart the load balancer");
                return false;
            }
        };
        let forwards = engine.configured();
        self.engine = Some(engine);
        self.say(desired, &outcome, took, forwards);
        let done = outcome.failed.is_empty();
        self.last = Some(Round { desired: desired.clone(), outcome });
        done
    }

    fn say(&self, desired: &Desired, outcome: &Outcome, took: Duration, forwards: bool) {
        let faults: Vec<&str> = outcome.refused.iter().chain(&outcome.failed).map(String::as_str).collect();
        if faults.is_empty() {
            let ready: usize = outcome.ready.targets.values().map(|t| t.len()).sum();
            let (flows, took_us) = (desired.config.flows.len(), took.as_micros() as u64);
            tracing::info!(flows, ready, took_us, "tables in use");
            return self.health.serving("Configuration");
        }
        let kept = if forwards { "the last good one forwards on" } else { "nothing is forwarded" };
        let known = self.last.as_ref().map(|last| &last.outcome);
        if known.is_none_or(|known| (&known.refused, &known.failed) != (&outcome.refused, &outcome.failed)) {
            for fault in &faults {
                tracing::error!(fault, kept, "configuration refused");
            }
        }
        let waits = if outcome.refused.is_empty() { "the kernel to take it" } else { "a configuration without faults" };
        self.health.waiting("Configuration", &format!("{waits}; {kept}"), &faults.join("; "));
    }

    /// Targets that are new get no neighbour entry of a predecessor with their address.
    async fn forget_neighbours(&self, ready: &Ready) {
        let Some(last) = &self.last else { return };
        let known = hops(&last.outcome.ready);
        let new: Vec<(u32, IpAddr)> = hops(ready).difference(&known).copied().collect();
        if new.is_empty() || last.desired.config.streams.is_empty() {
            return;
        }
        let Ok(netlink) = self.netns.netlink().await else { return };
        for (index, ip) in new {
            if let Err(error) = ignore_missing(netlink.neighbour_delete(index, ip).await) {
                tracing::debug!(%ip, %error, "neighbour entry stays");
            }
        }
    }

    /// The slow path of targets that are about to get packets: without it the first ones of those that take it would be dropped.
    /// (Tables of a stream that is new or changes its size have no numbers before the engine has placed it.)
    async fn prepare(&self, engine: &Engine, last: &Ready, next: &Ready) {
        let known = slow_path(engine, last);
        let mut new = slow_path(engine, next);
        // A table in use may lead elsewhere soon, but its old next hop is what packets are marked for until then.
        new.retain(|key, _| !known.contains_key(key));
        if !new.is_empty()
            && let Err(error) = routing::prepare(&self.netns, &new).await
        {
            tracing::debug!(%error, "slow path of new targets incomplete");
        }
    }

    /// Tells the frontend whether this load balancer can forward; `false`: look again soon.
    fn announce(&mut self, missing: usize) -> bool {
        let Some(engine) = &self.engine else { return false };
        let forwarding = forwarding(engine);
        let open = self.gate.look(forwarding, missing, Instant::now());
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
                self.note_detour();
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
    async fn route(&mut self, desired: &Desired, outcome: &Outcome) -> bool {
        let Some(engine) = &self.engine else { return false };
        let wanted = slow_path(engine, &outcome.ready);
        let own = routing::Own { tables: self.settings.tables(), detour: engine.detour().ok() };
        // VIPs that only a refused configuration has dropped are in use.
        let keep = !(outcome.refused.is_empty() && outcome.failed.is_empty());
        let guarded = Guarded { vips: &desired.config.vips, keep };
        match routing::apply(&self.netns, &wanted, guarded, &own).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "slow path incomplete");
                false
            }
        }
    }

    fn report(&self, desired: &Desired, notes: Vec<String>) {
        let waits = |name: &str, there: bool, what: &str| {
            if there { self.health.serving(name) } else { self.health.waiting(name, what, "is one configured?") }
        };
        waits("Stream", !desired.config.streams.is_empty(), "a stream");
        waits("Flow", !desired.config.flows.is_empty(), "a flow");
        self.health.note("Targets", desired.notes.iter().cloned().chain(notes).collect());
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

/// Next hops by the tables of the slow path, of the streams that the engine has.
fn slow_path(engine: &Engine, ready: &Ready) -> Wanted {
    let mut wanted = Wanted::new();
    let limits = engine.limits();
    for (stream, targets) in &ready.targets {
        let (Some(offset), Some(limit)) = (engine.offset(stream), limits.get(stream)) else { continue };
        // Behind the limit are the tables of another stream.
        for (identifier, target) in targets.range(..=limit) {
            if let Some((ip, index)) = target.v4 {
                wanted.insert((false, offset + identifier), (ip.into(), index));
            }
            if let Some((ip, index)) = target.v6 {
                wanted.insert((true, offset + identifier), (ip.into(), index));
            }
        }
    }
    wanted
}

/// Interface and address of each next hop.
fn hops(ready: &Ready) -> BTreeSet<(u32, IpAddr)> {
    let targets = ready.targets.values().flat_map(|t| t.values());
    targets
        .flat_map(|t| [t.v4.map(|(ip, index)| (index, ip.into())), t.v6.map(|(ip, index)| (index, ip.into()))])
        .flatten()
        .collect()
}

fn forwarding(engine: &Engine) -> bool {
    engine.streams().iter().any(|s| engine.targets(s).is_some_and(|t| !t.is_empty()))
}

async fn changed_or_later(inputs: &mut watch::Receiver<Inputs>, backoff: &mut Backoff) {
    tokio::select! {
        _ = inputs.changed() => {}
        () = backoff.wait() => {}
    }
}

#[cfg(test)]
#[path = "dataplane_tests.rs"]
mod tests;
