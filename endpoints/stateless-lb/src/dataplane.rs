//! The loop that keeps the engine in step with what is known.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

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
    /// Why the kernel refused the engine the last time.
    refused: Option<String>,
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
            applied: None,
            gate: Gate { open: false, since: None },
        }
    }

    /// Loads the programs and adopts what an earlier process has left, which forwards on meanwhile; `false`: the kernel
    /// refuses, for whatever reason, and readiness says which.
    async fn open(&mut self) -> bool {
        if self.engine.is_some() {
            return true;
        }
        let maglev = meridio_maglev::Settings {
            kernel: Options::new(&self.settings.bpf_dir),
            offset_start: self.settings.identifier_offset_start,
        };
        let opened = tokio::task::spawn_blocking(move || Engine::open(maglev)).await;
        let reason = match opened {
            Ok(Ok(engine)) => {
                if engine.adopted() {
                    self.availability.set(forwarding(&engine));
                }
                self.gate.open = engine.adopted();
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
                let fault = self.engine.as_ref().and_then(|engine| engine.detour().err());
                let line = |fault| format!("fragments that arrive before their first one are dropped: {fault}");
                self.health.note("Detour", fault.map(line).into_iter().collect());
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
        let own = routing::Own { tables: tables(&self.settings), detour: engine.detour().ok() };
        match routing::apply(&self.netns, &wanted, &desired.config.vips, &own).await {
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

/// Numbers of the tables of targets.
pub(crate) fn tables(settings: &Settings) -> std::ops::Range<u32> {
    settings.identifier_offset_start..settings.identifier_offset_start + TABLES
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

    /// A directory, with a BPF file system on request, gone at the end.
    struct Directory(std::path::PathBuf);

    impl Directory {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("mdt-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).unwrap();
            Directory(path)
        }

        fn mount(&self) {
            let status = std::process::Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&self.0).status().unwrap();
            assert!(status.success(), "mounting bpffs needs root");
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").arg("-q").arg(&self.0).status();
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        settings: Settings,
    }

    fn dataplane(directory: &Directory) -> Dataplane {
        use clap::Parser;
        let directory = directory.0.join("lb");
        let settings = Cli::parse_from(["lb", "--bpf-dir", directory.to_str().unwrap()]).settings;
        let netns = Netns::anonymous().unwrap();
        Dataplane::new(&settings, netns, Health::detached("test"), Availability::new("test"))
    }

    fn waits_for(dataplane: &Dataplane, subservice: &str) -> Option<String> {
        let report = dataplane.health.report();
        let subservice = report.subservices.get(subservice)?;
        (!subservice.serving).then(|| subservice.waits_for.clone())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn readiness_says_what_the_kernel_refuses_until_it_does_not() {
        let directory = Directory::new("refused");
        let mut dataplane = dataplane(&directory);
        assert!(!dataplane.step(&Inputs::default()).await, "to be tried again");
        let reason = waits_for(&dataplane, "DataPlane").unwrap();
        assert!(reason.contains("not on a BPF file system"), "{reason}");
        directory.mount();
        dataplane.step(&Inputs::default()).await;
        assert!(dataplane.engine.is_some());
        assert_eq!(waits_for(&dataplane, "DataPlane").unwrap(), "a configuration to attach with");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn readiness_says_what_is_wrong_with_a_configuration_and_the_last_good_one_stays() {
        use meridio_proto::nsp::v1 as nsp;
        let directory = Directory::new("faults");
        directory.mount();
        let mut dataplane = dataplane(&directory);
        let vip = nsp::Vip { name: "vip".into(), address: "20.0.0.1/32".into(), ..Default::default() };
        let stream = nsp::Stream { name: "s".into(), max_targets: 10, ..Default::default() };
        let flow = nsp::Flow {
            name: "web".into(),
            stream: Some(stream.clone()),
            vips: vec![vip.clone()],
            source_subnets: vec!["0.0.0.0/0".into()],
            destination_port_ranges: vec!["80".into()],
            source_port_ranges: vec!["any".into()],
            protocols: vec!["tcp".into()],
            ..Default::default()
        };
        let good = Inputs {
            vips: Some(vec![vip]),
            conduits: Some(vec![]),
            streams: Some(vec![stream]),
            flows: Some(vec![flow.clone()]),
            targets: Some(vec![]),
            subnets: Some(BTreeSet::new()),
            ..Inputs::default()
        };
        dataplane.step(&good).await;
        assert_eq!(waits_for(&dataplane, "Configuration"), None);
        let bad = nsp::Flow { name: "bad".into(), protocols: vec!["icmp".into()], ..flow };
        let faulty = Inputs { flows: Some(vec![bad]), ..good.clone() };
        dataplane.step(&faulty).await;
        let reason = waits_for(&dataplane, "Configuration").unwrap();
        assert!(reason.contains("the last good one forwards on"), "{reason}");
        let report = dataplane.health.report();
        assert!(report.subservices["Configuration"].to_do.contains("icmp"), "{report:?}");
        assert_eq!(dataplane.engine.as_ref().unwrap().streams(), ["s"]);
        dataplane.step(&good).await;
        assert_eq!(waits_for(&dataplane, "Configuration"), None);
    }
}
