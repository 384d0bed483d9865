use std::sync::{Arc, Mutex};

use nsm_chain::elements::metadata::MetadataElement;
use nsm_chain::{
    Call, Chain, ConnectionContext, Context, IpContext, NetworkServiceRequest, Path, PathSegment, PolicyRoute, Route,
};

use super::*;
use crate::elements::context::{ClientContext, ServerContext};
use crate::elements::vxlan::VxlanServer;
use crate::netlink::{Link, Mac, NeighbourState};
use nsm_proto::connectioncontext::IpNeighbor;

/// Answers as the next hop would: with this mechanism, translated back above.
struct NextHop(Mutex<Mechanism>, Mutex<u32>, Mutex<Vec<Mechanism>>);

#[async_trait::async_trait]
impl Element for NextHop {
    fn name(&self) -> &'static str {
        "nexthop"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.2.lock().unwrap().clone_from(&call.message.mechanism_preferences);
        call.connection_mut().mechanism = Some(self.0.lock().unwrap().clone());
        next.request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        *self.1.lock().unwrap() += 1;
        next.close(call).await
    }
}

/// `mechanismtranslation` in small: what is above sees the inward mechanism, what is below the outward one.
struct Translate;

#[async_trait::async_trait]
impl Element for Translate {
    fn name(&self) -> &'static str {
        "translate"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let inward = call.connection().mechanism.clone();
        let mut connection = next.request(call).await?;
        connection.mechanism = inward;
        Ok(connection)
    }
}

fn fd_url(netns: &Netns) -> String {
    use std::os::fd::AsRawFd;
    format!("file:///proc/self/fd/{}", netns.fd().as_raw_fd())
}

fn kernel(netns: &Netns, name: &str) -> Mechanism {
    preference(LOCAL, KERNEL, &[("inodeURL", fd_url(netns)), ("name", name.to_string())])
}

fn forwarder(node: &Netns, tunnel_ip: Option<IpAddr>, hop: Arc<NextHop>) -> Chain {
    let chain = Chain::builder().element(MetadataElement::new()).element(ServerContext::new());
    let chain = chain.maybe(tunnel_ip.map(VxlanServer::new)).element(WireServer).element(Translate);
    chain.element(ClientContext::new()).element(WireClient::new(node.clone(), tunnel_ip)).element(hop).build()
}

fn connection(mechanism: Mechanism) -> Connection {
    let segment = PathSegment { id: "first".into(), name: "nsc".into(), ..Default::default() };
    let policy = PolicyRoute {
        from: "20.0.0.1/32".into(),
        routes: vec![Route { prefix: "0.0.0.0/0".into(), next_hop: "172.16.1.1".into() }],
        ..Default::default()
    };
    let ip = IpContext {
        src_ip_addrs: vec!["172.16.1.2/24".into(), "fd00::2/64".into(), "20.0.0.1/32".into()],
        dst_ip_addrs: vec!["172.16.1.1/24".into(), "fd00::1/64".into()],
        policies: vec![policy],
        ..Default::default()
    };
    Connection {
        id: "second".into(),
        mechanism: Some(mechanism),
        path: Some(Path { index: 1, path_segments: vec![segment] }),
        context: Some(ConnectionContext { ip_context: Some(ip), mtu: 1400, ..Default::default() }),
        ..Default::default()
    }
}

async fn request(chain: &Chain, connection: Connection) -> Result<Connection, Error> {
    let message = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
    chain.request(Call::new(message, Context::new())).await
}

async fn link(netns: &Netns, name: &str) -> Option<Link> {
    netns.netlink().await.unwrap().link_by_name(name).await.unwrap()
}

/// Asks again: until the kernel has seen that a new link is up it drops what is sent, and with many namespaces about that takes a while.
async fn answers(netns: &Netns, ip: &str) -> bool {
    for _ in 0..20 {
        if crate::ping::probe(netns, None, ip.parse().unwrap(), std::time::Duration::from_millis(500)).await {
            return true;
        }
    }
    false
}

