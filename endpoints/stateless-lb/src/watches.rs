//! What the NSP tells: VIPs, conduit, streams, flows, targets, frontends.

use std::time::Duration;

use meridio_common::{Health, WatchEvent, watch_events};
use meridio_proto::nsp::v1 as nsp;
use nsp::configuration_manager_client::ConfigurationManagerClient;
use nsp::target_registry_client::TargetRegistryClient;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::empty_hold::EmptyHold;
use crate::inputs::{Inputs, Shared};
use crate::settings::Settings;

/// The watches of one load balancer.
#[derive(Clone)]
pub(crate) struct Watches {
    channel: Channel,
    conduit: nsp::Conduit,
    hostname: String,
    shared: Shared,
    health: Health,
    hold: Duration,
    stop: CancellationToken,
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
        Watches { channel, conduit, hostname: hostname.to_owned(), shared, health, hold, stop }
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
        let mut told = EmptyHold::new(name, self.shared.clone(), self.hold);
        watch_events(name, &self.stop, open, |event| {
            match event {
                WatchEvent::Message(message) => {
                    self.health.serving("NSPCli");
                    told.list(items(message), field);
                }
                WatchEvent::Lost(status) => {
                    told.lost();
                    let waits = format!("the NSP ({})", status.message());
                    self.health.waiting("NSPCli", &waits, "is it running?");
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
        let mut told = EmptyHold::new("frontends", self.shared.clone(), self.hold);
        watch_events("frontends", &self.stop, open, |event| {
            match event {
                WatchEvent::Message(nsp::TargetResponse { targets }) => {
                    let ours = |t: &nsp::Target| t.context.get("identifier").is_some_and(|id| *id == self.hostname);
                    // Nobody at all after a loss says more about the NSP than about the frontend.
                    told.frontend(targets.iter().any(ours), targets.is_empty());
                }
                WatchEvent::Lost(_) => told.lost(),
            }
            std::future::ready(())
        })
        .await;
    }
}
