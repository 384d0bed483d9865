//! A whole TAPA against an NSP and an NSM in memory.

use super::*;
use crate::{board::Board, names::StreamKey};
use futures_util::stream::{BoxStream, StreamExt};
use meridio_proto::{
    ambassador::v1::stream_status::Status as Shown,
    nsp::v1::{
        self as nsp, Target, TargetResponse,
        configuration_manager_server::{ConfigurationManager, ConfigurationManagerServer},
        target::Status,
        target_registry_server::{TargetRegistry, TargetRegistryServer},
    },
};
use nsm_chain::{
    Connection, ConnectionContext, Error, IpContext, NetworkServiceRequest, elements::heal::ConnectionStatus,
};
use std::{sync::Mutex, time::Instant};
use tokio::{sync::watch, task::JoinHandle};
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response};

const LIMIT: Duration = Duration::from_secs(20);

/// What the NSP knows.
#[derive(Clone)]
struct Nsp {
    targets: Arc<watch::Sender<Vec<Target>>>,
    streams: Arc<watch::Sender<Vec<nsp::Stream>>>,
    vips: Arc<watch::Sender<Vec<String>>>,
}

type Answers<T> = BoxStream<'static, Result<T, tonic::Status>>;

fn answers<V, T>(sender: &watch::Sender<V>, map: impl Fn(V) -> T + Send + 'static) -> Response<Answers<T>>
where
    V: Clone + Send + Sync + 'static,
    T: Send + 'static,
{
    Response::new(WatchStream::new(sender.subscribe()).map(move |value| Ok(map(value))).boxed())
}

#[tonic::async_trait]
impl TargetRegistry for Nsp {
    type WatchStream = Answers<TargetResponse>;

    async fn register(&self, request: Request<Target>) -> Result<Response<()>, tonic::Status> {
        let mut new = request.into_inner();
        self.targets.send_modify(|targets| {
            match targets.iter_mut().find(|target| target.ips == new.ips) {
                Some(target) => *target = new,
                None => {
                    new.set_status(Status::Disabled);
                    targets.push(new);
                }
            };
        });
        Ok(Response::new(()))
    }

    async fn unregister(&self, request: Request<Target>) -> Result<Response<()>, tonic::Status> {
        self.targets.send_modify(|targets| targets.retain(|target| target.ips != request.get_ref().ips));
        Ok(Response::new(()))
    }

    async fn watch(&self, _: Request<Target>) -> Result<Response<Self::WatchStream>, tonic::Status> {
        Ok(answers(&self.targets, |targets| TargetResponse { targets }))
    }
}

macro_rules! silent {
    ($($name:ident $stream:ident $request:ty, $response:ty;)*) => {
        #[tonic::async_trait]
        impl ConfigurationManager for Nsp {
            type WatchStreamStream = Answers<nsp::StreamResponse>;
            type WatchFlowStream = Answers<nsp::FlowResponse>;
            $(type $stream = Answers<$response>;)*

            async fn watch_stream(&self, _: Request<nsp::Stream>) -> Result<Response<Self::WatchStreamStream>, tonic::Status> {
                Ok(answers(&self.streams, |streams| nsp::StreamResponse { streams }))
            }

            async fn watch_flow(&self, _: Request<nsp::Flow>) -> Result<Response<Self::WatchFlowStream>, tonic::Status> {
                Ok(answers(&self.vips, |vips| {
                    let vip = |address| nsp::Vip { address, ..nsp::Vip::default() };
                    let vips = vips.into_iter().map(vip).collect();
                    nsp::FlowResponse { flows: vec![nsp::Flow { vips, ..nsp::Flow::default() }] }
                }))
            }

            $(async fn $name(&self, _: Request<$request>) -> Result<Response<Self::$stream>, tonic::Status> {
                Ok(Response::new(futures_util::stream::pending().boxed()))
            })*
        }
    };
}

silent! {
    watch_trench WatchTrenchStream nsp::Trench, nsp::TrenchResponse;
    watch_conduit WatchConduitStream nsp::Conduit, nsp::ConduitResponse;
    watch_vip WatchVipStream nsp::Vip, nsp::VipResponse;
    watch_attractor WatchAttractorStream nsp::Attractor, nsp::AttractorResponse;
    watch_gateway WatchGatewayStream nsp::Gateway, nsp::GatewayResponse;
}

/// The manager, forwarder and proxy of a node: what outlives a TAPA.
#[derive(Clone)]
struct Mesh(Arc<Inner>);

struct Inner {
    connection: Mutex<Option<Connection>>,
    requests: Mutex<Vec<NetworkServiceRequest>>,
    status: watch::Sender<ConnectionStatus>,
    fail: std::sync::atomic::AtomicBool,
}

impl Mesh {
    fn new() -> Self {
        let status = watch::Sender::new(ConnectionStatus::New);
        Self(Arc::new(Inner { connection: Mutex::default(), requests: Mutex::default(), status, fail: false.into() }))
    }

    fn context(&self) -> Option<IpContext> {
        self.0.connection.lock().unwrap().clone()?.context?.ip_context
    }

    /// Another proxy: other addresses.
    fn renumber(&self, subnet: u8) {
        let mut current = self.0.connection.lock().unwrap();
        let connection = current.as_mut().unwrap();
        connection.context = Some(addresses(subnet));
        self.0.status.send_replace(ConnectionStatus::Up(Box::new(connection.clone())));
    }
}

fn addresses(subnet: u8) -> ConnectionContext {
    let ip_context = IpContext {
        src_ip_addrs: vec![format!("172.16.{subnet}.6/24")],
        extra_prefixes: vec![format!("172.16.{subnet}.1/24")],
        ..IpContext::default()
    };
    ConnectionContext { ip_context: Some(ip_context), ..ConnectionContext::default() }
}

#[async_trait::async_trait]
impl Wire for Mesh {
    async fn find(&self) -> Result<Option<Connection>, Error> {
        Ok(self.0.connection.lock().unwrap().clone())
    }

    async fn request(&self, request: NetworkServiceRequest) -> Result<Connection, Error> {
        self.0.requests.lock().unwrap().push(request.clone());
        let changes =
            request.connection.iter().flat_map(|connection| &connection.context).any(|ctx| ctx.ip_context.is_some());
        if changes && self.0.fail.load(std::sync::atomic::Ordering::SeqCst) {
            return Err(Error::new("mesh", "", "told to fail"));
        }
        let mut connection = request.connection.unwrap();
        connection.context.get_or_insert_default().ip_context.get_or_insert_with(|| addresses(1).ip_context.unwrap());
        *self.0.connection.lock().unwrap() = Some(connection.clone());
        self.0.status.send_replace(ConnectionStatus::Up(Box::new(connection.clone())));
        Ok(connection)
    }

    async fn close(&self, _: Connection) -> Result<(), Error> {
        *self.0.connection.lock().unwrap() = None;
        self.0.status.send_replace(ConnectionStatus::Closed);
        Ok(())
    }

    fn watch(&self) -> watch::Receiver<ConnectionStatus> {
        self.0.status.subscribe()
    }

    async fn alive(&self, _: &Connection) -> bool {
        true
    }
}

struct World {
    nsp: Nsp,
    mesh: Mesh,
    address: Address,
    dir: tempfile::TempDir,
}

struct Fakes(Address, Mesh);

impl Network for Fakes {
    fn nsp(&self, _: &str) -> Result<Channel, nsm_transport::Error> {
        Ok(Transport::insecure().channel(&self.0))
    }

    fn wire(&self, _: &Settings, _: &ConduitKey, interface: &str) -> Arc<dyn Wire> {
        assert_eq!(interface, "nsm-0");
        Arc::new(self.1.clone())
    }
}

struct Tapa {
    board: Board,
    store: Store,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("nsp.sock"));
        let stream = nsp::Stream { name: "s".into(), max_targets: 3, conduit: None };
        let nsp = Nsp {
            targets: Arc::new(watch::Sender::new(Vec::new())),
            streams: Arc::new(watch::Sender::new(vec![stream])),
            vips: Arc::new(watch::Sender::new(vec!["20.0.0.1/32".into()])),
        };
        let listener = Listener::bind(&address).await.unwrap();
        let routes = Routes::new(TargetRegistryServer::new(nsp.clone()))
            .add_service(ConfigurationManagerServer::new(nsp.clone()));
        tokio::spawn(
            async move { Transport::insecure().serve(vec![listener], routes, CancellationToken::new()).await },
        );
        Self { nsp, mesh: Mesh::new(), address, dir }
    }

    fn start(&self) -> Tapa {
        let store = Store::open(self.dir.path(), "t").unwrap();
        let board = Board::new(store.streams().into_iter().map(|saved| saved.key));
        let network = Box::new(Fakes(self.address.clone(), self.mesh.clone()));
        let shared = Shared { settings: settings(), board: board.clone(), store: store.clone(), network };
        let stop = CancellationToken::new();
        let task = tokio::spawn(supervise(Arc::new(shared), stop.clone()));
        Tapa { board, store, stop, task }
    }

    async fn targets(&self, what: &str, wanted: impl Fn(&[Target]) -> bool) -> Vec<Target> {
        let mut targets = self.nsp.targets.subscribe();
        let found = tokio::time::timeout(LIMIT, targets.wait_for(|targets| wanted(targets))).await;
        found.unwrap_or_else(|_| panic!("{what}")).unwrap().clone()
    }

    fn enabled(&self) -> Vec<Target> {
        self.nsp.targets.borrow().iter().filter(|target| target.status() == Status::Enabled).cloned().collect()
    }
}

