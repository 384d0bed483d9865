//! The loop that keeps the engine in step with what is known.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use meridio_common::{Backoff, Health};
use meridio_maglev::{Engine, Options};
use nsm_kernel::{Netns, error::ignore_missing};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::apply::{self, Outcome};
use crate::availability::Availability;
use crate::desired::{Desired, Ready, desired, ready};
use crate::gate::Gate;
use crate::hops::{Followed, hops, slow_path};
use crate::inputs::{Inputs, Shared};
use crate::routing::{self, Guarded};
use crate::settings::Settings;

/// How often is looked whether everything is still attached.
const VERIFY: Duration = Duration::from_secs(1);
/// In how many of these looks there is one at rules and routes, of which there may be thousands.
const ROUTES: u32 = 10;

/// What the engine was told, and what it made of it.
struct Round {
    desired: Desired,
    /// Another load balancer's tables were in use, see [`Dataplane::foreign`].
    foreign: bool,
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
    followed: Followed,
    /// Remarks of the last report.
    noted: BTreeSet<String>,
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
            gate: Gate::default(),
            kept: None,
            restored: 0,
            followed: Followed::default(),
            noted: BTreeSet::new(),
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
            // By maps of another version.
            let foreign = !engine.adopted() && Engine::attached(&interface)?;
            Ok::<_, meridio_maglev::Error>((engine, foreign))
        };
        let opened = tokio::task::spawn_blocking(open).await;
        let reason = match opened {
            Ok(Ok((engine, foreign))) => {
                self.note_chunks(engine.chunks());
                // Of maps of another version nothing is known but that they are in use.
                self.kept = Some(if engine.adopted() { forwarding(&engine) } else { foreign });
                // What an earlier process forwards need not be taken away until all targets are there again.
                self.gate.open = engine.adopted() || foreign;
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
        // One clock for all rounds: inputs that change often must not put it off.
        let mut looks = tokio::time::interval_at(Instant::now() + VERIFY, VERIFY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked = 0u32;
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
                    _ = looks.tick(), if self.attached.is_some() => {
                        looked = looked.wrapping_add(1);
                        // Routes go with a link that is down for a moment, or with a hand that flushes them, and nobody is told.
                        if !self.verify().await || looked.is_multiple_of(ROUTES) {
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
        let mut done = self.engine.as_mut().is_none_or(|engine| self.followed.follow(&inputs.mac_changes, engine));
        if adopted {
            done &= self.attach(inputs.external).await;
        }
        let Some(desired) = desired(inputs, &self.settings.sctp_ports_only) else {
            self.waiting(inputs);
            return self.keep().await && done;
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
            done &= self.announce(outcome.ready.missing).await;
            let odd = inputs.unusable.iter().map(|name| format!("interface {name} has no Ethernet header: not used"));
            self.report(&desired, outcome.ready.notes.into_iter().chain(odd).collect());
        }
        done
    }

    /// Until it is known what is wanted, what an earlier process has left goes on, and with it what only its process could do.
    async fn keep(&mut self) -> bool {
        if !self.gate.open {
            return true;
        }
        let led = self.lead().await;
        self.announce(0).await && led
    }

    /// The way into the detour, if there is one: its interface is another one in each process.
    async fn lead(&self) -> bool {
        match self.detour() {
            Some(index) => complete(routing::guards(&self.netns, &[], Some(index)).await),
            None => true,
        }
    }

    /// Whether a load balancer forwards here by tables that this one does not know: those of another version.
    async fn foreign(&self) -> Result<bool, meridio_maglev::Error> {
        if self.engine.as_ref().is_none_or(Engine::configured) {
            return Ok(false);
        }
        attached(&self.settings.external_interface).await
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
        // Not known is no reason to take over.
        let foreign = self.foreign().await.unwrap_or(true);
        let Some(mut engine) = self.engine.take() else { return false };
        let in_use = ready(&engine.limits(), inputs).unwrap_or_default();
        let same = |last: &Round| (&last.desired, &last.outcome.ready, last.foreign) == (desired, &in_use, foreign);
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
            let outcome = apply::apply(&mut engine, &wanted, &inputs, foreign);
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
        let forwards = engine.configured() || foreign;
        self.engine = Some(engine);
        self.say(desired, &outcome, took, forwards);
        let done = outcome.failed.is_empty();
        self.last = Some(Round { desired: desired.clone(), foreign, outcome });
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

    /// Tells the frontend whether this load balancer forwards; `false`: look again soon.
    async fn announce(&mut self, missing: usize) -> bool {
        let Some(engine) = &self.engine else { return false };
        let (configured, targets) = (engine.configured(), forwarding(engine));
        // Without a program on the interface tables are of no use. One of an earlier process counts while another cannot be attached.
        let attached = match self.attached {
            Some(_) => true,
            None => match attached(&self.settings.external_interface).await {
                Ok(attached) => attached,
                Err(error) => {
                    tracing::warn!(%error, "not known whether a load balancer is attached");
                    return false;
                }
            },
        };
        // Of tables of another version nothing is known but that they are in use.
        let forwards = attached && (targets || !configured);
        let open = self.gate.look(forwards, missing, Instant::now());
        self.availability.set(forwards && open);
        open || !forwards
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
                // It begins with the attachment, after the routes of this round.
                self.lead().await
            }
            Err(error) => {
                tracing::error!(%error, "not attached");
                self.attached = None;
                self.health.waiting("DataPlane", &error.to_string(), "see the log");
                false
            }
        }
    }

    /// Interface of the detour, while there is one.
    fn detour(&self) -> Option<u32> {
        self.engine.as_ref().and_then(|engine| engine.detour().ok())
    }

    /// Rules and routes of the slow path.
    async fn route(&mut self, desired: &Desired, outcome: &Outcome) -> bool {
        let Some(engine) = &self.engine else { return false };
        if self.last.as_ref().is_some_and(|last| last.foreign) && !engine.configured() {
            return complete(routing::guards(&self.netns, &desired.config.vips, None).await);
        }
        let wanted = slow_path(engine, &outcome.ready);
        let own = routing::Own { tables: self.settings.tables(), detour: self.detour() };
        // VIPs that only a refused configuration has dropped are in use.
        let keep = !(outcome.refused.is_empty() && outcome.failed.is_empty());
        let guarded = Guarded { vips: &desired.config.vips, keep };
        complete(routing::apply(&self.netns, &wanted, guarded, &own).await)
    }

    fn report(&mut self, desired: &Desired, notes: Vec<String>) {
        let waits = |name: &str, there: bool, what: &str| {
            if there { self.health.serving(name) } else { self.health.waiting(name, what, "is one configured?") }
        };
        waits("Stream", !desired.config.streams.is_empty(), "a stream");
        waits("Flow", !desired.config.flows.is_empty(), "a flow");
        let notes: Vec<String> = desired.notes.iter().cloned().chain(notes).collect();
        for note in notes.iter().filter(|note| !self.noted.contains(*note)) {
            tracing::warn!(note, "kept out");
        }
        self.noted = notes.iter().cloned().collect();
        self.health.note("Targets", notes);
    }
}

/// Whether a load balancer of any version is attached to an interface.
async fn attached(interface: &str) -> Result<bool, meridio_maglev::Error> {
    let interface = interface.to_owned();
    let asked = tokio::task::spawn_blocking(move || Engine::attached(&interface)).await;
    asked.unwrap_or_else(|error| Err(meridio_maglev::Error::Load(error.to_string())))
}

/// Whether rules and routes are as they should be; if not, why.
fn complete(result: Result<(), nsm_kernel::Error>) -> bool {
    if let Err(error) = &result {
        tracing::warn!(%error, "slow path incomplete");
    }
    result.is_ok()
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
