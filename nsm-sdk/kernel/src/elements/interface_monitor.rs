//! Which interfaces a process has through NSM: the connections it holds, and what each says about its interface.
//!
//! The state is a map by connection id, written by the element [`InterfaceMonitor`]; whether the interface is there already, and up, is the
//! kernel's to say, by rtnetlink ([`watch_links`]): [`InterfaceTable::watch`] joins the two.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use nsm_chain::{CloseCall, Connection, Element, Next, RequestCall, Side, State};
use tokio::sync::watch;

use super::{configurable, interface_name};
use crate::monitor::watch_links;
use crate::netlink::Link;
use crate::{Error, Netns};

/// The interface of one connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NsmInterface {
    /// Interface name.
    pub name: String,
    /// Which role this process has in the connection.
    pub side: Side,
    /// Id of the first path segment: the same on all hops, and after restarts.
    pub first_id: String,
    /// Endpoint of the connection.
    pub endpoint: String,
    /// Our addresses: destination addresses of a server, source addresses of a client.
    pub local: Vec<IpNet>,
    /// The other side's addresses.
    pub neighbours: Vec<IpNet>,
    /// Extra prefixes of the context (gateways of a Meridio target).
    pub gateways: Vec<IpNet>,
    /// False while NSM says that the connection is down.
    pub up: bool,
}

/// All interfaces by connection id.
pub type Interfaces = BTreeMap<String, NsmInterface>;

/// Those of them that exist, as they are.
pub type Present = BTreeMap<String, (NsmInterface, Link)>;

/// Publishes the interfaces of a process. One value serves several chains, a client's and an endpoint's.
#[derive(Clone, Debug)]
pub struct InterfaceTable(Arc<watch::Sender<Arc<Interfaces>>>);

impl Default for InterfaceTable {
    fn default() -> Self {
        InterfaceTable(Arc::new(watch::Sender::new(Arc::default())))
    }
}

impl InterfaceTable {
    /// Follows all changes.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Interfaces>> {
        self.0.subscribe()
    }

    /// Adds or changes a connection's interface.
    pub fn insert(&self, id: &str, interface: NsmInterface) {
        self.0.send_if_modified(|all| {
            let changed = all.get(id) != Some(&interface);
            if changed {
                Arc::make_mut(all).insert(id.to_string(), interface);
            }
            changed
        });
    }

    /// The interfaces that exist in the namespace, with what the kernel says of them, by connection id; and each change, on either side:
    /// connections that come and go, interfaces that appear, are renamed, set up or down, deleted. The task behind it ends with the last
    /// receiver.
    ///
    /// # Errors
    /// The namespace cannot be listened to.
    pub async fn watch(&self, netns: &Netns) -> Result<watch::Receiver<Arc<Present>>, Error> {
        let (mut interfaces, mut links) = (self.subscribe(), watch_links(netns).await?);
        let join = |interfaces: &mut watch::Receiver<Arc<Interfaces>>,
                    links: &mut watch::Receiver<Arc<BTreeMap<u32, Link>>>| {
            let (interfaces, links) = (interfaces.borrow_and_update().clone(), links.borrow_and_update().clone());
            let present = interfaces.iter().filter_map(|(id, interface)| {
                let link = links.values().find(|link| link.name == interface.name)?;
                Some((id.clone(), (interface.clone(), link.clone())))
            });
            Arc::new(present.collect::<Present>())
        };
        let (tx, rx) = watch::channel(join(&mut interfaces, &mut links));
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    Ok(()) = interfaces.changed() => {}
                    Ok(()) = links.changed() => {}
                    () = tx.closed() => return,
                    else => return,
                }
                let now = join(&mut interfaces, &mut links);
                tx.send_if_modified(|before| {
                    let changed = *before != now;
                    *before = now;
                    changed
                });
            }
        });
        Ok(rx)
    }

    /// Removes a connection's interface.
    pub fn remove(&self, id: &str) {
        self.0.send_if_modified(|all| all.contains_key(id) && Arc::make_mut(all).remove(id).is_some());
    }
}

