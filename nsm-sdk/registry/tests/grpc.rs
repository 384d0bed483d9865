//! Registry, manager's registry and clients over real connections: mTLS, tokens, descriptors, restarts.

#![allow(clippy::unwrap_used)] // Tests state what they expect by unwrapping it.

use futures_util::StreamExt;
use nsm_identity::{Authority, X509Source};
use nsm_registry::{
    ClientInfo, ClientPolicies, Dialer, Event, ManagerRegistry, NetworkService, NetworkServiceEndpoint, Registry,
    RegistryClient, Security, Upstream, service,
    store::{SqliteStore, Store},
};
use nsm_transport::{Address, Listener, Transport};
use std::{path::Path, sync::Arc, time::Duration};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

const HOUR: Duration = Duration::from_secs(3600);

/// A served registry that can be stopped as a killed process is.
struct Server {
    stop: CancellationToken,
    task: JoinHandle<()>,
    url: String,
}

impl Server {
    async fn start(
        source: &X509Source,
        url: &str,
        services: nsm_registry::Chain<NetworkService>,
        endpoints: nsm_registry::Chain<NetworkServiceEndpoint>,
    ) -> Self {
        let transport = Transport::new(source.clone()).unwrap();
        let listener = Listener::bind(&Address::parse(url).unwrap()).await.unwrap();
        let url = listener.address().to_string();
        let stop = CancellationToken::new();
        let routes = service::add_routes(Routes::default(), services, endpoints);
        let (serving, ended) = (transport, stop.clone());
        let task = tokio::spawn(async move { serving.serve(vec![listener], routes, ended).await.unwrap() });
        Self { stop, task, url }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

struct World {
    authority: Authority,
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self { authority: Authority::generate("example.org").unwrap(), folder: tempfile::tempdir().unwrap() }
    }

    fn source(&self, name: &str) -> X509Source {
        self.authority.source(&format!("/{name}"), HOUR).unwrap()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    async fn registry(&self, url: &str) -> Server {
        let source = self.source("registry");
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&self.path("registry.db")).unwrap());
        let registry = Registry::open(store, &Security::new(source.clone())).await.unwrap();
        Server::start(&source, url, registry.services, registry.endpoints).await
    }

    /// One whose tokens are signed by another key than the one it shows.
    async fn impostor(&self, url: &str) -> Server {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&self.path("impostor.db")).unwrap());
        let registry = Registry::open(store, &Security::new(self.source("registry"))).await.unwrap();
        Server::start(&self.source("registry"), url, registry.services, registry.endpoints).await
    }

    async fn manager(&self, name: &str, registry: &str) -> (Server, ManagerRegistry) {
        self.manager_with(name, registry, ClientPolicies::default()).await
    }

    async fn manager_with(
        &self,
        name: &str,
        registry: &str,
        client_policies: ClientPolicies,
    ) -> (Server, ManagerRegistry) {
        let source = self.source(name);
        let dialer = Dialer::new(
            Transport::new(source.clone()).unwrap(),
            Address::parse(registry).unwrap(),
            Duration::from_secs(2),
        );
        let chains = ManagerRegistry::new(
            Upstream::Remote(dialer),
            &format!("tcp://{name}:5001"),
            ClientInfo::default(),
            &Security { client_policies, ..Security::new(source.clone()) },
            None,
        );
        let url = format!("unix://{}", self.path(name).display());
        let server = Server::start(&source, &url, chains.services.clone(), chains.endpoints.clone()).await;
        (server, chains)
    }

    fn client(&self, name: &str, url: &str) -> RegistryClient {
        RegistryClient::builder(url, self.source(name)).build().unwrap()
    }
}

fn endpoint(name: &str, url: &str) -> NetworkServiceEndpoint {
    NetworkServiceEndpoint {
        name: name.into(),
        network_service_names: vec!["svc".into()],
        url: url.into(),
        ..Default::default()
    }
}

fn all() -> NetworkServiceEndpoint {
    endpoint("", "")
}

