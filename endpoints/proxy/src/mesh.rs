//! One connection to every load balancer of the conduit, on whatever node it is.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt;
use meridio_common::Backoff;
use meridio_proto::nsm::registry::NetworkServiceEndpoint;
use nsm_chain::elements::begin::Reselect;
use nsm_chain::elements::heal::{ConnectionStatus, Liveness};
use nsm_chain::{Client, Connection, Mechanism, NetworkServiceRequest, State};
use nsm_registry::RegistryClient;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::inputs::{Inputs, Shared};
use crate::ipcontext;
use crate::store::Store;

/// A load balancer that is neither registered nor answering is given up after so long.
pub(crate) const FORGET: Duration = Duration::from_secs(30);
/// What was found at start is in use for so long at least after the first load balancer is known, and at most: the registry tells of
/// them one by one, and one that is registered may never be reached.
const SETTLE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// Time for closing the connections at the end, all at once.
const CLOSE: Duration = Duration::from_secs(5);

/// A connection that only this process remembers is asked for so many times; perhaps what it holds is refused.
const TRIES: u32 = 20;

/// The mesh's client side.
#[derive(Clone)]
pub(crate) struct Mesh {
    pub(crate) client: Client,
    pub(crate) registry: RegistryClient,
    pub(crate) shared: Shared,
    pub(crate) store: Store,
    /// Network service of the load balancers.
    pub(crate) service: String,
    /// Name of this pod: connection ids begin with it.
    pub(crate) name: String,
    pub(crate) request_timeout: Duration,
}

