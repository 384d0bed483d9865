//! The NSM connection of a conduit.

use crate::{
    names::ConduitKey,
    probe::{BridgeProbe, PROBE_GRACE, Rebuilt},
    settings::Settings,
};
use nsm_chain::{
    Client, Connection, ConnectionContext, Connector, Error, NetworkServiceRequest, State,
    elements::{
        begin::reselect_any,
        heal::{ConnectionStatus, Liveness, LivenessCheck},
        kernel_mechanism::{INODE_URL, KERNEL, KernelClient},
        mechanisms::Mechanisms,
        sendfd::SendFdClient,
    },
};
use nsm_kernel::elements::context::GUARD_POLICIES;
use std::{sync::Arc, time::Duration};
use tokio::sync::watch;

/// What a conduit needs of NSM; tests replace it.
#[async_trait::async_trait]
pub(crate) trait Wire: Send + Sync + 'static {
    /// The connection that an earlier run of this process had, as the manager knows it.
    async fn find(&self) -> Result<Option<Connection>, Error>;
    /// Establishes or changes the connection.
    async fn request(&self, request: NetworkServiceRequest) -> Result<Connection, Error>;
    /// Ends it, and with it the interface.
    async fn close(&self, connection: Connection) -> Result<(), Error>;
    /// The connection as it is and each change.
    fn watch(&self) -> watch::Receiver<ConnectionStatus>;
    /// Whether the bridge answers over the interface.
    async fn alive(&self, connection: &Connection) -> bool;
}

/// Pings of the bridge: one second apart, and so many missing ones in a row mean that the wire is dead.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_millis(600);
const PROBE_MISSES: u32 = 5;

/// The connection by a real NSM manager.
pub(crate) struct NsmWire {
    client: Client,
    id: String,
    timeout: Duration,
    probe: Arc<BridgeProbe>,
}

impl NsmWire {
    pub(crate) fn new(settings: &Settings, key: &ConduitKey, interface: &str, connector: Arc<dyn Connector>) -> Self {
        let probe = Arc::new(BridgeProbe::default());
        let check = LivenessCheck {
            probe: probe.clone(),
            interval: PROBE_INTERVAL,
            timeout: PROBE_TIMEOUT,
            misses: PROBE_MISSES,
            grace: PROBE_GRACE,
        };
        let kernel = Mechanisms::new(nsm_chain::Side::Client).with(KERNEL, KernelClient::with_name(interface));
        let client = Client::builder(settings.name.clone(), connector)
            .url(settings.nsm_socket.clone())
            .dial_timeout(settings.dial_timeout.get())
            .liveness(check)
            .element(Rebuilt(probe.clone()))
            .element(kernel)
            .element(SendFdClient)
            .build();
        Self { client, id: settings.connection_id(key), timeout: settings.timeout.get(), probe }
    }
}

#[async_trait::async_trait]
impl Wire for NsmWire {
    async fn find(&self) -> Result<Option<Connection>, Error> {
        self.client.find(&self.id).await
    }

    async fn request(&self, request: NetworkServiceRequest) -> Result<Connection, Error> {
        self.client.request(request, self.timeout).await
    }

    async fn close(&self, connection: Connection) -> Result<(), Error> {
        self.client.close(connection, self.timeout).await
    }

    fn watch(&self) -> watch::Receiver<ConnectionStatus> {
        self.client.watch(&self.id)
    }

    async fn alive(&self, connection: &Connection) -> bool {
        self.probe.alive(connection, PROBE_TIMEOUT).await
    }
}

/// The request for a new connection.
pub(crate) fn fresh(settings: &Settings, key: &ConduitKey) -> NetworkServiceRequest {
    let connection = Connection {
        id: settings.connection_id(key),
        network_service: settings.service(key),
        // Without a node of its own the manager's is used.
        labels: [("nodeName".to_owned(), settings.node.clone())]
            .into_iter()
            .filter(|(_, node)| !node.is_empty())
            .collect(),
        payload: "ETHERNET".into(),
        context: Some(ConnectionContext::default()),
        ..Connection::default()
    };
    let connection = guarded(connection);
    NetworkServiceRequest { connection: Some(connection), mechanism_preferences: Vec::new() }
}

/// Traffic of VIPs is never to appear on the pod's primary network: not while the connection is away, nor after it.
fn guarded(mut connection: Connection) -> Connection {
    let context = connection.context.get_or_insert_default();
    context.extra_context.insert(GUARD_POLICIES.to_owned(), "true".to_owned());
    connection
}

/// Whether the interface was made for an earlier pod of the same name: what is ours is named by a file, not by a foreign inode.
fn in_another_netns(connection: &Connection) -> bool {
    let url = connection.mechanism.as_ref().and_then(|mechanism| mechanism.parameters.get(INODE_URL));
    url.is_some_and(|url| url.starts_with("inode:"))
}

/// How to get a connection back: attempts escalate only while the wire is dead. A wire that works is asked for as it is, for ever.
pub(crate) fn recover(
    settings: &Settings,
    key: &ConduitKey,
    known: Option<&Connection>,
    attempt: u32,
    alive: bool,
) -> NetworkServiceRequest {
    let Some(known) = known else { return fresh(settings, key) };
    let mut connection = guarded(known.clone());
    let down = connection.state() == State::Down || in_another_netns(&connection);
    let alive = alive && !in_another_netns(&connection);
    connection.set_state(State::Up);
    let mut request = NetworkServiceRequest { connection: Some(connection), mechanism_preferences: Vec::new() };
    match (alive, attempt) {
        (true, _) => request,
        (false, 0) if !down => request,
        (false, 0..=2) => {
            reselect_any(&mut request);
            request
        }
        // Path and context of an earlier life may be what is refused.
        (false, _) => fresh(settings, key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{conduit, settings};
    use nsm_chain::Mechanism;

    #[test]
    fn a_new_connection_is_asked_for_by_its_stable_id() {
        let request = fresh(&settings(), &conduit("c")).connection.unwrap();
        assert_eq!(request.id, "target-1-proxy.c.t.default-0");
        assert_eq!(request.network_service, "proxy.c.t.default");
        assert_eq!((request.labels["nodeName"].as_str(), request.payload.as_str()), ("node-a", "ETHERNET"));
    }

    #[test]
    fn only_a_dead_wire_is_rebuilt() {
        let mut known = Connection { mechanism: Some(Mechanism::default()), ..Connection::default() };
        known.network_service_endpoint_name = "proxy-1".into();
        let what = |known: &Connection, attempt, alive| {
            let request = recover(&settings(), &conduit("c"), Some(known), attempt, alive).connection.unwrap();
            (request.mechanism.is_some(), request.network_service_endpoint_name.clone(), request.state())
        };
        let same = (true, "proxy-1".to_owned(), State::Up);
        let other = (false, String::new(), State::ReselectRequested);
        for attempt in [0, 1, 100] {
            assert_eq!(what(&known, attempt, true), same);
        }
        assert_eq!(what(&known, 0, false), same);
        assert_eq!(what(&known, 1, false), other);
        assert_eq!(what(&known, 3, false), (false, String::new(), State::Up));
        known.set_state(State::Down);
        assert_eq!(what(&known, 0, false), other);
        assert_eq!(what(&known, 0, true), same);
        let url = (INODE_URL.to_owned(), "inode://4/1".to_owned());
        known.mechanism = Some(Mechanism { parameters: [url].into(), ..Mechanism::default() });
        assert_eq!(what(&known, 0, true), other, "an earlier pod's");
    }
}