async fn eventually<F: Future<Output = bool>>(what: &str, check: impl Fn() -> F) {
    for _ in 0..100 {
        if check().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not within 5 s: {what}");
}

fn unix_socket(path: &Path) -> (tokio::net::UnixListener, String) {
    (tokio::net::UnixListener::bind(path).unwrap(), format!("unix://{}", path.display()))
}

// Conformance 82, 90, 110, 118
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoints_socket_travels_to_the_manager_and_to_who_finds_it() {
    let world = World::new();
    let registry = world.registry("tcp://127.0.0.1:0").await;
    let (manager, chains) = world.manager("nsmgr-a", &registry.url).await;
    let (listener, url) = unix_socket(&world.path("nse.sock"));

    let client = world.client("nse", &manager.url);
    client.register_ns(NetworkService { name: "svc".into(), ..Default::default() }).await.unwrap();
    let answer = client.register_nse(endpoint("nse", &url)).await.unwrap();
    assert_eq!(answer.url, url);
    assert_eq!(
        answer.path_ids,
        ["spiffe://example.org/nse", "spiffe://example.org/nsmgr-a", "spiffe://example.org/registry"]
    );
    assert!(answer.expiration_time.is_some());

    // The world sees the manager, the node's own processes the socket.
    let direct = world.client("anybody", &registry.url);
    assert_eq!(direct.find_nse(all()).await.unwrap()[0].url, "tcp://nsmgr-a:5001");
    let local = chains.local_endpoints.list(all(), Default::default()).await.unwrap();
    let forwarder = world.client("forwarder", &manager.url);
    let found = forwarder.find_nse(all()).await.unwrap();
    for found in [&local[0].url, &found[0].url] {
        assert!(found.starts_with("unix:///proc/"), "{found}");
        let Address::Unix(path) = Address::parse(found).unwrap() else { panic!("{found}") };
        let (dialled, accepted) = tokio::join!(tokio::net::UnixStream::connect(path), listener.accept());
        dialled.unwrap();
        accepted.unwrap();
    }

    client.unregister_nse(endpoint("nse", &url), None).await.unwrap();
    assert!(direct.find_nse(all()).await.unwrap().is_empty());
    manager.stop().await;
    registry.stop().await;
}

// Conformance 47, 112, 115, 118
#[tokio::test(flavor = "multi_thread")]
async fn restarts_of_registry_and_manager_lose_nothing() {
    let world = World::new();
    let registry = world.registry("tcp://127.0.0.1:0").await;
    let registry_url = registry.url.clone();
    let (manager, _) = world.manager("nsmgr-a", &registry_url).await;
    let (_listener, url) = unix_socket(&world.path("nse.sock"));
    let client = world.client("nse", &manager.url);
    client.register_nse(endpoint("nse", &url)).await.unwrap();

    let watcher = world.client("watcher", &manager.url);
    let mut events = watcher.watch_nse(all());
    let first = events.next().await.unwrap();
    assert!(!first.deleted && first.object.name == "nse");
    let seen = tokio::spawn(async move {
        let mut seen: Vec<Event<NetworkServiceEndpoint>> = Vec::new();
        while let Some(event) = events.next().await {
            let end = event.deleted && event.object.name == "nse";
            seen.push(event);
            if end {
                break;
            }
        }
        seen
    });

    // The registry comes back with its entries, before anybody has registered again.
    registry.stop().await;
    let registry = world.registry(&registry_url).await;
    let direct = world.client("anybody", &registry.url);
    assert_eq!(direct.find_nse(all()).await.unwrap().len(), 1);
    // The name still belongs to its owner.
    let thief = world.client("thief", &manager.url);
    let theft = thief.register_nse(endpoint("nse", "tcp://1.1.1.1:1"));
    assert!(tokio::time::timeout(Duration::from_millis(700), theft).await.is_err());
    thief.unregister_nse(endpoint("nse", ""), Some(Duration::from_millis(300))).await.unwrap_err();

    // The manager comes back knowing nothing; the endpoint tells it by itself.
    manager.stop().await;
    let (manager, chains) = world.manager("nsmgr-a", &registry_url).await;
    eventually("the endpoint is back at the manager", || async {
        chains.local_endpoints.list(all(), Default::default()).await.is_ok_and(|list| list.len() == 1)
    })
    .await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(!seen.is_finished(), "a restart was reported as a removal");

    client.unregister_nse(endpoint("nse", &url), None).await.unwrap();
    let seen = tokio::time::timeout(Duration::from_secs(5), seen).await.unwrap().unwrap();
    assert_eq!(seen.iter().filter(|event| event.deleted).count(), 1);
    manager.stop().await;
    registry.stop().await;
}

// Conformance 110
#[tokio::test(flavor = "multi_thread")]
async fn metadata_of_other_peers_is_tolerated_or_refused_but_never_fatal() {
    use nsm_proto::registry::{
        NetworkServiceEndpointQuery, network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient,
    };
    let world = World::new();
    let registry = world.registry("tcp://127.0.0.1:0").await;
    let transport = Transport::new(world.source("x")).unwrap();
    let link = transport.dial(&Address::parse(&registry.url).unwrap(), Duration::from_secs(5)).await.unwrap();
    let mut raw = NetworkServiceEndpointRegistryClient::new(link.with_token());
    let named = |name: &str, key: &'static str, value: &str| {
        let mut call = tonic::Request::new(endpoint(name, "tcp://127.0.0.1:1"));
        if !key.is_empty() {
            call.metadata_mut().insert(key, value.parse().unwrap());
        }
        call
    };
    // Peers from before the path existed, and ones that send something else there: as if it were empty.
    for (key, value) in [
        ("", ""),
        ("path", "garbage"),
        ("path", "{}"),
        ("path", r#"{"index":3}"#),
        ("path", r#"{"Index":0,"PathSegments":null}"#),
        ("grpc-timeout", "18446744073709551615S"),
        ("grpc-timeout", "99999999H"),
        ("grpc-timeout", "soon"),
    ] {
        let answer = raw.register(named("e", key, value)).await.unwrap_or_else(|status| panic!("{value}: {status}"));
        let path = answer.metadata().get("path").unwrap().to_str().unwrap().to_owned();
        assert!(path.starts_with(r#"{"Index":0,"PathSegments":[{"token":""#), "{path}");
        assert_eq!(answer.into_inner().path_ids.len(), 2);
    }
    // What is readable and wrong is refused.
    for (name, key, value) in [
        ("e", "path", r#"{"Index":5,"PathSegments":[{"token":"x"}]}"#),
        ("e", "path", r#"{"Index":18446744073709551615,"PathSegments":[{"token":"x"}]}"#),
        ("", "", ""),
    ] {
        let status = raw.register(named(name, key, value)).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{value}: {status}");
    }
    let status = raw.find(NetworkServiceEndpointQuery::default()).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
    raw.unregister(endpoint("e", "")).await.unwrap();
    registry.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_name_is_denied_and_a_missing_token_too() {
    let world = World::new();
    let registry = world.registry("tcp://127.0.0.1:0").await;
    let owner = world.client("owner", &registry.url);
    owner.register_nse(endpoint("e", "tcp://127.0.0.1:1")).await.unwrap();
    let thief = world.client("thief", &registry.url);
    let denied = thief.unregister_nse(endpoint("e", ""), Some(Duration::from_millis(500))).await.unwrap_err();
    assert_eq!(denied.code(), tonic::Code::PermissionDenied, "{denied}");

    // Behind a manager, which has not heard of the owner: the registry's refusal is one sentence still.
    let (manager, _) = world.manager("nsmgr-a", &registry.url).await;
    let patience = Duration::from_millis(500);
    let behind = RegistryClient::builder(&manager.url, world.source("thief")).patience(patience).build().unwrap();
    let denied = behind.register_nse(endpoint("e", "tcp://127.0.0.1:1")).await.unwrap_err();
    let text = denied.to_string();
    assert!(text.starts_with("spiffe://example.org/registry/authorize (e): "), "{text}");
    for word in ["authorize (", "(e)", "example.org/registry", "no sufficient privileges", "belongs to"] {
        assert_eq!(text.matches(word).count(), 1, "{word:?} once in {text}");
    }
    assert_eq!(denied.code(), tonic::Code::PermissionDenied);
    manager.stop().await;

    // TLS without tokens.
    let transport = Transport::new(world.source("x")).unwrap();
    let channel = transport.channel(&Address::parse(&registry.url).unwrap());
    let mut raw =
        nsm_proto::registry::network_service_endpoint_registry_client::NetworkServiceEndpointRegistryClient::new(
            channel,
        );
    let status = raw.register(endpoint("f", "tcp://127.0.0.1:1")).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::PermissionDenied, "{status}");
    registry.stop().await;
}

// Conformance 22, 112
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_signs_with_another_key_is_refused_and_told_to_forget() {
    const PATIENCE: Duration = Duration::from_millis(500);
    let world = World::new();
    let registry = world.impostor("tcp://127.0.0.1:0").await;
    let client = || RegistryClient::builder(&registry.url, world.source("nse")).patience(PATIENCE);
    let careful = client().build().unwrap();
    let refused = |error: nsm_registry::Error| {
        assert_eq!(error.code(), tonic::Code::PermissionDenied, "{error}");
        assert!(error.to_string().contains("next_token_signed: "), "{error}");
    };
    refused(careful.register_nse(endpoint("e", "tcp://127.0.0.1:1")).await.unwrap_err());
    refused(careful.register_ns(NetworkService { name: "svc".into(), ..Default::default() }).await.unwrap_err());
    // A try that the patience has cut short still takes itself back.
    let forgotten = || {
        eventually("nothing is registered", || async {
            let services = careful.find_ns(NetworkService::default()).await.unwrap();
            careful.find_nse(all()).await.unwrap().is_empty() && services.is_empty()
        })
    };
    forgotten().await;

    // The same for a manager in between: what it refuses fails at its client.
    let (manager, _) = world.manager("nsmgr-a", &registry.url).await;
    let behind = RegistryClient::builder(&manager.url, world.source("nse")).patience(PATIENCE).build().unwrap();
    let error = behind.register_nse(endpoint("e", "tcp://127.0.0.1:1")).await.unwrap_err();
    assert!(error.to_string().contains("spiffe://example.org/nsmgr-a/authorize (e): "), "{error}");
    refused(error);
    forgotten().await;

    // Who does not want to know gets it.
    let trusting = client().policies(ClientPolicies::none()).build().unwrap();
    trusting.register_nse(endpoint("e", "tcp://127.0.0.1:1")).await.unwrap();
    assert_eq!(careful.find_nse(all()).await.unwrap().len(), 1);
    let (manager_b, _) = world.manager_with("nsmgr-b", &registry.url, ClientPolicies::none()).await;
    let behind = RegistryClient::builder(&manager_b.url, world.source("nse")).patience(PATIENCE).build().unwrap();
    behind.register_nse(endpoint("f", "tcp://127.0.0.1:1")).await.unwrap();
    assert_eq!(careful.find_nse(all()).await.unwrap().len(), 2);
    manager.stop().await;
    manager_b.stop().await;
    registry.stop().await;
}
