//! Early proofs and bad input where the kernel is involved: namespaces stay clean, descriptors arrive.

#![allow(clippy::unwrap_used, reason = "a test states what it expects by unwrapping it")]

mod sandbox;

use nsm_chain::{
    Client, Connection, Element, Endpoint, Error, Next, RequestCall, Side,
    elements::{mechanisms::Mechanisms, null::Null, recvfd::RecvFdServer, sendfd::SendFdClient},
    remote::Grpc,
    token,
};
use nsm_kernel::Netns;
use sandbox::*;
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::sleep;
use tonic::Code;

/// The endpoint's side: addresses, its own namespace, and time that it takes.
struct Serve(Netns, Duration);

#[async_trait::async_trait]
impl Element for Serve {
    fn name(&self) -> &'static str {
        "serve"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        sleep(self.1).await;
        give(call.connection_mut(), &self.0, 1);
        next.request(call).await
    }
}

struct Scene {
    node: BehindNode,
    client_ns: Netns,
    client: Client,
}

/// A node with an endpoint that takes its time, and a client that tries once.
async fn scene(delay: Duration) -> Scene {
    let node = BehindNode::new(|nse_ns| Serve(nse_ns, delay)).await;
    let client = node.client("nsc");
    Scene { node, client_ns: Netns::anonymous().unwrap(), client }
}

impl Scene {
    async fn link(&self, netns: &Netns, name: &str) -> bool {
        netns.netlink().await.unwrap().link_by_name(name).await.unwrap().is_some()
    }

    async fn is_clean(&self) -> bool {
        !self.link(&self.client_ns, "nsm-0").await && !self.link(&self.node.nse_ns, "svc-1").await
    }
}

/// A caller that gives up while the endpoint still works leaves no interface behind, once it has said that it is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_request_leaves_no_interface() {
    let scene = scene(Duration::from_millis(400)).await;
    let offer = || kernel(netns_url(&scene.client_ns), "nsm-0");
    for _ in 0..3 {
        let error = scene.client.request(asking("c", offer()), Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
        // What was under way comes to its end, and what it made goes with it: at the endpoint too, long before its token ends.
        sleep(Duration::from_millis(600)).await;
        eventually("the namespaces are clean", || scene.is_clean()).await;
        let at_the_endpoint = || async { scene.node.endpoint.hub().connections().is_empty() };
        eventually("the endpoint has let go", at_the_endpoint).await;
    }
    // With enough time the same request works.
    let connection = scene.client.request(asking("c", offer()), TIMEOUT).await.unwrap();
    assert!(scene.link(&scene.client_ns, "nsm-0").await && scene.link(&scene.node.nse_ns, "svc-1").await);
    scene.client.close(connection, TIMEOUT).await.unwrap();
    assert!(scene.is_clean().await);
}

