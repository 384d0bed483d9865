//! The process: identity, store, chains, sockets.

use crate::Settings;
use anyhow::Context as _;
use meridio_common::{Health, Probe, grpc};
use nsm_identity::X509Source;
use nsm_kernel::Netns;
use nsm_mesh::{Forwarder, Node, NodeConfig};
use nsm_registry::{
    ClientPolicies, Dialer, Policies, Registry, RegistryClient, Security, Upstream, service,
    store::{MemoryStore, SqliteStore, Store},
};
use nsm_transport::{Address, Listener, Transport};
use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

const IDENTITY: &str = "Identity";
const MANAGER: &str = "Manager";
const FORWARDER: &str = "Forwarder";
/// How long the sockets wait for the forwarder to be registered: clients that come back find everything in place then.
const HEAD_START: Duration = Duration::from_secs(1);

/// Runs the node until `stop`. Nothing that was made for a connection is removed then.
///
/// # Errors
/// The store, the network namespace or a socket cannot be opened.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    let health = Health::start("Meridio-nsm", &settings.health_socket, &stop)?;
    health.register(Probe::Startup, &[IDENTITY, MANAGER]);
    health.register(Probe::Readiness, &[IDENTITY, MANAGER, FORWARDER]);
    health.register(Probe::Liveness, &[]);
    health.waiting(IDENTITY, "an SVID of the Workload API", "check SPIFFE_ENDPOINT_SOCKET and its server");
    let Some(source) = grpc::identity(&settings.spiffe_endpoint_socket, &stop).await else { return Ok(()) };
    health.serving(IDENTITY);

    tokio::spawn(meridio_common::memory::give_back(stop.clone()));

    let netns = Netns::current().context("the node's network namespace")?;
    let transport = Transport::new(source.clone())?.with_max_token_lifetime(settings.max_token_lifetime.get());
    if !settings.connect_to.is_empty() {
        return forward(&settings, &transport, source, netns, &health, &stop).await;
    }
    let security = Security {
        source: source.clone(),
        max_token_lifetime: settings.max_token_lifetime.get(),
        policies: registry_policies(&settings),
        client_policies: ClientPolicies::from_masks(&settings.registry_client_policies),
    };
    // The state is loaded before anybody can ask for it.
    let embedded = settings.registry_url.is_empty();
    let state = match store(&settings.state_dir) {
        Ok(state) => Some(state),
        Err(cause) if embedded => return Err(cause),
        Err(cause) => {
            tracing::warn!(%cause, "after a restart local endpoints will be unknown until they register again");
            None
        }
    };
    let registry = match state.clone().filter(|_| embedded) {
        Some(state) => Some(Registry::open(state, &security).await.context("registry")?),
        None => None,
    };
    let upstream = match &registry {
        Some(registry) => Upstream::Local(registry.clone()),
        None => {
            let address = Address::parse(&settings.registry_url)?;
            Upstream::Remote(Dialer::new(transport.clone(), address, settings.dial_timeout.get()))
        }
    };
    let public_url = public_url(&settings.listen_on, &netns).await?;
    let config = NodeConfig { state, ..node_config(&settings, &public_url, source, netns) };
    let node = Node::new(config, upstream)?;
    if let Err(cause) = node.recall().await {
        tracing::warn!(%cause, "local endpoints are unknown until they register again");
    }

    let mut tasks = JoinSet::new();
    let registered = CancellationToken::new();
    let (keeper, health_, registered_, stop_) = (node.clone(), health.clone(), registered.clone(), stop.clone());
    tasks.spawn(async move {
        let changed = |result: Result<(), String>| match result {
            Ok(()) => {
                health_.serving(FORWARDER);
                registered_.cancel();
            }
            Err(cause) => health_.waiting(FORWARDER, &format!("its registration: {cause}"), "check NSM_REGISTRY_URL"),
        };
        keeper.keep_registered(stop_, changed).await;
        Ok(())
    });
    if let Some(registry) = registry.filter(|_| !settings.registry_listen_on.is_empty()) {
        let listener = Listener::bind(&Address::parse(&settings.registry_listen_on)?).await?;
        let routes = service::add_routes(health_routes().await, registry.services, registry.endpoints);
        serve(&mut tasks, &transport, vec![listener], routes, &stop);
    }
    let _ = tokio::time::timeout(HEAD_START, registered.cancelled()).await;

    let mut listeners = Vec::new();
    for url in settings.listen_on.iter().filter(|url| !url.is_empty()) {
        listeners.push(Listener::bind(&Address::parse(url)?).await?);
    }
    let routes = add_health(node.routes()).await;
    serve(&mut tasks, &transport, listeners, routes, &stop);
    health.serving(MANAGER);
    tracing::info!(name = settings.name, public_url, "manager and forwarder started");
    join(tasks, &stop).await
}

