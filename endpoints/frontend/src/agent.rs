//! The loop of the frontend: what is wanted and what is seen, brought together at every event.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use meridio_proto::nsp::v1 as nsp;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::bird::process::Bird;
use crate::bird::render::{Base, Inputs, Password, masked, render, render_whole};
use crate::bird::status::Status;
use crate::connectivity::{Copy, FamilyView, Judge, Observation, Verdict, announced};
use crate::error::Error;
use crate::gateway::{Attraction, Family, Gateway};
use crate::kernel::netlink::{Kernel, Link};
use crate::kernel::plan::{Actual, Desired, plan};
use crate::kernel::sysctl;
use crate::secrets::Secrets;

/// Several events of one cause arrive together; one look answers them all.
const GATHER: Duration = Duration::from_millis(3);

/// What the loop is told.
#[derive(Debug)]
pub struct Told {
    /// The attractor, `None` until the NSP has told one.
    pub attractor: watch::Receiver<Option<nsp::Attractor>>,
    /// Whether the load balancer beside us forwards; `None` until it is known.
    pub forwarding: watch::Receiver<Option<bool>>,
    /// News from the kernel.
    pub kernel: mpsc::Receiver<String>,
}

/// What the loop tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// External connectivity; `None` as long as it is not known.
    pub connected: Option<bool>,
    /// Families whose VIPs are announced.
    pub advertised: BTreeSet<Family>,
    /// What is waited for or wrong, one line each; empty when all is well.
    pub waits: Vec<String>,
}

/// Fixed settings of the loop.
#[derive(Clone, Debug)]
pub struct Options {
    /// Fixed part of BIRD's configuration.
    pub base: Base,
    /// Directory of BGP passwords.
    pub secrets_dir: Option<PathBuf>,
    /// Drop VIP traffic that has no route.
    pub drop: bool,
    /// Time between looks with connectivity.
    pub poll_connected: Duration,
    /// Time between looks without.
    pub poll_disconnected: Duration,
}

/// The loop's state.
pub struct Agent {
    options: Options,
    bird: Bird,
    kernel: Kernel,
    judge: Judge,
    attractor: Option<nsp::Attractor>,
    attraction: Option<Attraction>,
    secrets: Secrets,
    passwords: Vec<Password>,
    config_faults: Vec<String>,
    secret_faults: Vec<String>,
    sysctl_faults: Vec<String>,
    applied: Option<String>,
    refused: Option<(String, String)>,
    advertise: BTreeSet<Family>,
    link: Link,
    logged: BTreeMap<String, (String, String)>,
    report: watch::Sender<Report>,
}

impl Agent {
    /// `bird` runs already; `advertise` are the families whose VIPs it announces now.
    pub fn new(
        options: Options,
        bird: Bird,
        kernel: Kernel,
        advertise: BTreeSet<Family>,
        report: watch::Sender<Report>,
    ) -> Self {
        Self {
            options,
            bird,
            kernel,
            advertise,
            report,
            judge: Judge::default(),
            attractor: None,
            attraction: None,
            secrets: Secrets::default(),
            passwords: vec![],
            config_faults: vec![],
            secret_faults: vec![],
            sysctl_faults: vec![],
            applied: None,
            refused: None,
            link: Link::default(),
            logged: BTreeMap::new(),
        }
    }

    /// Runs until `stop`; then withdraws the VIPs and ends BIRD. Rules, the drop route and the copy of the default
    /// route stay: replies that still come by leave by them, and nothing of a VIP can reach the primary network.
    pub async fn run(mut self, mut told: Told, stop: CancellationToken) {
        loop {
            let next = self.cycle(&mut told).await;
            let news = async {
                match self.bird.control() {
                    Some(control) => control.told().await,
                    None => std::future::pending().await,
                }
            };
            let lost = tokio::select! {
                () = stop.cancelled() => break,
                Ok(()) = told.attractor.changed() => None,
                Ok(()) = told.forwarding.changed() => None,
                Some(_) = told.kernel.recv() => None,
                () = tokio::time::sleep_until(next) => None,
                news = news => news.err(),
            };
            if let Some(error) = lost {
                self.bird.lost(&error).await;
                // It may be back before anybody looks: its sessions begin anew, which says nothing about the gateways.
                self.judge.restarted(&Family::BOTH.into(), Instant::now());
                continue;
            }
            tokio::time::sleep(GATHER).await;
        }
        self.withdraw().await;
        self.bird.stop().await;
    }

