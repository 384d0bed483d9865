//! Client, manager and endpoint as they would run in three processes: gRPC over unix sockets, mTLS, policies on,
//! descriptors beside the stream.

// Tests state what they expect by unwrapping it.
#![allow(clippy::unwrap_used)]

use futures_util::StreamExt;
use nsm_chain::{
    Client, Connection, ConnectionEventType, Endpoint, Mechanism, MonitorScopeSelector, NetworkServiceRequest, Side,
    elements::{
        authorize::Policies,
        connect::ConnectServer,
        heal::{ConnectionStatus, Liveness, LivenessCheck},
        kernel_mechanism::{KERNEL, KernelClient, KernelServer},
        mechanisms::Mechanisms,
        recvfd::{RecvFdClient, RecvFdServer},
        sendfd::{SendFdClient, SendFdServer},
    },
    remote::Grpc,
    token,
};
use nsm_identity::{Authority, X509Source};
use nsm_transport::{Address, Listener, Transport};
use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

const HOUR: Duration = Duration::from_secs(3600);
const TIMEOUT: Duration = Duration::from_secs(10);

struct World {
    authority: Authority,
    /// One identity per process: its transport and its tokens use the same key.
    sources: Mutex<HashMap<String, X509Source>>,
    folder: tempfile::TempDir,
}

struct Process {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Process {
    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

impl World {
    fn new() -> Self {
        let authority = Authority::generate("example.org").unwrap();
        Self { authority, sources: Mutex::default(), folder: tempfile::tempdir().unwrap() }
    }

    fn source(&self, name: &str) -> X509Source {
        let issue = || self.authority.source(&format!("/{name}"), HOUR).unwrap();
        self.sources.lock().unwrap().entry(name.to_owned()).or_insert_with(issue).clone()
    }