/// The forwarder by itself, for a manager in another process.
async fn forward(
    settings: &Settings,
    transport: &Transport,
    source: X509Source,
    netns: Netns,
    health: &Health,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let registry = RegistryClient::builder(&settings.connect_to, source.clone())
        .max_token_lifetime(settings.max_token_lifetime.get())
        .dial_timeout(settings.dial_timeout.get())
        .policies(ClientPolicies::from_masks(&settings.registry_client_policies))
        .build()?;
    let url =
        settings.listen_on.iter().find(|url| url.starts_with("unix:")).context("NSM_LISTEN_ON: no unix socket")?;
    let config = NodeConfig { forwarder_name: settings.name.clone(), ..node_config(settings, url, source, netns) };
    let forwarder = Forwarder::new(config, registry)?;
    let mut tasks = JoinSet::new();
    let listener = Listener::bind(&Address::parse(url)?).await?;
    serve(&mut tasks, transport, vec![listener], add_health(forwarder.routes()).await, stop);
    health.serving(MANAGER);
    health.waiting(FORWARDER, "its registration at the manager", "check NSM_CONNECT_TO");
    let (health, url, stop_) = (health.clone(), url.clone(), stop.clone());
    tasks.spawn(async move {
        tokio::select! {
            () = stop_.cancelled() => return Ok(()),
            registered = forwarder.register(&url) => registered?,
        }
        health.serving(FORWARDER);
        // It is kept registered as long as the forwarder lives.
        stop_.cancelled().await;
        drop(forwarder);
        Ok(())
    });
    tracing::info!(name = settings.name, manager = settings.connect_to, "forwarder started");
    join(tasks, stop).await
}

/// Every task ends with `stop`; one that fails ends them all.
async fn join(mut tasks: JoinSet<anyhow::Result<()>>, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut result = Ok(());
    while let Some(ended) = tasks.join_next().await {
        let ended = ended.context("a task has failed").and_then(|ended| ended);
        if ended.is_err() && result.is_ok() {
            result = ended;
        }
        stop.cancel();
    }
    result
}

fn serve(
    tasks: &mut JoinSet<anyhow::Result<()>>,
    transport: &Transport,
    listeners: Vec<Listener>,
    routes: Routes,
    stop: &CancellationToken,
) {
    let (transport, stop) = (transport.clone(), stop.clone());
    tasks.spawn(async move { Ok(transport.serve(listeners, routes, stop).await?) });
}

/// Names of the services that NSM's peers ask the health of.
const SERVICES: [&str; 4] = [
    "networkservice.NetworkService",
    "connection.MonitorConnection",
    "registry.NetworkServiceRegistry",
    "registry.NetworkServiceEndpointRegistry",
];

async fn health_routes() -> Routes {
    add_health(Routes::default()).await
}

async fn add_health(routes: Routes) -> Routes {
    let (reporter, server) = tonic_health::server::health_reporter();
    for name in SERVICES {
        reporter.set_service_status(name, tonic_health::ServingStatus::Serving).await;
    }
    routes.add_service(server)
}

fn store(state_dir: &str) -> anyhow::Result<Arc<dyn Store>> {
    if state_dir.is_empty() {
        return Ok(Arc::new(MemoryStore::default()));
    }
    let file = Path::new(state_dir).join("registry.db");
    Ok(Arc::new(SqliteStore::open(&file).with_context(|| format!("NSM_STATE_DIR {state_dir}"))?))
}

fn registry_policies(settings: &Settings) -> Policies {
    Policies {
        equal_services: settings.registry_equal_services,
        ..Policies::from_masks(&settings.registry_server_policies)
    }
}