/// Describes the interface of a connection; `None` if it has none (other mechanism, no name).
pub fn interface_of(connection: &Connection, side: Side) -> Option<NsmInterface> {
    let mechanism = configurable(connection.mechanism.as_ref())?;
    let name = interface_name(mechanism);
    let ip = connection.context.as_ref().and_then(|c| c.ip_context.clone()).unwrap_or_default();
    let nets = |list: &[String]| list.iter().filter_map(|s| s.parse().ok()).collect::<Vec<IpNet>>();
    let (source, destination) = (nets(&ip.src_ip_addrs), nets(&ip.dst_ip_addrs));
    let (local, neighbours) = match side {
        Side::Server => (destination, source),
        Side::Client => (source, destination),
    };
    (!name.is_empty()).then(|| NsmInterface {
        name: name.to_string(),
        side,
        first_id: super::first_id(connection).to_string(),
        endpoint: connection.network_service_endpoint_name.clone(),
        local,
        neighbours,
        gateways: nets(&ip.extra_prefixes),
        up: connection.state != i32::from(State::Down),
    })
}

/// Element that keeps an [`InterfaceTable`]. Stands below `mechanisms`, in an endpoint's or a client's chain.
#[derive(Clone, Debug)]
pub struct InterfaceMonitor {
    side: Side,
    table: InterfaceTable,
}

impl InterfaceMonitor {
    /// An element that writes to `table`.
    pub fn new(side: Side, table: InterfaceTable) -> Self {
        InterfaceMonitor { side, table }
    }
}