    /// One round; returns when the next one is due at the latest.
    async fn cycle(&mut self, told: &mut Told) -> Instant {
        match self.bird.recover().await {
            // It may be the BIRD of before, which knows nothing of what was written meanwhile. Being told again what it has
            // changes nothing.
            Ok(true) => (self.applied, self.refused) = (None, None),
            Ok(false) => {}
            Err(error) => tracing::error!(%error, "BIRD is away"),
        }
        let attractor = told.attractor.borrow_and_update().clone();
        if let Some(new) = attractor.filter(|new| self.attractor.as_ref() != Some(new)) {
            self.take_attractor(new).await;
        }
        self.read_passwords();
        let forwarding = *told.forwarding.borrow_and_update();
        let status = self.status().await;
        let (verdict, actual) = self.look(status.as_ref()).await;
        self.apply_kernel(actual.as_ref(), verdict.as_ref()).await;
        let connected = verdict.as_ref().and_then(|verdict| verdict.connected);
        self.advertise = announced(&self.advertise, forwarding, verdict.as_ref());
        self.configure().await;
        self.tell(connected, forwarding, status.as_ref());
        let poll = if connected == Some(true) { self.options.poll_connected } else { self.options.poll_disconnected };
        let due = [verdict.and_then(|verdict| verdict.again_at), self.bird.retry_at()].into_iter().flatten();
        due.fold(Instant::now() + poll, Instant::min)
    }

    /// Takes over what the NSP tells, unless there is a fault in it: then the last one stays, for BIRD and kernel alike.
    async fn take_attractor(&mut self, attractor: nsp::Attractor) {
        let refused = match Attraction::parse(&attractor) {
            Err(faults) => faults,
            Ok(new) => match self.bird.check(&render_whole(&self.options.base, &new)).await {
                Ok(()) => {
                    self.take_attraction(new);
                    vec![]
                }
                Err(Error::Configuration(text)) => vec![format!("BIRD refuses what the attractor asks for: {text}")],
                Err(error) => {
                    // Nothing is known; the next look asks again.
                    tracing::error!(%error, "the attractor's configuration cannot be checked");
                    self.config_faults = vec![format!("the attractor's configuration cannot be checked: {error}")];
                    self.attractor = None;
                    return self.bird_failed(&error).await;
                }
            },
        };
        for fault in &refused {
            tracing::error!("configuration refused, the last one stays: {fault}");
        }
        self.config_faults = refused;
        self.attractor = Some(attractor);
    }

    fn take_attraction(&mut self, new: Attraction) {
        let changed = changed_families(self.attraction.as_ref(), &new);
        self.judge.restarted(&changed, Instant::now());
        tracing::info!(vips = new.vips.len(), gateways = new.gateways.len(), "new attractor configuration");
        self.attraction = Some(new);
    }

    fn read_passwords(&mut self) {
        let Some(attraction) = &self.attraction else { return };
        let (passwords, faults) = self.secrets.read(self.options.secrets_dir.as_deref(), attraction);
        for fault in faults.iter().filter(|fault| !self.secret_faults.contains(fault)) {
            tracing::warn!("{fault}");
        }
        self.secret_faults = faults;
        self.passwords = passwords;
    }

    async fn status(&mut self) -> Option<Status> {
        let control = self.bird.control()?;
        let asked = async {
            let protocols = control.ask("show protocols all").await?;
            let bfd = control.ask("show bfd sessions").await?;
            Ok::<_, Error>(Status::parse(&protocols, &bfd))
        };
        match asked.await {
            Ok(status) => Some(status),
            Err(error) => {
                self.bird.lost(&error).await;
                None
            }
        }
    }

    /// `None` for a verdict while there is no configuration to judge by, or the kernel does not answer.
    async fn look(&mut self, status: Option<&Status>) -> (Option<Verdict>, Option<Actual>) {
        let interface = self.options.base.interface.clone();
        let seen = async { Ok::<_, Error>((self.kernel.link(&interface).await?, self.kernel.read().await?)) };
        let (link, actual) = match seen.await {
            Ok(seen) => seen,
            Err(error) => {
                tracing::error!(%error, "the kernel cannot be read");
                return (None, None);
            }
        };
        if link != self.link {
            tracing::info!(interface, exists = link.exists, carrier = link.carrier, "external interface");
            if link.exists && !self.link.exists {
                self.ensure_sysctls();
            }
            self.link = link;
        }
        let Some(attraction) = &self.attraction else { return (None, Some(actual)) };
        let table = self.options.base.table;
        let views = status.map(|status| views(attraction, status, &actual, table, &interface));
        let observation = Observation { carrier: link.carrier, bird: views };
        (Some(self.judge.look(&observation, Instant::now())), Some(actual))
    }

    fn ensure_sysctls(&mut self) {
        self.sysctl_faults = sysctl::ensure(&self.options.base.interface);
        for fault in &self.sysctl_faults {
            tracing::error!("{fault}");
        }
    }