fn node_config(settings: &Settings, public_url: &str, source: X509Source, netns: Netns) -> NodeConfig {
    let stock = NodeConfig::new(&settings.name, public_url, source, netns);
    let forwarder_name = match settings.forwarder_name.as_str() {
        "" => stock.forwarder_name.clone(),
        name => name.to_owned(),
    };
    NodeConfig {
        forwarder_name,
        forwarder_service: settings.forwarder_network_service_name.clone(),
        forwarder_labels: settings.labels_of_forwarder(),
        labels: settings.labels_of_node(),
        tunnel_ip: settings.tunnel_ip.parse().ok(),
        max_token_lifetime: settings.max_token_lifetime.get(),
        dial_timeout: settings.dial_timeout.get(),
        registry_policies: registry_policies(settings),
        registry_client_policies: ClientPolicies::from_masks(&settings.registry_client_policies),
        excluded_prefixes: settings.excluded_prefixes_file.clone(),
        keep_alive: settings.keep_while_alive,
        ..stock
    }
}

/// Where other nodes reach the manager: its first tcp:// URL, else its first URL. A URL without a host gets the first
/// address of the node, IPv4 preferred.
async fn public_url(urls: &[String], netns: &Netns) -> anyhow::Result<String> {
    let tcp = urls.iter().find(|url| url.starts_with("tcp://"));
    let url = tcp.or_else(|| urls.iter().find(|url| !url.is_empty())).context("NSM_LISTEN_ON: empty")?;
    let Some(port) = url.strip_prefix("tcp://:") else { return Ok(url.clone()) };
    let own = netns
        .netlink()
        .await?
        .addresses(None)
        .await?
        .iter()
        .filter(|address| address.global)
        .map(|address| address.net.addr())
        .collect::<Vec<_>>();
    let ip = preferred(own).with_context(|| format!("NSM_LISTEN_ON: {url} has no host, and this node no address"))?;
    Ok(format!("tcp://{}:{port}", bracketed(ip)))
}

/// The address of those that other nodes are told: the first that is not this node's own business, IPv4 before IPv6.
fn preferred(own: impl IntoIterator<Item = IpAddr>) -> Option<IpAddr> {
    own.into_iter().filter(|ip| !ip.is_loopback()).min_by_key(IpAddr::is_ipv6)
}

/// As it stands in a URL.
fn bracketed(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(own: &[&str]) -> Option<String> {
        preferred(own.iter().map(|ip| ip.parse().unwrap())).map(bracketed)
    }

    #[test]
    fn of_the_nodes_addresses_ipv4_is_preferred() {
        assert_eq!(first(&["fd00::1", "10.0.0.2", "10.0.0.1"]).unwrap(), "10.0.0.2", "the first, not the smallest");
        assert_eq!(first(&["127.0.0.1", "::1", "fd00::2", "fd00::1"]).unwrap(), "[fd00::2]");
        assert_eq!(first(&["127.0.0.1", "::1"]), None);
    }

    #[tokio::test]
    async fn the_public_url_is_the_first_for_other_nodes() {
        let netns = Netns::current().unwrap();
        let urls = |urls: &[&str]| urls.iter().map(ToString::to_string).collect::<Vec<_>>();
        let public = async |given: &[&str]| public_url(&urls(given), &netns).await;
        assert_eq!(
            public(&["unix:///a", "tcp://10.0.0.1:5001", "tcp://10.0.0.2:5001"]).await.unwrap(),
            "tcp://10.0.0.1:5001"
        );
        assert_eq!(public(&["", "unix:///a"]).await.unwrap(), "unix:///a");
        let error = public(&["", ""]).await.unwrap_err().to_string();
        assert_eq!(error, "NSM_LISTEN_ON: empty");
        // Without a host: an address of this machine, where it has one.
        match public(&["tcp://:5001"]).await {
            Ok(url) => {
                assert!(Address::parse(&url).is_ok() && url.ends_with(":5001"), "{url}");
                assert!(!url.contains("127.0.0.1") && !url.contains("[::1]"), "{url}");
            }
            Err(cause) => assert!(cause.to_string().contains("tcp://:5001 has no host"), "{cause}"),
        }
    }
}