#[async_trait::async_trait]
impl Element for InterfaceMonitor {
    fn name(&self) -> &'static str {
        "interfacemonitor"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, nsm_chain::Error> {
        let connection = next.request(call).await?;
        match interface_of(&connection, self.side) {
            Some(interface) => self.table.insert(&connection.id, interface),
            None => self.table.remove(&connection.id),
        }
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), nsm_chain::Error> {
        self.table.remove(call.id());
        next.close(call).await
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::time::Duration;

    use nsm_chain::{Chain, ConnectionContext, Context, IpContext, NetworkServiceRequest};

    use super::*;
    use crate::elements::{KERNEL, LOCAL, preference};
    use crate::netlink::{LinkChange, VethEnd, mac_from_seed};

    type Watch = watch::Receiver<Arc<Present>>;

    async fn until(watch: &mut Watch, what: &str, check: impl Fn(&Present) -> bool) {
        let wait = tokio::time::timeout(Duration::from_secs(5), watch.wait_for(|present| check(present)));
        assert!(wait.await.is_ok_and(|found| found.is_ok()), "{what}: {:?}", watch.borrow());
    }

    fn connection(netns: &Netns, interface: &str) -> Connection {
        let url = format!("file:///proc/self/fd/{}", netns.fd().as_raw_fd());
        let ip = IpContext {
            src_ip_addrs: vec!["172.16.1.2/24".into()],
            dst_ip_addrs: vec!["172.16.1.1/24".into()],
            extra_prefixes: vec!["172.16.1.3/24".into()],
            ..Default::default()
        };
        Connection {
            id: "own".into(),
            network_service_endpoint_name: "nse".into(),
            mechanism: Some(preference(LOCAL, KERNEL, &[("inodeURL", url), ("name", interface.to_owned())])),
            context: Some(ConnectionContext { ip_context: Some(ip), ..Default::default() }),
            ..Default::default()
        }
    }

    async fn request(chain: &Chain, connection: Connection) {
        let message = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
        chain.request(RequestCall::new(message, Context::new())).await.unwrap();
    }

    /// Connections as the chain has them, interfaces as the kernel has them.
    #[tokio::test]
    async fn interfaces_appear_are_renamed_go_down_and_up_and_disappear() {
        let netns = Netns::anonymous().unwrap();
        let netlink = netns.netlink().await.unwrap();
        let table = InterfaceTable::default();
        let chain = Chain::builder().element(InterfaceMonitor::new(Side::Server, table.clone())).build();
        let mut watch = table.watch(&netns).await.unwrap();
        let own = |present: &Present| present.get("own").map(|(interface, link)| (interface.name.clone(), link.index));
        assert!(watch.borrow().is_empty());

        // The connection is there before its interface, which somebody else makes.
        request(&chain, connection(&netns, "nsm-0")).await;
        assert!(table.subscribe().borrow().contains_key("own") && watch.borrow().is_empty());
        let end = |name: &str| VethEnd { netns: netns.clone(), name: name.into(), mac: mac_from_seed(name) };
        netlink.veth_create(&end("nsm-0"), &end("other"), None).await.unwrap();
        let index = netlink.link_by_name("nsm-0").await.unwrap().unwrap().index;
        until(&mut watch, "appears", |p| own(p) == Some(("nsm-0".into(), index))).await;
        let (interface, link) = watch.borrow()["own"].clone();
        let nets = |text: &str| vec![text.parse::<IpNet>().unwrap()];
        let expected = NsmInterface {
            name: "nsm-0".into(),
            side: Side::Server,
            first_id: "own".into(),
            endpoint: "nse".into(),
            local: nets("172.16.1.1/24"),
            neighbours: nets("172.16.1.2/24"),
            gateways: nets("172.16.1.3/24"),
            up: true,
        };
        assert_eq!((interface, link.up), (expected, false));

        let set = async |name: &str, up| {
            let index = netlink.link_by_name(name).await.unwrap().unwrap().index;
            netlink.link_change(index, &LinkChange { up: Some(up), ..Default::default() }).await.unwrap();
        };
        let running = |p: &Present| p.get("own").map(|(_, link)| (link.up, link.running));
        set("nsm-0", true).await;
        until(&mut watch, "up, without a carrier", |p| running(p) == Some((true, false))).await;
        set("other", true).await;
        until(&mut watch, "up", |p| running(p) == Some((true, true))).await;
        set("other", false).await;
        until(&mut watch, "carrier lost", |p| running(p) == Some((true, false))).await;
        set("nsm-0", false).await;
        until(&mut watch, "down", |p| running(p) == Some((false, false))).await;

        // Renamed by somebody, and then by the chain too.
        netlink.link_rename(index, "nsm-1").await.unwrap();
        until(&mut watch, "renamed: not the connection's", |p| p.is_empty()).await;
        request(&chain, connection(&netns, "nsm-1")).await;
        until(&mut watch, "renamed", |p| own(p) == Some(("nsm-1".into(), index))).await;
        // NSM says that it is down.
        let down = Connection { state: State::Down.into(), ..connection(&netns, "nsm-1") };
        request(&chain, down).await;
        until(&mut watch, "said to be down", |p| p.get("own").is_some_and(|(interface, _)| !interface.up)).await;

        netlink.link_delete(index).await.unwrap();
        until(&mut watch, "disappears", |p| p.is_empty()).await;
        netlink.veth_create(&end("nsm-1"), &end("other"), None).await.unwrap();
        until(&mut watch, "back, under another index", |p| own(p).is_some_and(|(_, new)| new != index)).await;
        chain.close(CloseCall::new(connection(&netns, "nsm-1"), Context::new())).await.unwrap();
        until(&mut watch, "closed", |p| p.is_empty()).await;
        // A connection without an interface of its own is none of it.
        let other = Connection { mechanism: Some(preference(LOCAL, "NOOP", &[])), ..connection(&netns, "nsm-1") };
        request(&chain, other).await;
        assert!(table.subscribe().borrow().is_empty());
    }
}
