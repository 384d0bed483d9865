//! Connections of several clients at one endpoint, with interfaces: whose they are, and when they end.

#![allow(clippy::unwrap_used, reason = "a test states what it expects by unwrapping it")]

mod sandbox;

use nsm_chain::{
    Client, CloseCall, Connection, Element, Error, NetworkServiceRequest, Next, RequestCall,
    elements::sendfd::SendFdClient, remote::Grpc,
};
use nsm_kernel::{Link, Netns, netlink::LinkChange, ping};
use nsm_transport::Transport;
use sandbox::*;
use std::{
    process::{Child, Command},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::time::{Instant, sleep, sleep_until};

/// The endpoint's side: the n-th connection has interface svc-n and network 172.16.n.0/24.
struct Serve(Netns, Mutex<Vec<String>>);

#[async_trait::async_trait]
impl Element for Serve {
    fn name(&self) -> &'static str {
        "serve"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let id = call.id().to_owned();
        let n = {
            let mut known = self.1.lock().unwrap();
            known.iter().position(|known| *known == id).unwrap_or_else(|| {
                known.push(id);
                known.len() - 1
            })
        };
        give(call.connection_mut(), &self.0, n);
        next.request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        next.close(call).await
    }
}

async fn scene() -> BehindNode {
    BehindNode::new(|nse_ns| Serve(nse_ns, Mutex::default())).await
}

async fn link(netns: &Netns, name: &str) -> Option<Link> {
    netns.netlink().await.unwrap().link_by_name(name).await.unwrap()
}

async fn answers(netns: &Netns, ip: &str) -> bool {
    for _ in 0..5 {
        if ping::probe(netns, None, ip.parse().unwrap(), Duration::from_secs(1)).await {
            return true;
        }
    }
    false
}

fn asking_in(id: &str, netns: &Netns) -> NetworkServiceRequest {
    asking(id, kernel(netns_url(netns), "nsm-0"))
}

/// NSM's client is called nsc, and its connection nsc-0, unless somebody takes the trouble to call it otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_call_themselves_alike_do_not_touch_each_other() {
    let scene = scene().await;
    // The first two have one identity, as pods of one deployment do, the third one has another.
    let clients: Vec<_> = ["nsc", "nsc", "another"]
        .iter()
        .map(|identity| (scene.client(identity), Netns::anonymous().unwrap()))
        .collect();
    let mut connections = Vec::new();
    for (client, netns) in &clients {
        connections.push(client.request(asking_in("nsc-0", netns), TIMEOUT).await.unwrap());
    }
    let state = async || {
        let mut state = Vec::new();
        for (n, (_, netns)) in clients.iter().enumerate() {
            let ends = (link(netns, "nsm-0").await, link(&scene.nse_ns, &format!("svc-{n}")).await);
            let works = ends.0.is_some() && answers(netns, &format!("172.16.{n}.1")).await;
            state.push((works, ends));
        }
        state
    };
    let made = state().await;
    assert!(made.iter().all(|(works, _)| *works), "{made:?}");
    let mut macs: Vec<_> = made.iter().flat_map(|(_, (a, b))| [a, b].map(|l| l.as_ref().unwrap().mac)).collect();
    macs.sort();
    macs.dedup();
    assert_eq!(macs.len(), 2 * clients.len(), "each end has an address of its own");
    for _ in 0..2 {
        for ((client, netns), connection) in clients.iter().zip(&mut connections) {
            *connection = client.request(asking_in("nsc-0", netns), TIMEOUT).await.unwrap();
            assert_eq!(state().await, made, "a refresh changes nothing");
        }
    }
    let mut left = made;
    for (n, ((client, _), connection)) in clients.iter().zip(connections).enumerate() {
        client.close(connection, TIMEOUT).await.unwrap();
        left[n] = (false, (None, None));
        assert_eq!(state().await, left, "what is closed is gone, and nothing else");
    }
}

/// A namespace that a process lives in, as in a pod's.
struct Pod {
    netns: Netns,
    process: Child,
}

impl Pod {
    async fn new() -> Self {
        let netns = Netns::anonymous().unwrap();
        let process = netns.run(|| Command::new("sleep").arg("1000").spawn().unwrap()).await.unwrap();
        Self { netns, process }
    }

    fn die(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The token of a silent client ends: a connection that works stays, one whose data path or whose client is gone is closed.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_client_keeps_what_works_and_nothing_else() {
    const LIFE: Duration = Duration::from_secs(12);
    const REQUEST: Duration = Duration::from_secs(4);
    let scene = scene().await;
    let mut pods = [Pod::new().await, Pod::new().await, Pod::new().await];
    let transport: Transport = scene.world.transport("nsc").with_max_token_lifetime(LIFE);
    // Without refresh and heal it is silent.
    let client = Client::builder("nsc", Arc::new(Grpc::new(transport)))
        .url(scene.world.url("nsmgr"))
        .passthrough()
        .element(SendFdClient)
        .build();
    let begin = Instant::now();
    for (n, pod) in pods.iter().enumerate() {
        client.request(asking_in(&format!("nsc-{n}"), &pod.netns), REQUEST).await.unwrap();
        assert!(answers(&pod.netns, &format!("172.16.{n}.1")).await);
    }
    let netlink = scene.nse_ns.netlink().await.unwrap();
    let dead = link(&scene.nse_ns, "svc-1").await.unwrap();
    netlink.link_change(dead.index, &LinkChange { up: Some(false), ..Default::default() }).await.unwrap();
    pods[2].die();
    assert!(begin.elapsed() < LIFE - REQUEST, "too slow to say anything: {:?}", begin.elapsed());
    for n in [0, 1, 2] {
        assert!(link(&scene.nse_ns, &format!("svc-{n}")).await.is_some(), "closed before its time");
    }
    for n in [1, 2] {
        let gone = || async { link(&scene.nse_ns, &format!("svc-{n}")).await.is_none() };
        eventually(&format!("connection {n} is closed"), gone).await;
        assert!(link(&pods[n].netns, "nsm-0").await.is_none());
    }
    // All three tokens have ended by then.
    sleep_until(begin + LIFE + REQUEST).await;
    sleep(Duration::from_secs(1)).await;
    assert!(link(&pods[0].netns, "nsm-0").await.is_some() && link(&scene.nse_ns, "svc-0").await.is_some());
    assert!(answers(&pods[0].netns, "172.16.0.1").await);
}
