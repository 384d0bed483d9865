//! The Rust side of a scenario: a client and an endpoint in the test's own process, and pings over what they were given.

use std::net::IpAddr;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use nsm_chain::elements::authorize::Policies;
use nsm_chain::elements::heal::LivenessCheck;
use nsm_chain::elements::mechanisms::Mechanisms;
use nsm_chain::elements::sendfd::{SendFdClient, SendFdServer};
use nsm_chain::remote::Grpc;
use nsm_chain::{
    Client, CloseCall, Connection, Element, Endpoint, Error, IpContext, Mechanism, MonitorScopeSelector,
    NetworkServiceRequest, Next, PathSegment, PolicyRoute, RequestCall, Route, Side, token,
};
use nsm_identity::X509Source;
use nsm_kernel::Netns;
use nsm_kernel::ping::Pinger;
use nsm_registry::{NetworkService, NetworkServiceEndpoint, RegistryClient};
use nsm_transport::{Address, Listener};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::mesh::{Mesh, TOKEN_LIFETIME};

const TIMEOUT: Duration = Duration::from_secs(5);

fn kernel(netns: &Netns, name: &str) -> Mechanism {
    let url = format!("file:///proc/self/fd/{}", netns.fd().as_raw_fd());
    let parameters = [("inodeURL".to_owned(), url), ("name".to_owned(), name.to_owned())].into();
    Mechanism { cls: "LOCAL".into(), r#type: "KERNEL".into(), parameters }
}

/// Gives the nth connection the network 172.16.n.0/24, and an interface `svc-n` in a namespace that is not the process's own.
#[derive(Clone)]
struct Serve {
    netns: Netns,
    numbers: Arc<Mutex<Vec<String>>>,
    requests: Arc<AtomicUsize>,
    closes: Arc<AtomicUsize>,
}

impl Serve {
    /// Number of the connection, from 1; the same at every refresh.
    fn number(&self, id: &str) -> usize {
        let mut numbers = self.numbers.lock().unwrap_or_else(PoisonError::into_inner);
        let known = numbers.iter().position(|known| known == id);
        known.unwrap_or_else(|| {
            numbers.push(id.to_owned());
            numbers.len() - 1
        }) + 1
    }
}

#[async_trait::async_trait]
impl Element for Serve {
    fn name(&self) -> &'static str {
        "serve"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let connection = call.connection_mut();
        let n = self.number(&connection.id);
        connection.mechanism = Some(kernel(&self.netns, &format!("svc-{n}")));
        let context = connection.context.get_or_insert_default();
        context.mtu = 1400;
        let route = Route { prefix: "0.0.0.0/0".into(), next_hop: format!("172.16.{n}.1") };
        context.ip_context = Some(IpContext {
            src_ip_addrs: vec![format!("172.16.{n}.2/24"), format!("fd00:{n}::2/64"), "20.0.0.1/32".into()],
            dst_ip_addrs: vec![format!("172.16.{n}.1/24"), format!("fd00:{n}::1/64")],
            policies: vec![PolicyRoute { from: "20.0.0.1/32".into(), routes: vec![route], ..Default::default() }],
            ..Default::default()
        });
        next.request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.closes.fetch_add(1, Ordering::SeqCst);
        next.close(call).await
    }
}

/// An endpoint, registered at the manager for as long as it lives.
pub struct OurEndpoint {
    serve: Serve,
    registry: RegistryClient,
    registration: NetworkServiceEndpoint,
    stop: CancellationToken,
}

impl OurEndpoint {
    /// Serves `service` with interfaces in `netns`.
    ///
    /// # Errors
    /// If it cannot listen or register.
    pub async fn start(mesh: &Mesh, identity: &X509Source, service: &str, netns: &Netns) -> Result<Self> {
        let serve =
            Serve { netns: netns.clone(), numbers: Arc::default(), requests: Arc::default(), closes: Arc::default() };
        let endpoint = Endpoint::builder("nse", token::from_source(identity.clone(), TOKEN_LIFETIME))
            .policies(Policies::server())
            .element(Mechanisms::new(Side::Server).with("KERNEL", serve.clone()))
            .element(SendFdServer)
            .build();
        let url = mesh.socket("nse.sock");
        let listener = Listener::bind(&Address::parse(&url)?).await?;
        let (stop, transport) = (CancellationToken::new(), Mesh::transport(identity)?);
        let (ended, routes) = (stop.clone(), endpoint.service().routes());
        tokio::spawn(async move {
            if let Err(cause) = transport.serve(vec![listener], routes, ended).await {
                println!("the endpoint does not serve: {cause}");
            }
        });
        let registry =
            RegistryClient::builder(mesh.manager(), identity.clone()).max_token_lifetime(TOKEN_LIFETIME).build()?;
        let registered = NetworkService { name: service.into(), payload: "ETHERNET".into(), ..Default::default() };
        registry.register_ns(registered).await?;
        let registration = NetworkServiceEndpoint {
            name: "nse".into(),
            network_service_names: vec![service.into()],
            url,
            ..Default::default()
        };
        registry.register_nse(registration.clone()).await?;
        Ok(Self { serve, registry, registration, stop })
    }

    /// How many requests and closes came.
    pub fn calls(&self) -> (usize, usize) {
        (self.serve.requests.load(Ordering::SeqCst), self.serve.closes.load(Ordering::SeqCst))
    }