#[tokio::test]
async fn local_connection_from_request_to_close() {
    let (node, client, endpoint) =
        (Netns::anonymous().unwrap(), Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let hop = Arc::new(NextHop(Mutex::new(kernel(&endpoint, "lb-1")), Mutex::default(), Mutex::default()));
    let chain = forwarder(&node, None, hop.clone());
    let asked = connection(kernel(&client, "nsm-0"));
    let started = std::time::Instant::now();
    let answer = request(&chain, asked.clone()).await.unwrap();
    println!("request with kernel work: {:?}", started.elapsed());
    let made = link(&client, "nsm-0").await.unwrap();
    assert_eq!((made.mtu, made.alias.as_str()), (1400, "server-second/first"));
    assert!(answers(&client, "172.16.1.1").await && answers(&client, "fd00::1").await);
    assert!(answers(&endpoint, "172.16.1.2").await);
    // A refresh, also by a forwarder that has just been started, changes nothing.
    request(&chain, asked.clone()).await.unwrap();
    assert_eq!(*hop.2.lock().unwrap(), [preference(LOCAL, KERNEL, &[])]);
    let restarted = forwarder(&node, None, hop.clone());
    request(&restarted, answer.clone()).await.unwrap();
    // It asks for the name that the endpoint's end has already; the one before had no such wish.
    assert_eq!(*hop.2.lock().unwrap(), [preference(LOCAL, KERNEL, &[("name", "lb-1".into())])]);
    assert_eq!(link(&client, "nsm-0").await.unwrap(), made);
    // Another name: the same interface, rules included.
    request(&restarted, connection(kernel(&client, "nsm-7"))).await.unwrap();
    assert!(link(&client, "nsm-0").await.is_none());
    assert_eq!(link(&client, "nsm-7").await.map(|l| l.index), Some(made.index));
    let rules = client.netlink().await.unwrap().rules().await.unwrap();
    assert_eq!(rules.iter().filter(|r| r.table == 1).count(), 1);
    assert!(answers(&client, "172.16.1.1").await);
    restarted.close(Call::new(connection(kernel(&client, "nsm-7")), Context::new())).await.unwrap();
    assert!(link(&client, "nsm-7").await.is_none() && link(&endpoint, "lb-1").await.is_none());
    let rules = client.netlink().await.unwrap().rules().await.unwrap();
    assert_eq!(rules.iter().filter(|r| r.table == 1).count(), 0);
}

/// Neighbours that the context names, and for payload IP those that follow from the link.
#[tokio::test]
async fn neighbours_are_set_on_both_sides() {
    for payload in ["ETHERNET", "IP"] {
        let (node, client, endpoint) =
            (Netns::anonymous().unwrap(), Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        let hop = Arc::new(NextHop(Mutex::new(kernel(&endpoint, "lb-1")), Mutex::default(), Mutex::default()));
        let chain = forwarder(&node, None, hop);
        let mut asked = connection(kernel(&client, "nsm-0"));
        asked.payload = payload.into();
        let neighbour = |ip: &str, mac: &str| IpNeighbor { ip: ip.into(), hardware_address: mac.into() };
        let named = [neighbour("172.16.1.99", "02:00:00:00:00:99"), neighbour("bad", "02:00:00:00:00:98")];
        asked.context.as_mut().unwrap().ip_context.as_mut().unwrap().ip_neighbors = named.into();
        // Before anything is sent: what is there then was set.
        request(&chain, asked.clone()).await.unwrap();
        let (here, there) = (link(&client, "nsm-0").await.unwrap(), link(&endpoint, "lb-1").await.unwrap());
        let entries = async |netns: &Netns, index| {
            let all = netns.netlink().await.unwrap().neighbours(Some(index)).await.unwrap();
            let entries = all.into_iter().map(|n| (n.ip.to_string(), n.mac, n.state == NeighbourState::Permanent));
            let mut entries: Vec<_> = entries.filter(|(_, mac, _)| mac.is_some_and(|mac| mac.0[0] & 1 == 0)).collect();
            entries.sort();
            entries
        };
        let named = ("172.16.1.99".to_owned(), Some(Mac([2, 0, 0, 0, 0, 0x99])), false);
        let set = |ip: &str, mac| (ip.to_owned(), mac, true);
        let both = async || (entries(&client, here.index).await, entries(&endpoint, there.index).await);
        let found = both().await;
        match payload {
            "IP" => {
                let here_wanted = vec![set("172.16.1.1", there.mac), named.clone(), set("fd00::1", there.mac)];
                let there_wanted =
                    vec![set("172.16.1.2", here.mac), named, set("20.0.0.1", here.mac), set("fd00::2", here.mac)];
                assert_eq!(found, (here_wanted, there_wanted));
            }
            _ => assert!(found.0.contains(&named) && found.1.contains(&named) && !found.0.iter().any(|(.., set)| *set)),
        }
        request(&chain, asked).await.unwrap();
        if payload == "IP" {
            assert_eq!(both().await, found, "a refresh changes nothing");
        }
        assert!(answers(&client, "172.16.1.1").await && answers(&endpoint, "fd00::2").await);
    }
}

/// An interface that could not be deleted is not forgotten: the next close, of whichever connection, deletes it.
#[tokio::test]
async fn a_deletion_that_failed_is_made_up_for() {
    let (node, client, endpoint) =
        (Netns::anonymous().unwrap(), Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let mut wire = WireClient::new(node.clone(), None);
    let end = |netns: &Netns, name: &str, alias: Alias| End { netns: netns.clone(), name: name.into(), alias };
    let names = Names::new("second", "first", "first");
    let made = Wire::Veth {
        client: end(&client, "nsm-0", names.client()),
        endpoint: end(&endpoint, "lb-1", names.endpoint()),
    };
    let (known, _) = wire.establish(&made, &[]).await.unwrap();
    wire.node = node.with_netlink(crate::Netlink::deaf(std::time::Duration::from_millis(50)));
    assert!(matches!(wire.dismiss(known).await, Err(crate::Error::Timeout { .. })));
    assert!(link(&client, "nsm-0").await.is_some());
    wire.node = node;
    wire.dismiss(Vec::new()).await.unwrap();
    assert!(link(&client, "nsm-0").await.is_none() && link(&endpoint, "lb-1").await.is_none());
    assert!(wire.left.lock().unwrap().is_empty());
}

#[tokio::test]
async fn failure_closes_what_was_asked_for() {
    let (node, client) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let hop = Arc::new(NextHop(Mutex::new(preference(LOCAL, "MEMIF", &[])), Mutex::default(), Mutex::default()));
    let chain = forwarder(&node, None, hop.clone());
    let error = request(&chain, connection(kernel(&client, "nsm-0"))).await.unwrap_err();
    assert!(error.to_string().contains("MEMIF"), "{error}");
    assert_eq!(*hop.1.lock().unwrap(), 1);
    assert!(link(&client, "nsm-0").await.is_none());
}

#[tokio::test]
async fn a_connection_may_do_without_packets() {
    let (node, client) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let hop = Arc::new(NextHop(Mutex::new(preference(LOCAL, NOOP, &[])), Mutex::default(), Mutex::default()));
    let chain = forwarder(&node, None, hop.clone());
    let asked = || connection(preference(LOCAL, NOOP, &[]));
    let answer = request(&chain, asked()).await.unwrap();
    assert_eq!(answer.mechanism.unwrap().r#type, NOOP);
    // Both sides have to agree on it.
    let error = request(&chain, connection(kernel(&client, "nsm-0"))).await.unwrap_err();
    assert!(error.to_string().contains("no wire joins mechanism \"KERNEL\" with \"NOOP\""), "{error}");
    chain.close(Call::new(asked(), Context::new())).await.unwrap();
    assert!(link(&client, "nsm-0").await.is_none());
}

/// Two nodes joined by a veth pair, a pod on each, both families as underlay in turn.
#[tokio::test]
async fn remote_connection_over_vxlan() {
    for (a, b) in [("10.9.0.1", "10.9.0.2"), ("fd09::1", "fd09::2")] {
        let (ip_a, ip_b): (IpAddr, IpAddr) = (a.parse().unwrap(), b.parse().unwrap());
        let (node_a, node_b) = crate::testing::joined_nodes(ip_a, ip_b).await;
        let (client, endpoint) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        let asked = preference(REMOTE, VXLAN, &[("src_ip", a.into()), ("src_port", "4789".into())]);
        let far = Arc::new(NextHop(Mutex::new(kernel(&endpoint, "lb-1")), Mutex::default(), Mutex::default()));
        let answer = request(&forwarder(&node_b, Some(ip_b), far), connection(asked)).await.unwrap();
        let tunnel = answer.mechanism.clone().unwrap();
        assert_eq!(parameter(&tunnel, "dst_ip"), b);
        let near = Arc::new(NextHop(Mutex::new(tunnel), Mutex::default(), Mutex::default()));
        let chain = forwarder(&node_a, Some(ip_a), near);
        request(&chain, connection(kernel(&client, "nsm-0"))).await.unwrap();
        let made = link(&client, "nsm-0").await.unwrap();
        assert!(answers(&client, "172.16.1.1").await && answers(&client, "fd00::1").await);
        let copied = crate::testing::transfer(&client, &endpoint, "172.16.1.1".parse().unwrap()).await;
        assert_eq!(copied, crate::testing::TRANSFER);
        request(&chain, connection(kernel(&client, "nsm-0"))).await.unwrap();
        assert_eq!(link(&client, "nsm-0").await.unwrap(), made);
        chain.close(Call::new(connection(kernel(&client, "nsm-0")), Context::new())).await.unwrap();
        assert!(link(&client, "nsm-0").await.is_none());
        assert!(link(&endpoint, "lb-1").await.is_some());
    }
}

/// Nothing accumulates: interfaces, rules and descriptors are as before after many connections.
#[tokio::test]
async fn many_cycles_leave_nothing() {
    let (node, client, endpoint) =
        (Netns::anonymous().unwrap(), Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let hop = Arc::new(NextHop(Mutex::new(kernel(&endpoint, "lb-1")), Mutex::default(), Mutex::default()));
    let chain = forwarder(&node, None, hop);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let asked = || connection(kernel(&client, "nsm-0"));
    request(&chain, asked()).await.unwrap();
    chain.close(Call::new(asked(), Context::new())).await.unwrap();
    let before = descriptors();
    for _ in 0..50 {
        request(&chain, asked()).await.unwrap();
        chain.close(Call::new(asked(), Context::new())).await.unwrap();
    }
    let links = client.netlink().await.unwrap().links().await.unwrap();
    assert_eq!(links.len(), 1, "{links:?}");
    // Other tests of this process open and close some as well.
    assert!(descriptors() < before + 40, "{} descriptors, {before} before", descriptors());
}
