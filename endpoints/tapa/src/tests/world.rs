//! A TAPA's surroundings: an NSP and an NSM in memory.

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
use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering::SeqCst},
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::watch,
    task::JoinHandle,
};
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response};

pub(super) const LIMIT: Duration = Duration::from_secs(20);

/// What the NSP knows.
#[derive(Clone)]
pub(super) struct Nsp {
    pub(super) targets: Arc<watch::Sender<Vec<Target>>>,
    streams: Arc<watch::Sender<Vec<nsp::Stream>>>,
    pub(super) vips: Arc<watch::Sender<Vec<String>>>,
    /// Every registration and renewal as it was asked for.
    pub(super) registered: Arc<watch::Sender<Vec<Target>>>,
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
        self.registered.send_modify(|registered| registered.push(new.clone()));
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
pub(super) struct Mesh(pub(super) Arc<Inner>);

pub(super) struct Inner {
    connection: Mutex<Option<Connection>>,
    pub(super) requests: Mutex<Vec<NetworkServiceRequest>>,
    status: watch::Sender<ConnectionStatus>,
    /// VIPs cannot be set.
    pub(super) fail: AtomicBool,
    /// The manager does not answer.
    pub(super) away: AtomicBool,
    /// The wire does not work.
    pub(super) dead: AtomicBool,
    /// How often that was asked for.
    asked: watch::Sender<usize>,
}

impl Mesh {
    fn new() -> Self {
        let status = watch::Sender::new(ConnectionStatus::New);
        Self(Arc::new(Inner {
            connection: Mutex::default(),
            requests: Mutex::default(),
            status,
            fail: false.into(),
            away: false.into(),
            dead: false.into(),
            asked: watch::Sender::new(0),
        }))
    }

    pub(super) fn lose(&self) {
        let current = self.0.connection.lock().unwrap().clone().unwrap();
        self.0.status.send_replace(ConnectionStatus::Down(Box::new(current)));
    }

    /// Healing has closed the old branch and looks for another one.
    pub(super) fn reselect(&self) {
        self.0.status.send_replace(ConnectionStatus::Closed);
    }

    pub(super) fn heal(&self) {
        let current = self.0.connection.lock().unwrap().clone().unwrap();
        self.0.status.send_replace(ConnectionStatus::Up(Box::new(current)));
    }

    /// Waits until the wire was asked for so often again.
    pub(super) async fn asked(&self, times: usize) {
        let mut asked = self.0.asked.subscribe();
        let wanted = *asked.borrow() + times;
        tokio::time::timeout(LIMIT, asked.wait_for(|asked| *asked >= wanted)).await.expect("not asked").unwrap();
    }

    pub(super) fn context(&self) -> Option<IpContext> {
        self.0.connection.lock().unwrap().clone()?.context?.ip_context
    }

    /// Another proxy: other addresses.
    pub(super) fn renumber(&self, subnet: u8) {
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
        match self.0.away.load(SeqCst) {
            true => Err(Error::new("mesh", "", "away")),
            false => Ok(self.0.connection.lock().unwrap().clone()),
        }
    }

    async fn request(&self, request: NetworkServiceRequest) -> Result<Connection, Error> {
        self.0.requests.lock().unwrap().push(request.clone());
        let changes =
            request.connection.iter().flat_map(|connection| &connection.context).any(|ctx| ctx.ip_context.is_some());
        if changes && self.0.fail.load(SeqCst) {
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
        self.0.asked.send_modify(|asked| *asked += 1);
        !self.0.dead.load(SeqCst)
    }
}

pub(super) struct World {
    pub(super) nsp: Nsp,
    pub(super) mesh: Mesh,
    address: Address,
    dir: tempfile::TempDir,
    pub(super) settings: Settings,
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

pub(super) struct Tapa {
    pub(super) board: Board,
    store: Store,
    stop: CancellationToken,
    task: JoinHandle<()>,
    /// Its own, so that killing it ends all its tasks.
    runtime: Option<Runtime>,
}

impl Drop for Tapa {
    fn drop(&mut self) {
        self.runtime.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

impl World {
    pub(super) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("nsp.sock"));
        let stream = nsp::Stream { name: "s".into(), max_targets: 3, conduit: None };
        let nsp = Nsp {
            targets: Arc::new(watch::Sender::new(Vec::new())),
            streams: Arc::new(watch::Sender::new(vec![stream])),
            vips: Arc::new(watch::Sender::new(vec!["20.0.0.1/32".into()])),
            registered: Arc::default(),
        };
        let listener = Listener::bind(&address).await.unwrap();
        let routes = Routes::new(TargetRegistryServer::new(nsp.clone()))
            .add_service(ConfigurationManagerServer::new(nsp.clone()));
        tokio::spawn(
            async move { Transport::insecure().serve(vec![listener], routes, CancellationToken::new()).await },
        );
        Self { nsp, mesh: Mesh::new(), address, dir, settings: settings() }
    }

    pub(super) fn start(&self) -> Tapa {
        let store = Store::open(self.dir.path(), "t").unwrap();
        let board = Board::new(store.streams().into_iter().map(|saved| saved.key));
        let network = Box::new(Fakes(self.address.clone(), self.mesh.clone()));
        let shared = Shared { settings: self.settings.clone(), board: board.clone(), store: store.clone(), network };
        let stop = CancellationToken::new();
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let task = runtime.spawn(supervise(Arc::new(shared), stop.clone()));
        Tapa { board, store, stop, task, runtime: Some(runtime) }
    }

    pub(super) async fn targets(&self, what: &str, wanted: impl Fn(&[Target]) -> bool) -> Vec<Target> {
        let mut targets = self.nsp.targets.subscribe();
        let found = tokio::time::timeout(LIMIT, targets.wait_for(|targets| wanted(targets))).await;
        found.unwrap_or_else(|_| panic!("{what}")).unwrap().clone()
    }

    /// What is asked for from now on, once there is so much of it.
    pub(super) fn registrations(&self, count: usize) -> impl Future<Output = Vec<Target>> {
        let mut registered = self.nsp.registered.subscribe();
        let begin = registered.borrow().len();
        async move {
            let found = tokio::time::timeout(LIMIT, registered.wait_for(|all| all.len() >= begin + count)).await;
            found.expect("not registered").unwrap()[begin..].to_vec()
        }
    }

    pub(super) fn enabled(&self) -> Vec<Target> {
        self.nsp.targets.borrow().iter().filter(|target| target.status() == Status::Enabled).cloned().collect()
    }
}

impl Tapa {
    pub(super) fn open(&self, stream: &str) -> StreamKey {
        let key = StreamKey { conduit: conduit("c"), stream: stream.into() };
        self.board.open(key.clone()).unwrap();
        self.store.set_streams(&self.board.all());
        key
    }

    pub(super) async fn reaches(&self, key: &StreamKey, status: Shown) {
        let mut board = self.board.subscribe();
        let wait = board.wait_for(|streams| streams.get(key) == Some(&status));
        tokio::time::timeout(LIMIT, wait).await.unwrap_or_else(|_| panic!("not {status:?}")).unwrap();
    }

    /// Dropped without a word, like a process that is killed.
    pub(super) async fn kill(self) {
        drop(self);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    pub(super) async fn end(mut self) {
        self.stop.cancel();
        tokio::time::timeout(LIMIT, &mut self.task).await.unwrap().unwrap();
    }
}
