//! Which interfaces a process has through NSM: the connections it holds, and what each says about its interface.
//!
//! The state is a map by connection id; whether the interface is there already is the kernel's to say
//! ([`watch_links`](crate::monitor::watch_links)): [`present`] joins the two.

use std::collections::BTreeMap;
use std::sync::Arc;

use ipnet::IpNet;
use nsm_chain::{CloseCall, Connection, Element, Error, Next, RequestCall, Side, State};
use tokio::sync::watch;

use super::{configurable, interface_name};
use crate::netlink::Link;

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

    /// Removes a connection's interface.
    pub fn remove(&self, id: &str) {
        self.0.send_if_modified(|all| all.contains_key(id) && Arc::make_mut(all).remove(id).is_some());
    }
}

/// The interfaces that exist, with what the kernel says of them.
pub fn present<'a>(interfaces: &'a Interfaces, links: &'a BTreeMap<u32, Link>) -> Vec<(&'a NsmInterface, &'a Link)> {
    let find = |i: &'a NsmInterface| links.values().find(|l| l.name == i.name).map(|l| (i, l));
    interfaces.values().filter_map(find).collect()
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

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let connection = next.request(call).await?;
        match interface_of(&connection, self.side) {
            Some(interface) => self.table.insert(&connection.id, interface),
            None => self.table.remove(&connection.id),
        }
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.table.remove(call.id());
        next.close(call).await
    }
}
