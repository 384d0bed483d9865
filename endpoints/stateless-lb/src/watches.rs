//! What the NSP tells: VIPs, conduit, streams, flows, targets, frontends.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use meridio_common::{Health, WatchEvent, watch_events};
use meridio_proto::nsp::v1 as nsp;
use nsp::configuration_manager_client::ConfigurationManagerClient;
use nsp::target_registry_client::TargetRegistryClient;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::inputs::{Inputs, Shared};
use crate::settings::Settings;
use crate::told::Told;

/// The watches of one load balancer.
#[derive(Clone)]
pub(crate) struct Watches {
    channel: Channel,
    conduit: nsp::Conduit,
    hostname: String,
    shared: Shared,
    sessions: Sessions,
    hold: Duration,
    stop: CancellationToken,
}

/// Which watches are lost, and why. One that works says nothing about the others: readiness needs them all.
#[derive(Clone)]
struct Sessions {
    lost: Arc<Mutex<BTreeMap<&'static str, String>>>,
    health: Health,
}

impl Sessions {
    fn told(&self, watch: &'static str) {
        self.change(|lost| _ = lost.remove(watch));
    }

    fn lost(&self, watch: &'static str, status: &tonic::Status) {
        self.change(|lost| _ = lost.insert(watch, status.message().to_owned()));
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<&'static str, String>)) {
        // Held until health has been told, so that its last word is about the last change.
        let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut lost);
        if lost.is_empty() {
            self.health.serving("NSPCli");
        } else {
            self.health.waiting("NSPCli", &waits(&lost), "is it running?");
        }
    }
}

/// What is waited for; watches with the same reason are named together.
fn waits(lost: &BTreeMap<&'static str, String>) -> String {
    let mut reasons: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (watch, reason) in lost {
        reasons.entry(reason).or_default().push(watch);
    }
    let lines: Vec<String> =
        reasons.iter().map(|(reason, watches)| format!("{}: {reason}", watches.join(", "))).collect();
    format!("the NSP ({})", lines.join("; "))
}

impl Watches {
    pub(crate) fn new(
        channel: Channel,
        settings: &Settings,
        hostname: &str,
        shared: Shared,
        health: Health,
        stop: CancellationToken,
    ) -> Self {
        let trench = nsp::Trench { name: settings.trench_name.clone() };
        let conduit =
            nsp::Conduit { name: settings.conduit_name.clone(), trench: Some(trench), ..nsp::Conduit::default() };
        let hold = settings.empty_hold.into();
        let sessions = Sessions { lost: Arc::default(), health };
        Watches { channel, conduit, hostname: hostname.to_owned(), shared, sessions, hold, stop }
    }

    /// Starts all watches. A pattern with an empty name stands for all streams of the conduit, so six streams suffice.
    pub(crate) fn spawn(self, tasks: &mut JoinSet<()>) {
        let conduit = Some(self.conduit.clone());
        let stream = Some(nsp::Stream { conduit: conduit.clone(), ..nsp::Stream::default() });
        let configuration = ConfigurationManagerClient::new(self.channel.clone());
        let registry = TargetRegistryClient::new(self.channel.clone());

        let pattern = nsp::Vip { trench: self.conduit.trench.clone(), ..nsp::Vip::default() };
        let client = configuration.clone();
        tasks.spawn(self.clone().list(
            "VIPs",
            move || {
                let (mut client, pattern) = (client.clone(), pattern.clone());
                async move { client.watch_vip(pattern).await }
            },
            |m: nsp::VipResponse| m.vips,
            |inputs| &mut inputs.vips,
        ));
        let pattern = self.conduit.clone();
        let client = configuration.clone();
        tasks.spawn(self.clone().list(
            "conduit",
            move || {
                let (mut client, pattern) = (client.clone(), pattern.clone());
                async move { client.watch_conduit(pattern).await }
            },
            |m: nsp::ConduitResponse| m.conduits,
            |inputs| &mut inputs.conduits,
        ));
        let pattern = nsp::Stream { conduit: conduit.clone(), ..nsp::Stream::default() };
        let client = configuration.clone();
        tasks.spawn(self.clone().list(
            "streams",
            move || {
                let (mut client, pattern) = (client.clone(), pattern.clone());
                async move { client.watch_stream(pattern).await }
            },
            |m: nsp::StreamResponse| m.streams,
            |inputs| &mut inputs.streams,
        ));
        let pattern = nsp::Flow { stream: stream.clone(), ..nsp::Flow::default() };
        tasks.spawn(self.clone().list(
            "flows",
            move || {
                let (mut client, pattern) = (configuration.clone(), pattern.clone());
                async move { client.watch_flow(pattern).await }
            },
            |m: nsp::FlowResponse| m.flows,
            |inputs| &mut inputs.flows,
        ));
        let pattern = nsp::Target {
            status: nsp::target::Status::Enabled.into(),
            r#type: nsp::target::Type::Default.into(),
            stream,
            ..nsp::Target::default()
        };
        let client = registry.clone();
        tasks.spawn(self.clone().list(
            "targets",
            move || {
                let (mut client, pattern) = (client.clone(), pattern.clone());
                async move { client.watch(pattern).await }
            },
            |m: nsp::TargetResponse| m.targets,
            |inputs| &mut inputs.targets,
        ));
        tasks.spawn(self.frontend(registry));
    }

    /// Follows one list.
    async fn list<M, T, Open, Opened>(
        self,
        name: &'static str,
        open: Open,
        items: fn(M) -> Vec<T>,
        field: fn(&mut Inputs) -> &mut Option<Vec<T>>,
    ) where
        T: Send + 'static,
        Open: FnMut() -> Opened,
        Opened: Future<Output = Result<tonic::Response<tonic::Streaming<M>>, tonic::Status>>,
    {
        let mut told = Told::new(name, self.shared.clone(), self.hold);
        watch_events(name, &self.stop, open, |event| {
            match event {
                WatchEvent::Message(message) => {
                    self.sessions.told(name);
                    told.list(items(message), field);
                }
                WatchEvent::Lost(status) => {
                    told.lost();
                    self.sessions.lost(name, &status);
                }
            }
            std::future::ready(())
        })
        .await;
    }

    /// Whether the frontend of this pod is among the registered ones.
    async fn frontend(self, registry: TargetRegistryClient<Channel>) {
        let pattern = nsp::Target {
            status: nsp::target::Status::Any.into(),
            r#type: nsp::target::Type::Frontend.into(),
            ..nsp::Target::default()
        };
        let open = || {
            let (mut client, pattern) = (registry.clone(), pattern.clone());
            async move { client.watch(pattern).await }
        };
        let name = "frontends";
        let mut told = Told::new(name, self.shared.clone(), self.hold);
        watch_events(name, &self.stop, open, |event| {
            match event {
                WatchEvent::Message(nsp::TargetResponse { targets }) => {
                    self.sessions.told(name);
                    let ours = |t: &nsp::Target| t.context.get("identifier").is_some_and(|id| *id == self.hostname);
                    // Nobody at all after a loss says more about the NSP than about the frontend.
                    told.frontend(targets.iter().any(ours), targets.is_empty());
                }
                WatchEvent::Lost(status) => {
                    told.lost();
                    self.sessions.lost(name, &status);
                }
            }
            std::future::ready(())
        })
        .await;
    }
}

#[cfg(test)]
#[path = "watches_tests.rs"]
mod tests;
