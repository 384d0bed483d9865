//! A server with all stock policies behind mTLS on a unix socket, and clients that send what they like.

#![allow(clippy::unwrap_used, dead_code, unreachable_pub, reason = "shared by tests, each of which uses a part")]

use nsm_chain::{
    CloseCall, Connection, Element, Endpoint, EndpointBuilder, Error, Mechanism, NetworkServiceRequest, Next, Path,
    PathSegment, RequestCall, Side,
    elements::{
        ipam::{PointToPoint, Strict},
        mechanisms::Mechanisms,
        null::Null,
        recvfd::RecvFdServer,
    },
    token,
};
use nsm_identity::{Authority, X509Source};
use nsm_proto::networkservice::network_service_client::NetworkServiceClient;
use nsm_transport::{Address, Link, Listener, OptionalToken, Transport};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{service::interceptor::InterceptedService, transport::Channel};

pub const HOUR: Duration = Duration::from_secs(3600);
pub const LIMIT: Duration = Duration::from_secs(10);
pub const SERVER: &str = "spiffe://example.org/nse";

/// A client that is bound to nothing but the wire format.
pub type Raw = NetworkServiceClient<InterceptedService<Channel, OptionalToken>>;

/// What reaches the end of the server's chain.
#[derive(Default)]
pub struct Seen {
    pub requests: AtomicUsize,
    pub closes: AtomicUsize,
    pub last: Mutex<Connection>,
}

struct Spy(Arc<Seen>);

#[tonic::async_trait]
impl Element for Spy {
    fn name(&self) -> &'static str {
        "spy"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.0.requests.fetch_add(1, SeqCst);
        *self.0.last.lock().unwrap() = call.connection().into_owned();
        next.request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.0.closes.fetch_add(1, SeqCst);
        next.close(call).await
    }
}

pub struct World {
    pub authority: Authority,
    pub endpoint: Endpoint,
    pub seen: Arc<Seen>,
    folder: tempfile::TempDir,
    stop: CancellationToken,
    server: Option<JoinHandle<()>>,
}

impl World {
    /// An endpoint "nse" that receives descriptors, knows the mechanism KERNEL and gives addresses.
    pub async fn start() -> Self {
        Self::start_with(|builder| builder).await
    }

    /// The same, with something else about it.
    pub async fn start_with(change: impl FnOnce(EndpointBuilder) -> EndpointBuilder) -> Self {
        let authority = Authority::generate("example.org").unwrap();
        let source = authority.source("/nse", HOUR).unwrap();
        let seen = Arc::<Seen>::default();
        let prefix: ipnet::IpNet = "172.16.0.0/24".parse().unwrap();
        let endpoint = change(Endpoint::builder("nse", token::from_source(source.clone(), HOUR)))
            .element(RecvFdServer::new())
            .element(Mechanisms::new(Side::Server).with("KERNEL", Null))
            .element(Strict::new([prefix]))
            .element(PointToPoint::new([prefix]))
            .element(Spy(seen.clone()))
            .build();
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Unix(folder.path().join("nse.sock"));
        let listener = Listener::bind(&address).await.unwrap();
        let (routes, stop) = (endpoint.service().routes(), CancellationToken::new());
        let (transport, until) = (Transport::new(source).unwrap(), stop.clone());
        let server = tokio::spawn(async move { transport.serve(vec![listener], routes, until).await.unwrap() });
        Self { authority, endpoint, seen, folder, stop, server: Some(server) }
    }

    pub fn address(&self) -> Address {
        Address::Unix(self.folder.path().join("nse.sock"))
    }

    pub fn source(&self, name: &str) -> X509Source {
        self.authority.source(&format!("/{name}"), HOUR).unwrap()
    }

    pub async fn link(&self, source: &X509Source) -> Link {
        Transport::new(source.clone()).unwrap().dial(&self.address(), LIMIT).await.unwrap()
    }

    /// A client with tokens of its own identity.
    pub async fn raw(&self, name: &str) -> Raw {
        NetworkServiceClient::new(self.link(&self.source(name)).await.with_token())
    }

    pub async fn stop(&mut self) {
        self.stop.cancel();
        self.server.take().unwrap().await.unwrap();
    }

    /// Ids of the connections the server knows.
    pub fn known(&self) -> usize {
        self.endpoint.hub().connections().len()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub fn mechanism(kind: &str, parameters: &[(&str, &str)]) -> Mechanism {
    let parameters = parameters.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    Mechanism { cls: "LOCAL".into(), r#type: kind.into(), parameters }
}

/// A first request as a correct client sends it: its own segment, index 0, one preference.
pub fn request(id: &str) -> NetworkServiceRequest {
    let own = PathSegment { name: "nsc".into(), id: id.into(), ..Default::default() };
    let path = Some(Path { index: 0, path_segments: vec![own] });
    let connection = Connection { id: id.into(), network_service: "svc".into(), path, ..Default::default() };
    NetworkServiceRequest {
        connection: Some(connection),
        mechanism_preferences: vec![mechanism("KERNEL", &[("name", "nsm-0")])],
    }
}

pub fn path(request: &mut NetworkServiceRequest) -> &mut Path {
    request.connection.as_mut().unwrap().path.as_mut().unwrap()
}

pub fn timed<M>(message: M, timeout: Duration) -> tonic::Request<M> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(timeout);
    request
}

/// Open descriptors of this process.
pub fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Waits until `check` holds.
pub async fn eventually(what: &str, check: impl Fn() -> bool) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    while !check() {
        assert!(tokio::time::Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