impl Mesh {
    /// Follows the registry until `stop`; then closes all connections.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let template =
            NetworkServiceEndpoint { network_service_names: vec![self.service.clone()], ..Default::default() };
        let mut events = self.registry.watch_nse(template);
        let mut links: BTreeMap<String, (CancellationToken, JoinHandle<()>)> = BTreeMap::new();
        let mut inherits = true;
        let inherited = tokio::time::sleep(FORGET);
        tokio::pin!(inherited);
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => break,
                event = events.next() => match event { Some(event) => event, None => break },
                () = &mut inherited, if inherits => {
                    // Load balancers that went while this proxy was away: NSM ends their connections. Without any, perhaps the
                    // registry does not answer.
                    inherits = links.is_empty();
                    if inherits {
                        inherited.as_mut().reset(Instant::now() + FORGET);
                    } else {
                        self.store.keep_only(&links.keys().map(|endpoint| self.id(endpoint)).collect());
                    }
                    continue;
                }
            };
            let name = event.object.name.clone();
            let registered = !event.deleted;
            self.shared.change(|inputs| {
                if let Some(balancer) = inputs.balancers.get_mut(&name) {
                    if balancer.registered != registered {
                        tracing::info!(load_balancer = name, registered, "registry");
                    }
                    balancer.registered = registered;
                } else if registered {
                    inputs.balancers.entry(name.clone()).or_default().registered = true;
                }
            });
            links.retain(|_, (_, task)| !task.is_finished());
            if registered && !links.contains_key(&name) {
                let stop = stop.child_token();
                let task = tokio::spawn(self.clone().keep(name.clone(), stop.clone()));
                links.insert(name, (stop, task));
            }
        }
        futures_util::future::join_all(links.into_values().map(|(stop, task)| async move {
            stop.cancel();
            if task.await.is_err() {
                tracing::warn!("a connection's task failed");
            }
        }))
        .await;
    }

    /// Waits until what was found at start has a name now, or will not get one.
    pub(crate) async fn settle(shared: Shared, stop: CancellationToken) {
        let mut inputs = shared.subscribe();
        let settled = async {
            let known = inputs.wait_for(|inputs| inputs.balancers.values().any(|balancer| balancer.registered)).await;
            drop(known);
            tokio::time::sleep(SETTLE.0).await;
            _ = tokio::time::timeout(SETTLE.1 - SETTLE.0, inputs.wait_for(Inputs::all_connected)).await;
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = settled => shared.change(|inputs| inputs.settled = true),
        }
    }

    fn id(&self, endpoint: &str) -> String {
        format!("{}-{}-{endpoint}", self.name, self.service)
    }

    /// Keeps the connection to one load balancer until it is gone for good or `stop`.
    async fn keep(self, endpoint: String, stop: CancellationToken) {
        let id = self.id(&endpoint);
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        let mut tries = TRIES;
        let connected = async {
            while let Err(error) = self.connect(&id, &endpoint, &mut tries).await {
                tracing::warn!(load_balancer = endpoint, %error, "no connection, trying again");
                backoff.wait().await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            () = self.gone(&endpoint) => return self.forget(&id, &endpoint),
            () = connected => {}
        }
        let mut status = self.client.watch(&id);
        let gone = self.gone(&endpoint);
        tokio::pin!(gone);
        loop {
            let now = status.borrow_and_update().clone();
            self.note(&endpoint, &now);
            tokio::select! {
                () = stop.cancelled() => break,
                () = &mut gone => break,
                changed = status.changed() => if changed.is_err() { break },
            }
        }
        self.forget(&id, &endpoint);
        if let Some(connection) = self.client.connection(&id)
            && let Err(error) = self.client.close(connection, CLOSE).await
        {
            tracing::warn!(load_balancer = endpoint, %error, "connection not closed in order");
        }
    }

    /// Requests the connection; one that an earlier run of this process had is taken up again as it is, link and all. If the manager
    /// does not know it, which was perhaps restarted too, then as it was noted, unless that was tried in vain.
    async fn connect(&self, id: &str, endpoint: &str, tries: &mut u32) -> Result<(), nsm_chain::Error> {
        let mut known = self.client.find(id).await?;
        if known.is_none() && *tries > 0 {
            *tries -= 1;
            known = self.store.connection(id);
        }
        let mut request = match known {
            Some(known) => self.take_up(known),
            None => self.fresh(id),
        };
        let connection = request.connection.get_or_insert_default();
        connection.network_service_endpoint_name = endpoint.to_owned();
        let connection = self.client.request(request, self.request_timeout).await?;
        self.note(endpoint, &ConnectionStatus::Up(Box::new(connection)));
        Ok(())
    }

    fn take_up(&self, found: Connection) -> NetworkServiceRequest {
        let down = found.state == i32::from(State::Down);
        let silent = !self.alive(&found);
        let mut request = NetworkServiceRequest { mechanism_preferences: vec![kernel()], connection: Some(found) };
        if down && silent {
            reselect_pinned()(&mut request);
        }
        request
    }

    fn fresh(&self, id: &str) -> NetworkServiceRequest {
        let connection = Connection {
            id: id.to_owned(),
            network_service: self.service.clone(),
            payload: "ETHERNET".to_owned(),
            ..Connection::default()
        };
        NetworkServiceRequest { connection: Some(connection), mechanism_preferences: vec![kernel()] }
    }

    fn note(&self, endpoint: &str, status: &ConnectionStatus) {
        let Some(connection) = status.connection() else { return };
        if status.is_up() {
            self.store.note(connection);
        }
        let ip = connection.context.as_ref().and_then(|context| context.ip_context.as_ref());
        let addresses = ipcontext::addresses(ip.map_or(&[], |ip| &ip.dst_ip_addrs));
        let interface = ipcontext::interface(connection).map(str::to_owned);
        self.shared.change(|inputs| {
            let balancer = inputs.balancers.entry(endpoint.to_owned()).or_default();
            if balancer.up != status.is_up() {
                tracing::info!(load_balancer = endpoint, up = status.is_up(), "NSM");
            }
            balancer.up = status.is_up();
            balancer.addresses = addresses;
            inputs.ports.extend(interface.clone());
            if let Some(old) = std::mem::replace(&mut balancer.interface, interface.clone())
                && Some(&old) != interface.as_ref()
            {
                inputs.ports.remove(&old);
            }
            // What was found in the table at the start may have a name now.
            inputs.outgrow();
        });
    }

    fn forget(&self, id: &str, endpoint: &str) {
        self.store.forget(id);
        self.shared.change(|inputs| {
            if let Some(balancer) = inputs.balancers.remove(endpoint) {
                inputs.ports.retain(|port| Some(port) != balancer.interface.as_ref());
            }
        });
        tracing::info!(load_balancer = endpoint, "forgotten");
    }

    /// Waits until a load balancer is neither registered nor answering for [`FORGET`] without a break.
    async fn gone(&self, endpoint: &str) {
        let mut inputs = self.shared.subscribe();
        let mut since = None;
        loop {
            let away = {
                let now = inputs.borrow_and_update();
                match now.balancers.get(endpoint) {
                    None => true,
                    Some(balancer) => {
                        let dead = |address: &IpAddr| now.silent.contains(address);
                        !balancer.registered && balancer.addresses.iter().all(dead)
                    }
                }
            };
            since = if away { since.or_else(|| Some(Instant::now())) } else { None };
            let end = since.map(|since: Instant| since + FORGET);
            tokio::select! {
                // Without an end this branch is off, and only a change can bring one.
                () = tokio::time::sleep_until(end.unwrap_or_else(Instant::now)), if end.is_some() => return,
                changed = inputs.changed() => if changed.is_err() { return },
            }
        }
    }

    fn alive(&self, connection: &Connection) -> bool {
        alive(&self.shared, connection)
    }
}

fn alive(shared: &Shared, connection: &Connection) -> bool {
    let ip = connection.context.as_ref().and_then(|context| context.ip_context.as_ref());
    let silent = shared.look(|inputs| inputs.silent.clone());
    let mut addresses = ip.into_iter().flat_map(|ip| &ip.dst_ip_addrs).filter_map(|text| ipcontext::address(text));
    addresses.all(|address| !silent.contains(&address))
}

fn kernel() -> Mechanism {
    Mechanism { cls: "LOCAL".to_owned(), r#type: "KERNEL".to_owned(), ..Mechanism::default() }
}

/// Finding a new way to the *same* load balancer: each one has a connection of its own.
pub(crate) fn reselect_pinned() -> Box<Reselect> {
    Box::new(|request: &mut NetworkServiceRequest| {
        let connection = request.connection.get_or_insert_default();
        connection.mechanism = None;
        connection.state = State::ReselectRequested.into();
    })
}

/// Heal's question whether the data path works: the probes know.
pub(crate) struct Probed(pub(crate) Shared);

#[async_trait::async_trait]
impl Liveness for Probed {
    async fn alive(&self, connection: &Connection, _: Duration) -> bool {
        alive(&self.0, connection)
    }
}