    fn transport(&self, name: &str) -> Transport {
        Transport::new(self.source(name)).unwrap()
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn url(&self, name: &str) -> String {
        format!("unix://{}", self.socket(name).display())
    }

    fn endpoint(&self, name: &str) -> nsm_chain::EndpointBuilder {
        Endpoint::builder(name, token::from_source(self.source(name), HOUR))
    }

    async fn serve(&self, name: &str, endpoint: &Endpoint) -> Process {
        let listener = Listener::bind(&Address::parse(&self.url(name)).unwrap()).await.unwrap();
        let (transport, routes, stop) = (self.transport(name), endpoint.service().routes(), CancellationToken::new());
        let until = stop.clone();
        let task = tokio::spawn(async move { transport.serve(vec![listener], routes, until).await.unwrap() });
        Process { stop, task }
    }

    fn nse(&self) -> Endpoint {
        let kernel = Mechanisms::new(Side::Server).with(KERNEL, KernelServer::new());
        self.endpoint("nse").element(kernel).element(SendFdServer).build()
    }

    fn manager(&self) -> Endpoint {
        let client = Client::builder("mgr", Arc::new(Grpc::new(self.transport("mgr"))))
            .url(self.url("nse"))
            .passthrough()
            .element(RecvFdClient::new())
            .element(SendFdClient)
            .build();
        self.endpoint("mgr")
            .element(RecvFdServer::new())
            .element(ConnectServer::new(client.chain().clone()))
            .element(SendFdServer)
            .build()
    }

    fn client(&self) -> Client {
        let kernel = Mechanisms::new(Side::Client).with(KERNEL, KernelClient::new());
        Client::builder("nsc", Arc::new(Grpc::new(self.transport("nsc"))))
            .url(self.url("mgr"))
            .liveness(LivenessCheck::new(Arc::new(Always)))
            .element(kernel)
            .element(SendFdClient)
            .build()
    }
}

struct Always;

#[tonic::async_trait]
impl Liveness for Always {
    async fn alive(&self, _: &Connection, _: Duration) -> bool {
        true
    }
}

fn request() -> NetworkServiceRequest {
    let connection = Connection { id: "nsc-0".into(), network_service: "svc".into(), ..Default::default() };
    let kernel = Mechanism { cls: "LOCAL".into(), r#type: KERNEL.into(), ..Default::default() };
    NetworkServiceRequest { connection: Some(connection), mechanism_preferences: vec![kernel] }
}

fn names(connection: &Connection) -> Vec<&str> {
    connection.path.as_ref().unwrap().path_segments.iter().map(|segment| &*segment.name).collect()
}

// Conformance 88, 92
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_through_three_processes() {
    let world = World::new();
    let (nse, manager) = (world.nse(), world.manager());
    let processes = (world.serve("nse", &nse).await, world.serve("mgr", &manager).await);
    let client = world.client();
    let mut events = client.monitor(MonitorScopeSelector::default()).await.unwrap();
    let connection = client.request(request(), TIMEOUT).await.unwrap();
    assert_eq!(names(&connection), ["nsc", "mgr", "nse"]);
    assert_eq!((connection.id.as_str(), connection.path.as_ref().unwrap().index), ("nsc-0", 0));
    assert!(connection.path.as_ref().unwrap().path_segments.iter().all(|segment| !segment.token.is_empty()));

    // A refresh keeps ids and length.
    let ids = |connection: &Connection| {
        let path = connection.path.clone().unwrap();
        path.path_segments.into_iter().map(|segment| segment.id).collect::<Vec<_>>()
    };
    let again = NetworkServiceRequest { connection: Some(connection.clone()), ..Default::default() };
    assert_eq!(ids(&client.request(again, TIMEOUT).await.unwrap()), ids(&connection));

    let kind = async |events: &mut nsm_chain::EventStream| events.next().await.unwrap().unwrap().r#type();
    assert_eq!(kind(&mut events).await, ConnectionEventType::InitialStateTransfer);
    assert_eq!(kind(&mut events).await, ConnectionEventType::Update);

    // What a later run of the client would find.
    let found = world.client().find("nsc-0").await.unwrap().unwrap();
    assert_eq!((found.id.as_str(), names(&found)), ("nsc-0", vec!["nsc", "mgr", "nse"]));
    assert!(world.client().find("nsc-1").await.unwrap().is_none());

    client.close(connection, TIMEOUT).await.unwrap();
    assert!(nse.hub().connections().is_empty() && manager.hub().connections().is_empty());
    assert!(client.connection("nsc-0").is_none());
    processes.1.stop().await;
    processes.0.stop().await;
}

// Conformance 46, 54
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_manager_is_told_again() {
    let world = World::new();
    let nse = world.nse();
    let nse_process = world.serve("nse", &nse).await;
    let manager = world.serve("mgr", &world.manager()).await;
    let client = world.client();
    let connection = client.request(request(), TIMEOUT).await.unwrap();
    let mut status = client.watch("nsc-0");
    manager.stop().await;
    let down = |status: &ConnectionStatus| matches!(status, ConnectionStatus::Down(_));
    tokio::time::timeout(TIMEOUT, status.wait_for(down)).await.unwrap().unwrap();
    let manager = world.manager();
    let process = world.serve("mgr", &manager).await;
    tokio::time::timeout(TIMEOUT, status.wait_for(ConnectionStatus::is_up)).await.unwrap().unwrap();
    let healed = client.connection("nsc-0").unwrap();
    assert_eq!(healed.path.unwrap().path_segments[2].id, connection.path.as_ref().unwrap().path_segments[2].id);
    assert_eq!((manager.hub().connections().len(), nse.hub().connections().len()), (1, 1));
    client.close(connection, TIMEOUT).await.unwrap();
    assert!(nse.hub().connections().is_empty());
    process.stop().await;
    nse_process.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused() {
    let (world, other) = (World::new(), World::new());
    let process = world.serve("nse", &world.nse()).await;
    let client = Client::builder("nsc", Arc::new(Grpc::new(other.transport("nsc")))).url(world.url("nse")).build();
    assert!(client.request(request(), Duration::from_secs(2)).await.is_err());
    process.stop().await;
}

/// A hop whose tokens are not by the key that it has shown is somebody else's.
#[tokio::test(flavor = "multi_thread")]
async fn a_hop_that_signs_with_another_key_is_refused_and_told_to_close() {
    let world = World::new();
    let stolen = world.authority.source("/nse", HOUR).unwrap();
    let nse = Endpoint::builder("nse", token::from_source(stolen, HOUR)).build();
    let process = world.serve("nse", &nse).await;
    let client = || Client::builder("nsc", Arc::new(Grpc::new(world.transport("nsc")))).url(world.url("nse"));
    let careful = client().build();
    let error = careful.request(request(), TIMEOUT).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::PermissionDenied, "{error}");
    let text = error.to_string();
    assert!(text.contains("the token of nse: ") && text.contains("not by the certificate's key"), "{text}");
    assert!(nse.hub().connections().is_empty() && careful.connection("nsc-0").is_none());
    // Who does not want to know gets it.
    let trusting = client().policies(Policies::any()).build();
    let connection = trusting.request(request(), TIMEOUT).await.unwrap();
    assert_eq!(nse.hub().connections().len(), 1);
    trusting.close(connection, TIMEOUT).await.unwrap();
    process.stop().await;
}