    /// Unregisters and stops; see [`registered`].
    ///
    /// # Errors
    /// If the manager does not let it.
    pub async fn end(self) -> Result<()> {
        self.registry.unregister_nse(self.registration.clone(), None).await?;
        self.stop.cancel();
        Ok(())
    }
}

impl Drop for OurEndpoint {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Names of the endpoints of `service` that the manager finds.
///
/// # Errors
/// If it cannot be asked.
pub async fn registered(mesh: &Mesh, identity: &X509Source, service: &str) -> Result<Vec<String>> {
    let registry =
        RegistryClient::builder(mesh.manager(), identity.clone()).max_token_lifetime(TOKEN_LIFETIME).build()?;
    let query = NetworkServiceEndpoint { network_service_names: vec![service.into()], ..Default::default() };
    let ctx = nsm_registry::Context::new().with_timeout(TIMEOUT);
    let (_, endpoints) = registry.readers();
    Ok(endpoints.list(query, ctx).await?.into_iter().map(|endpoint| endpoint.name).collect())
}

/// Ids of the connections whose path has a segment `id` first, as the manager or forwarder at `url` has them.
///
/// # Errors
/// If it cannot be asked.
pub async fn connections(url: &str, identity: &X509Source, id: &str) -> Result<Vec<String>> {
    let client = Client::builder("watcher", Arc::new(Grpc::new(Mesh::transport(identity)?))).url(url).build();
    let segment = PathSegment { id: id.to_owned(), ..Default::default() };
    let selector = MonitorScopeSelector { path_segments: vec![segment], ..Default::default() };
    let mut events = client.monitor(selector).await?;
    let first = tokio::time::timeout(TIMEOUT, events.next()).await?.context("the monitor has ended")??;
    Ok(first.connections.into_keys().collect())
}

struct AlwaysAlive;

#[async_trait::async_trait]
impl nsm_chain::elements::heal::Liveness for AlwaysAlive {
    async fn alive(&self, _: &Connection, _: Duration) -> bool {
        true
    }
}

/// One connection, and the client that asks for it.
pub struct OurClient {
    client: Client,
    id: String,
    service: String,
    netns: Netns,
    interface: &'static str,
}

impl OurClient {
    /// A client called `name` whose connection to `service` has `interface` in `netns`.
    ///
    /// # Errors
    /// If the identity makes no TLS configuration.
    pub fn new(mesh: &Mesh, identity: &X509Source, name: &str, service: &str, netns: &Netns) -> Result<Self> {
        let client = Client::builder(name, Arc::new(Grpc::new(Mesh::transport(identity)?).sharing()))
            .url(mesh.manager())
            .policies(Policies::client())
            .liveness(LivenessCheck::new(Arc::new(AlwaysAlive)))
            .element(SendFdClient)
            .build();
        let (id, service) = (format!("{name}-0"), service.to_owned());
        Ok(Self { client, id, service, netns: netns.clone(), interface: "nsm-0" })
    }

    /// A second connection of the same client, with an interface of its own.
    pub fn beside(&self) -> Self {
        Self {
            client: self.client.clone(),
            id: format!("{}-beside", self.id),
            service: self.service.clone(),
            netns: self.netns.clone(),
            interface: "nsm-1",
        }
    }

    /// The client itself.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Id of its connection.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Requests the connection, or refreshes it.
    ///
    /// # Errors
    /// Those of the mesh.
    pub async fn request(&self) -> Result<Connection, Error> {
        let connection =
            Connection { id: self.id.clone(), network_service: self.service.clone(), ..Default::default() };
        let preferences = vec![kernel(&self.netns, self.interface)];
        let request = NetworkServiceRequest { connection: Some(connection), mechanism_preferences: preferences };
        self.client.request(request, TIMEOUT).await
    }

    /// Closes it.
    ///
    /// # Errors
    /// Those of the mesh.
    pub async fn close(&self) -> Result<(), Error> {
        match self.client.connection(&self.id) {
            Some(connection) => self.client.close(connection, TIMEOUT).await,
            None => Ok(()),
        }
    }
}

/// Pings without pause, and counts.
pub struct Pings {
    task: JoinHandle<()>,
    counts: Arc<(AtomicUsize, AtomicUsize)>,
}

impl Pings {
    /// Pings `destination` out of `netns`, about 50 times a second.
    ///
    /// # Errors
    /// If there is no socket for it.
    pub async fn start(netns: &Netns, destination: IpAddr) -> Result<Self> {
        let pinger = Pinger::open(netns, destination.is_ipv6(), None).await?;
        let counts = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
        let counted = counts.clone();
        let task = tokio::spawn(async move {
            loop {
                counted.0.fetch_add(1, Ordering::SeqCst);
                if !pinger.probe(destination, Duration::from_secs(1)).await {
                    counted.1.fetch_add(1, Ordering::SeqCst);
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Ok(Self { task, counts })
    }

    /// Pings sent and lost.
    pub fn counts(&self) -> (usize, usize) {
        (self.counts.0.load(Ordering::SeqCst), self.counts.1.load(Ordering::SeqCst))
    }
}

impl Drop for Pings {
    fn drop(&mut self) {
        self.task.abort();
    }
}