impl Tapa {
    fn open(&self, stream: &str) -> StreamKey {
        let key = StreamKey { conduit: conduit("c"), stream: stream.into() };
        self.board.open(key.clone()).unwrap();
        self.store.set_streams(&self.board.all());
        key
    }

    async fn reaches(&self, key: &StreamKey, status: Shown) {
        let mut board = self.board.subscribe();
        let wait = board.wait_for(|streams| streams.get(key) == Some(&status));
        tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("not {status:?}")).unwrap();
    }

    async fn end(self) {
        self.stop.cancel();
        tokio::time::timeout(LIMIT, self.task).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn open_close_and_end() {
    let world = World::new().await;
    let tapa = world.start();
    let begin = Instant::now();
    let key = tapa.open("s");
    tapa.reaches(&key, Shown::Open).await;
    assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
    let target = world.enabled().remove(0);
    assert_eq!(target.ips, ["172.16.1.6/24"]);
    let context = world.mesh.context().unwrap();
    assert_eq!(context.src_ip_addrs, ["172.16.1.6/24", "20.0.0.1/32"]);
    assert_eq!(context.policies[0].routes[0].next_hop, "172.16.1.1");

    world.nsp.vips.send_replace(vec!["20.0.0.1/32".into(), "2000::1/128".into()]);
    let wait = async {
        while world.mesh.context().unwrap().policies.len() != 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.unwrap();

    tapa.board.close(&key);
    world.targets("not unregistered", <[Target]>::is_empty).await;
    let key = tapa.open("s");
    tapa.reaches(&key, Shown::Open).await;
    tapa.end().await;
    assert!(world.nsp.targets.borrow().is_empty());
    assert!(world.mesh.context().is_none(), "the connection is closed");
}

#[tokio::test]
async fn a_killed_tapa_goes_on_where_it_was() {
    let world = World::new().await;
    let tapa = world.start();
    let key = tapa.open("s");
    tapa.reaches(&key, Shown::Open).await;
    let (before, context) = (world.enabled(), world.mesh.context());
    // Dropped without a word, like a process that is killed.
    tapa.task.abort();
    let _ = tapa.task.await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!((world.enabled(), world.mesh.context()), (before.clone(), context.clone()), "nothing is taken back");
    world.mesh.0.requests.lock().unwrap().clear();

    let tapa = world.start();
    tapa.reaches(&key, Shown::Open).await;
    assert_eq!((world.enabled(), world.mesh.context()), (before, context));
    for request in world.mesh.0.requests.lock().unwrap().iter() {
        let sent = request.connection.clone().unwrap().context.unwrap().ip_context.unwrap();
        assert!(sent.src_ip_addrs.contains(&"20.0.0.1/32".to_owned()), "VIPs stay on the interface");
    }
    tapa.end().await;
}

#[tokio::test]
async fn a_full_stream_and_an_unknown_one() {
    let world = World::new().await;
    let other = |n: u32| Target {
        ips: vec![format!("172.16.9.{n}/24")],
        context: [("identifier".to_owned(), n.to_string())].into(),
        ..Target::default()
    };
    world.nsp.targets.send_replace(vec![other(1), other(2), other(3)]);
    let tapa = world.start();
    let (full, unknown) = (tapa.open("s"), tapa.open("unknown"));
    tapa.reaches(&unknown, Shown::Undefined).await;
    tapa.reaches(&full, Shown::Unavailable).await;
    assert_eq!(world.enabled().len(), 3);
    world.nsp.targets.send_modify(|targets| drop(targets.remove(1)));
    tapa.reaches(&full, Shown::Open).await;
    let own = world.enabled().into_iter().find(|target| target.ips[0].starts_with("172.16.1.")).unwrap();
    assert_eq!(own.context["identifier"], "2");
    tapa.end().await;
}

#[tokio::test]
async fn new_addresses_are_registered_with_the_same_identifier_and_an_expired_entry_again() {
    let world = World::new().await;
    let tapa = world.start();
    let key = tapa.open("s");
    tapa.reaches(&key, Shown::Open).await;
    let identifier = world.enabled().remove(0).context["identifier"].clone();
    world.mesh.renumber(2);
    let is = |targets: &[Target], ip: &str| {
        targets.len() == 1 && targets[0].ips == [ip] && targets[0].status() == Status::Enabled
    };
    let moved = world.targets("not moved", |targets| is(targets, "172.16.2.6/24")).await;
    assert_eq!(moved[0].context["identifier"], identifier);
    world.nsp.targets.send_modify(Vec::clear);
    let again = world.targets("not registered again", |targets| is(targets, "172.16.2.6/24")).await;
    assert_eq!(again[0].context["identifier"], identifier);
    tapa.end().await;
}

#[tokio::test]
async fn traffic_is_asked_for_only_when_the_vips_are_there() {
    let world = World::new().await;
    let tapa = world.start();
    // Connected, but the forwarder refuses to set addresses.
    world.mesh.0.fail.store(true, std::sync::atomic::Ordering::SeqCst);
    let key = tapa.open("s");
    world.targets("not registered", |targets| !targets.is_empty()).await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert!(world.enabled().is_empty());
    tapa.reaches(&key, Shown::Pending).await;
    world.mesh.0.fail.store(false, std::sync::atomic::Ordering::SeqCst);
    tapa.reaches(&key, Shown::Open).await;
    tapa.end().await;
}
