//! This proxy as an NSM endpoint for the targets of its node.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use meridio_common::{Backoff, Health};
use meridio_proto::nsm::registry::{Destination, Match, NetworkService, NetworkServiceEndpoint, NetworkServiceLabels};
use nsm_chain::Endpoint;
use nsm_chain::elements::monitor::Hub;
use nsm_registry::RegistryClient;
use nsm_transport::{Address, Listener, Transport};
use tokio_util::sync::CancellationToken;

use crate::inputs::Shared;
use crate::settings::Settings;

/// Label that ties a target to the proxy of its own node.
pub(crate) const NODE_LABEL: &str = "nodeName";
/// Time for taking the endpoint out of the registry at the end.
const UNREGISTER: Duration = Duration::from_secs(3);

/// The service of this proxy: a client gets the endpoint of its own node only.
fn network_service(name: &str) -> NetworkService {
    let selector = BTreeMap::from([(NODE_LABEL.to_owned(), "{{.nodeName}}".to_owned())]);
    let route = Destination { destination_selector: selector.clone(), weight: 0 };
    let rule = Match { source_selector: selector, routes: vec![route], ..Match::default() };
    NetworkService { name: name.to_owned(), payload: "ETHERNET".to_owned(), matches: vec![rule], ..Default::default() }
}

fn endpoint(settings: &Settings, url: String) -> NetworkServiceEndpoint {
    let labels = BTreeMap::from([(NODE_LABEL.to_owned(), settings.host.clone())]);
    NetworkServiceEndpoint {
        name: settings.name.clone(),
        network_service_names: vec![settings.service_name.clone()],
        network_service_labels: BTreeMap::from([(settings.service_name.clone(), NetworkServiceLabels { labels })]),
        url,
        ..NetworkServiceEndpoint::default()
    }
}

/// Asks the targets to come again whenever the bridge's addresses, which are their gateways, have changed: by themselves they would
/// come with their next refresh, hours later.
pub(crate) async fn announce(hub: Hub, shared: Shared, stop: CancellationToken) {
    let mut inputs = shared.subscribe();
    let mut told = BTreeSet::new();
    loop {
        let bridge = inputs.borrow_and_update().bridge.clone();
        if !bridge.is_empty() && bridge != told {
            hub.ask_for_refresh();
            told = bridge;
        }
        tokio::select! {
            () = stop.cancelled() => return,
            changed = inputs.changed() => if changed.is_err() { return },
        }
    }
}

/// Serves the endpoint on a socket of its own and keeps it registered until `stop`.
///
/// # Errors
/// When the socket cannot be made.
pub(crate) async fn run(
    settings: &Settings,
    service: &Endpoint,
    transport: Transport,
    registry: RegistryClient,
    health: Health,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let path: PathBuf = std::env::temp_dir().join(&settings.name).join("listen.on");
    let listener = Listener::bind(&Address::Unix(path.clone())).await.context("socket of the endpoint")?;
    let url = format!("unix://{}", path.display());
    // It outlives `stop` by the time that unregistering takes, so that nobody is sent to a socket that is gone.
    let end = CancellationToken::new();
    let routes = service.service().routes();
    let server = tokio::spawn({
        let end = end.clone();
        async move { transport.serve(vec![listener], routes, end).await }
    });
    let endpoint = endpoint(settings, url);
    tokio::select! {
        () = stop.cancelled() => {}
        () = register(&registry, network_service(&settings.service_name), endpoint.clone(), &health) => {
            stop.cancelled().await;
        }
    }
    if let Err(error) = registry.unregister_nse(endpoint, Some(UNREGISTER)).await {
        tracing::warn!(%error, "endpoint not unregistered; it will expire");
    }
    end.cancel();
    server.await.context("endpoint")?.context("endpoint")
}

async fn register(
    registry: &RegistryClient,
    service: NetworkService,
    endpoint: NetworkServiceEndpoint,
    health: &Health,
) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    loop {
        let registered = async {
            registry.register_ns(service.clone()).await?;
            registry.register_nse(endpoint.clone()).await
        };
        match registered.await {
            Ok(_) => {
                tracing::info!(endpoint = endpoint.name, "registered");
                return health.serving("NSMEndpoint");
            }
            Err(error) => {
                health.waiting("NSMEndpoint", &format!("its registration ({error})"), "is the NSM manager running?");
            }
        }
        backoff.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;
    use nsm_chain::{Connection, ConnectionEventType, MonitorScopeSelector, State};

    #[tokio::test(start_paused = true)]
    async fn targets_come_again_when_their_gateways_have_changed() {
        let (hub, shared, stop) = (Hub::new(), Shared::new(), CancellationToken::new());
        let announcing = tokio::spawn(announce(hub.clone(), shared.clone(), stop.clone()));
        let bridge = |text: &str| {
            let net = text.parse().unwrap();
            shared.change(|inputs| inputs.bridge = [net].into());
        };
        bridge("172.16.1.1/24");
        tokio::time::sleep(Duration::from_secs(1)).await;
        for id in ["a", "b"] {
            hub.update(Connection { id: id.into(), ..Connection::default() });
        }
        let mut events = hub.subscribe(MonitorScopeSelector::default());
        assert_eq!(events.next().await.unwrap().r#type(), ConnectionEventType::InitialStateTransfer);
        // Something else changes: nobody is bothered.
        shared.change(|inputs| inputs.ports = ["nsm".to_owned()].into());
        assert!(tokio::time::timeout(Duration::from_secs(1), events.next()).await.is_err());
        bridge("172.16.2.1/24");
        for id in ["a", "b"] {
            let event = events.next().await.unwrap();
            assert_eq!(event.connections[id].state(), State::RefreshRequested);
        }
        assert!(tokio::time::timeout(Duration::from_secs(1), events.next()).await.is_err(), "once");
        stop.cancel();
        announcing.await.unwrap();
    }
}