    async fn apply_kernel(&self, actual: Option<&Actual>, verdict: Option<&Verdict>) {
        let Some(actual) = actual else { return };
        let keep = || Family::BOTH.iter().map(|family| (*family, Copy::Keep)).collect();
        let desired = Desired {
            table: self.options.base.table,
            vips: self.attraction.as_ref().map(|attraction| attraction.vips.clone()),
            drop: self.options.drop,
            copies: verdict.map_or_else(keep, |verdict| verdict.copies.clone()),
        };
        for step in plan(actual, &desired) {
            match self.kernel.apply(&step).await {
                Ok(()) => tracing::info!(?step, "kernel"),
                Err(error) => tracing::error!(%error, "kernel"),
            }
        }
    }

    async fn configure(&mut self) {
        let Some(attraction) = &self.attraction else { return };
        let inputs = Inputs { attraction, passwords: &self.passwords, advertise: &self.advertise };
        let text = render(&self.options.base, &inputs);
        let same = |known: Option<&str>| known == Some(text.as_str());
        if same(self.applied.as_deref()) || same(self.refused.as_ref().map(|refused| refused.0.as_str())) {
            return;
        }
        match self.bird.configure(&text).await {
            Ok(()) => {
                tracing::info!(advertise = ?self.advertise, "BIRD configured");
                tracing::debug!("{}", masked(&text));
                (self.applied, self.refused) = (Some(text), None);
            }
            Err(error) => {
                // It may have been taken but for the answer.
                self.applied = None;
                tracing::error!(%error, "BIRD is not configured");
                self.bird_failed(&error).await;
                if matches!(error, Error::Configuration(_)) {
                    self.refused = Some((text, error.to_string()));
                }
            }
        }
    }

    /// A connection that failed is of no use any more: what comes next on it may be the answer that was missed.
    async fn bird_failed(&mut self, error: &Error) {
        if matches!(error, Error::Control { .. } | Error::Protocol { .. }) {
            self.bird.lost(error).await;
        }
    }

    async fn withdraw(&mut self) {
        self.advertise.clear();
        self.configure().await;
    }

    fn tell(&mut self, connected: Option<bool>, forwarding: Option<bool>, status: Option<&Status>) {
        self.log_gateways(status);
        let mut waits = Vec::new();
        if self.attraction.is_none() && self.config_faults.is_empty() {
            waits.push("the NSP has told no attractor yet".to_owned());
        }
        if !self.link.carrier {
            waits.push(format!("external interface {} has no carrier", self.options.base.interface));
        }
        if status.is_none() {
            waits.push("BIRD does not answer".to_owned());
        }
        for gateway in self.attraction.iter().flat_map(|attraction| &attraction.gateways) {
            if !status.is_some_and(|status| status.gateway_up(gateway, &self.options.base.interface)) {
                waits.push(format!("gateway {} ({}) is not up", gateway.name, gateway.address));
            }
        }
        if forwarding != Some(true) {
            waits.push("the load balancer does not forward yet".to_owned());
        }
        waits.extend([&self.config_faults, &self.secret_faults, &self.sysctl_faults].into_iter().flatten().cloned());
        waits.extend(self.refused.as_ref().map(|refused| refused.1.clone()));
        let report = Report { connected, advertised: self.advertise.clone(), waits };
        self.report.send_if_modified(|old| {
            if old.connected != report.connected || old.advertised != report.advertised {
                let (connected, advertised) = (report.connected, &report.advertised);
                tracing::info!(connected, ?advertised, waits = ?report.waits, "external connectivity");
            }
            std::mem::replace(old, report.clone()) != report
        });
    }

    fn log_gateways(&mut self, status: Option<&Status>) {
        let Some(status) = status else { return };
        let now: BTreeMap<_, _> =
            status.gateways().map(|(name, row)| (name.to_owned(), (row.state.clone(), row.info.clone()))).collect();
        for (name, (state, info)) in now.iter().filter(|(name, state)| self.logged.get(*name) != Some(state)) {
            tracing::info!(gateway = name, state, info, "gateway");
        }
        self.logged = now;
    }
}

fn views(
    attraction: &Attraction,
    status: &Status,
    actual: &Actual,
    table: u32,
    interface: &str,
) -> BTreeMap<Family, FamilyView> {
    let view = |family: Family| {
        let own = || attraction.gateways.iter().filter(move |gateway| gateway.family() == family);
        let up = own().any(|gateway| status.gateway_up(gateway, interface));
        let default_route = actual.bird_default(family, table).is_some();
        (
            family,
            FamilyView {
                configured: own().next().is_some(),
                up,
                default_route,
                way_out: actual.way_out(family, table),
            },
        )
    };
    Family::BOTH.into_iter().map(view).collect()
}

/// Families in which a session begins anew with the new configuration.
fn changed_families(old: Option<&Attraction>, new: &Attraction) -> BTreeSet<Family> {
    let of = |attraction: &Attraction, family| -> Vec<Gateway> {
        attraction.gateways.iter().filter(|gateway| gateway.family() == family).cloned().collect()
    };
    let changed = |family: &Family| old.is_none_or(|old| of(old, *family) != of(new, *family));
    Family::BOTH.into_iter().filter(changed).collect()
}