/// A descriptor that is no namespace is an error that says so, and a name that is too long is cut.
#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_no_namespace_and_names_that_are_too_long() {
    let scene = scene(Duration::ZERO).await;
    let path = scene.node.world.path("file");
    std::fs::write(&path, "").unwrap();
    let file = kernel(format!("file://{}", path.display()), "nsm-0");
    let error = scene.client.request(asking("c", file), TIMEOUT).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.to_string().contains("no network namespace"), "{error}");
    assert!(scene.is_clean().await && scene.node.endpoint.hub().connections().is_empty());

    let long = kernel(netns_url(&scene.client_ns), "an-interface-name-that-is-too-long");
    let connection = scene.client.request(asking("d", long), TIMEOUT).await.unwrap();
    assert!(scene.link(&scene.client_ns, "an-interface-na").await);
    scene.client.close(connection, TIMEOUT).await.unwrap();
    assert!(!scene.link(&scene.client_ns, "an-interface-na").await);
    // A name that no interface can have.
    for name in ["a/b", "..", "a b"] {
        let odd = kernel(netns_url(&scene.client_ns), name);
        let error = scene.client.request(asking("e", odd), TIMEOUT).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.to_string().contains(&format!("{name:?} is not an interface name")), "{error}");
        assert!(scene.is_clean().await && scene.node.endpoint.hub().connections().is_empty(), "{name}");
    }

    // The same beside a connection that works: another namespace's interfaces, the same endpoint.
    let working = Netns::anonymous().unwrap();
    let connection = scene.client.request(asking("f", kernel(netns_url(&working), "nsm-0")), TIMEOUT).await.unwrap();
    let links = async || {
        let all = async |netns: &Netns| netns.netlink().await.unwrap().links().await.unwrap();
        (all(&working).await, all(&scene.node.nse_ns).await)
    };
    let before = links().await;
    let path = path.display();
    for odd in [kernel(format!("file://{path}"), "nsm-0"), kernel(netns_url(&scene.client_ns), "a/b")] {
        let error = scene.client.request(asking("e", odd), TIMEOUT).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    }
    // One whose name is taken in the endpoint's namespace, by that connection.
    let taken =
        scene.client.request(asking("e", kernel(netns_url(&scene.client_ns), "nsm-0")), TIMEOUT).await.unwrap_err();
    assert_eq!(taken.code(), Code::AlreadyExists, "{taken}");
    assert!(taken.to_string().contains("interface svc-1 exists already and is not ours"), "{taken}");
    assert!(!scene.link(&scene.client_ns, "nsm-0").await);
    assert_eq!(links().await, before);
    assert_eq!(scene.node.endpoint.hub().connections().len(), 1);
    assert!(nsm_kernel::ping::probe(&working, None, [172, 16, 1, 1].into(), Duration::from_secs(5)).await);
    scene.client.close(connection, TIMEOUT).await.unwrap();
    assert!(scene.is_clean().await);
}

/// Notes the (device, inode) of each namespace that a request offers, opened as setns needs it.
#[derive(Default)]
struct Opened(Mutex<Vec<(u64, u64)>>);

#[async_trait::async_trait]
impl Element for Opened {
    fn name(&self) -> &'static str {
        "opened"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        for offer in &call.message.mechanism_preferences {
            let netns = Netns::from_url(&offer.parameters["inodeURL"]);
            let netns = netns.map_err(|error| Error::new("opened", call.id(), error.to_string()))?;
            // An O_PATH descriptor is no good for setns: from_url has opened it again.
            netns.run(|| ()).await.map_err(|error| Error::new("opened", call.id(), error.to_string()))?;
            let id = netns.id();
            self.0.lock().unwrap().push((id.dev, id.ino));
        }
        next.request(call).await
    }
}

/// 600 namespaces in one request, below TLS: each arrives with its inode, and can be entered.
#[tokio::test(flavor = "multi_thread")]
async fn six_hundred_namespaces_arrive_below_tls() {
    const COUNT: usize = 600;
    // Up to four descriptors each in this one process; the usual soft limit is 1024.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    let world = World::new();
    let opened = Arc::<Opened>::default();
    let endpoint = Endpoint::builder("nse", token::from_source(world.source("nse"), HOUR))
        .element(RecvFdServer::new())
        .element(opened.clone())
        .element(Mechanisms::new(Side::Server).with("KERNEL", Null))
        .build();
    let _process = world.serve("nse", &endpoint).await;
    let client = Client::builder("nsc", Arc::new(Grpc::new(world.transport("nsc"))))
        .url(world.url("nse"))
        .element(SendFdClient)
        .build();
    let namespaces: Vec<_> = (0..COUNT).map(|_| Netns::anonymous().unwrap()).collect();
    let mut many = request("c");
    many.mechanism_preferences = namespaces.iter().map(|netns| kernel(netns_url(netns), "nsm-0")).collect();
    let connection = client.request(many, 3 * TIMEOUT).await.unwrap();
    let expected: Vec<_> = namespaces.iter().map(|netns| (netns.id().dev, netns.id().ino)).collect();
    assert_eq!(*opened.0.lock().unwrap(), expected);
    client.close(connection, TIMEOUT).await.unwrap();
}
