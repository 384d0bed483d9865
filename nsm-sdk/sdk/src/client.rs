//! A client: connections to services, kept until it ends.

use crate::{
    Error, ServiceUrl,
    settings::{self, Env, Settings},
    shutdown::signalled,
};
use nsm_chain::{
    Connection, Element, NetworkServiceRequest, Side, State,
    elements::{
        authorize::Policies,
        begin::reselect_any,
        clientinfo::ClientInfo,
        excludedprefixes::{AwarenessGroups, ExcludedPrefixesClient},
        heal::{ConnectionStatus, Liveness, LivenessCheck},
        kernel_mechanism::{INODE_URL, KERNEL, KernelClient},
        mechanisms::Mechanisms,
        sendfd::SendFdClient,
    },
    remote::Grpc,
};
use nsm_kernel::elements::liveness::KernelLiveness;
use std::{sync::Arc, time::Duration};
use tokio::{sync::watch, time::Instant};

/// Pauses between attempts, the first and the longest.
const PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A new data path may take so long until it answers for the first time.
const GRACE: Duration = Duration::from_secs(5);

/// Connections that are established, refreshed and healed.
///
/// [`Client::run`] keeps them until a signal; [`Client::close`] ends them. Dropping the client leaves them: the next run of the process finds them
/// again by its name.
pub struct Client {
    chain: nsm_chain::Client,
    request_timeout: Duration,
    connections: Vec<Connection>,
}

impl Client {
    /// Starts with the defaults of [`ClientBuilder`].
    pub fn builder() -> ClientBuilder {
        ClientBuilder {
            settings: Settings::new(""),
            services: Vec::new(),
            request_timeout: Duration::from_secs(15),
            liveness: true,
            liveness_interval: Duration::from_millis(200),
            liveness_timeout: Duration::from_secs(1),
            policies: Policies::client(),
            together: false,
            info: ClientInfo::default(),
            groups: AwarenessGroups::default(),
            elements: Vec::new(),
        }
    }

    /// A builder with what the environment says, under the names of NSM's own client: `NSM_NAME`, `NSM_CONNECT_TO`, `NSM_NETWORK_SERVICES`,
    /// `NSM_REQUEST_TIMEOUT`, `NSM_DIAL_TIMEOUT`, `NSM_MAX_TOKEN_LIFETIME`, `NSM_LIVENESS_CHECK_ENABLED`, `NSM_LIVENESS_CHECK_INTERVAL`,
    /// `NSM_LIVENESS_CHECK_TIMEOUT`, `NSM_AWARENESS_GROUPS`, `SPIFFE_ENDPOINT_SOCKET`, and `NODE_NAME`, `POD_NAME`, `CLUSTER_NAME`, which
    /// connections get as labels.
    ///
    /// # Errors
    /// Every value that cannot be used.
    pub fn from_env() -> Result<ClientBuilder, Error> {
        Self::builder().read(&settings::process)
    }

    /// The connections as they were established, in the order of the services.
    pub fn connections(&self) -> &[Connection] {
        &self.connections
    }

    /// A connection as it is and each change: context, lost, healed, closed. `None` if there is no such service.
    pub fn watch(&self, index: usize) -> Option<watch::Receiver<ConnectionStatus>> {
        self.connections.get(index).map(|connection| self.chain.watch(&connection.id))
    }

    /// Keeps the connections until SIGTERM, SIGINT, SIGHUP or SIGQUIT, then closes them.
    ///
    /// # Errors
    /// See [`Client::close`].
    pub async fn run(self) -> Result<(), Error> {
        signalled().await?;
        self.close().await
    }

    /// Closes all connections, and with them their interfaces.
    ///
    /// # Errors
    /// The first that could not be closed in order; the others are closed all the same.
    pub async fn close(self) -> Result<(), Error> {
        let mut result = Ok(());
        for connection in self.connections {
            let id = connection.id.clone();
            let closed = self.chain.close(connection, self.request_timeout).await;
            result = result.and(closed.map_err(|cause| Error::Close { id, cause }));
        }
        result
    }
}

/// What a client is made of.
pub struct ClientBuilder {
    settings: Settings,
    services: Vec<Result<ServiceUrl, String>>,
    request_timeout: Duration,
    liveness: bool,
    liveness_interval: Duration,
    liveness_timeout: Duration,
    policies: Policies,
    together: bool,
    info: ClientInfo,
    groups: AwarenessGroups,
    elements: Vec<Arc<dyn Element>>,
}

impl ClientBuilder {
    settings::setters!(
        name: "Name of the client; its connections are called `<name>-0`, `<name>-1` ... It has to be unique on its node, and to stay the same over restarts.",
        max_token_lifetime: "Longest life of its tokens (10 min).",
        patience: "How long [`ClientBuilder::connect`] waits for the identity, and for each connection (1 min).",
        element: "Adds an element above the mechanism."
    );

    /// Asks for a service, as a [`ServiceUrl`] such as `kernel://icmp-responder/nsm-1?color=red`.
    #[must_use]
    pub fn service(mut self, url: impl AsRef<str>) -> Self {
        self.services.push(url.as_ref().parse());
        self
    }

    /// What one request may take (15 s); each refresh, too.
    #[must_use]
    pub fn request_timeout(mut self, timeout: Duration) -> Self {
        self.request_timeout = timeout;
        self
    }

    /// Whether the data path is asked, by ICMP echo over the interface, before a connection is given up (it is).
    #[must_use]
    pub fn liveness(mut self, check: bool) -> Self {
        self.liveness = check;
        self
    }

    /// Replaces the policies for what the manager answers (those of NSM's own client). Without any, whoever answers is believed.
    #[must_use]
    pub fn policies(mut self, policies: Policies) -> Self {
        self.policies = policies;
        self
    }

    /// Refreshes all connections when an endpoint asks that one be refreshed: where they depend on each other.
    #[must_use]
    pub fn refresh_together(mut self) -> Self {
        self.together = true;
        self
    }

    /// Connections to services of one group may have the same addresses; all others are kept apart (none may).
    #[must_use]
    pub fn awareness_groups(mut self, groups: AwarenessGroups) -> Self {
        self.groups = groups;
        self
    }

    fn read(mut self, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let mut env = Env::new(lookup);
        self.settings.read(&mut env);
        let mut services: Vec<ServiceUrl> = Vec::new();
        env.list("NSM_NETWORK_SERVICES", &mut services);
        env.duration("NSM_REQUEST_TIMEOUT", &mut self.request_timeout);
        env.boolean("NSM_LIVENESS_CHECK_ENABLED", &mut self.liveness);
        env.duration("NSM_LIVENESS_CHECK_INTERVAL", &mut self.liveness_interval);
        env.duration("NSM_LIVENESS_CHECK_TIMEOUT", &mut self.liveness_timeout);
        env.read("NSM_AWARENESS_GROUPS", &mut self.groups, |text| {
            text.parse::<AwarenessGroups>().map_err(|fault| fault.to_string())
        });
        env.finish()?;
        self.info = ClientInfo::read(lookup);
        self.services.extend(services.into_iter().map(Ok));
        Ok(self)
    }

    fn chain(&self, transport: nsm_transport::Transport) -> nsm_chain::Client {
        let mut chain = nsm_chain::Client::builder(&self.settings.name, Arc::new(Grpc::new(transport).sharing()))
            .url(&self.settings.manager)
            .dial_timeout(self.settings.dial_timeout)
            .policies(self.policies.clone());
        if self.together {
            chain = chain.refresh_together();
        }
        if self.liveness {
            chain = chain.liveness(LivenessCheck {
                interval: self.liveness_interval,
                timeout: self.liveness_timeout,
                grace: GRACE,
                ..LivenessCheck::new(Arc::new(KernelLiveness))
            });
        }
        self.elements
            .iter()
            .fold(chain.element(self.info.clone()), |chain, element| chain.shared(element.clone()))
            .element(Mechanisms::new(Side::Client).with(KERNEL, KernelClient::new()))
            .element(SendFdClient)
            // What two services of this client answer must not be the same address.
            .element(ExcludedPrefixesClient::new().with_groups(self.groups.clone()))
            .build()
    }

    /// Waits for the identity and establishes every connection; those that an earlier run has left are taken up again.
    ///
    /// # Errors
    /// No identity in time, or a connection that cannot be established in time. Those that were established stay.
    pub async fn connect(mut self) -> Result<Client, Error> {
        let services = std::mem::take(&mut self.services);
        let services: Vec<ServiceUrl> =
            services.into_iter().collect::<Result<_, _>>().map_err(|cause| Error::Settings(vec![cause]))?;
        if services.is_empty() {
            return Err(Error::setting("NSM_NETWORK_SERVICES", "a client needs a service"));
        }
        let (_, transport) = self.settings.transport().await?;
        let chain = self.chain(transport);
        let mut connections = Vec::new();
        for (index, service) in services.iter().enumerate() {
            let id = format!("{}-{index}", self.settings.name);
            let connection = self.establish(&chain, &id, service).await.map_err(|cause| Error::Request {
                id: id.clone(),
                service: service.service.clone(),
                cause,
            })?;
            tracing::info!(id, service = service.service, endpoint = connection.network_service_endpoint_name, "up");
            connections.push(connection);
        }
        Ok(Client { chain, request_timeout: self.request_timeout, connections })
    }

    /// Tries until the patience is over.
    async fn establish(
        &self,
        chain: &nsm_chain::Client,
        id: &str,
        service: &ServiceUrl,
    ) -> Result<Connection, nsm_chain::Error> {
        let (end, mut pause, mut told) = (Instant::now() + self.settings.patience, PAUSE, String::new());
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let error = match self.attempt(chain, id, service, left.min(self.request_timeout)).await {
                Ok(connection) => return Ok(connection),
                Err(error) => error,
            };
            if Instant::now() + pause >= end {
                return Err(error);
            }
            let text = error.to_string();
            if text != told {
                tracing::warn!(id, service = service.service, cause = text, "no connection yet, trying again");
                told = text;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn attempt(
        &self,
        chain: &nsm_chain::Client,
        id: &str,
        service: &ServiceUrl,
        timeout: Duration,
    ) -> Result<Connection, nsm_chain::Error> {
        let found = match chain.find(id).await? {
            Some(found) if found.network_service != service.service => {
                tracing::info!(id, before = found.network_service, "an earlier run had another service");
                chain.close(found, timeout).await?;
                None
            }
            found => found,
        };
        let dead = match &found {
            Some(found) => found.state() == State::Down && !KernelLiveness.alive(found, self.liveness_timeout).await,
            None => false,
        };
        chain.request(request(id, service, found, dead), timeout).await
    }
}

/// What to ask for: what an earlier run has left, as it is unless its data path is dead or in another namespace, or something new.
fn request(id: &str, service: &ServiceUrl, found: Option<Connection>, dead: bool) -> NetworkServiceRequest {
    let foreign = |connection: &Connection| {
        let url = connection.mechanism.as_ref().and_then(|mechanism| mechanism.parameters.get(INODE_URL));
        url.is_some_and(|url| url.starts_with("inode:"))
    };
    let elsewhere = dead || found.as_ref().is_some_and(foreign);
    let mut connection = found.unwrap_or_else(|| Connection {
        id: id.to_owned(),
        network_service: service.service.clone(),
        ..Default::default()
    });
    connection.labels.clone_from(&service.labels);
    connection.set_state(State::Up);
    let mut request =
        NetworkServiceRequest { connection: Some(connection), mechanism_preferences: vec![service.preference()] };
    if elsewhere {
        reselect_any(&mut request);
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::fixed;
    use nsm_chain::Mechanism;

    #[test]
    fn the_environment_of_a_client() {
        let lookup = fixed(&[
            ("NSM_NAME", "nsc"),
            ("NSM_NETWORK_SERVICES", "kernel://a/nsm-1?color=red,kernel://b"),
            ("NSM_REQUEST_TIMEOUT", "3s"),
            ("NSM_LIVENESS_CHECK_ENABLED", "false"),
            ("NSM_AWARENESS_GROUPS", "[kernel://a,kernel://b]"),
            ("NODE_NAME", "worker-1"),
        ]);
        let builder = Client::builder().read(&lookup).unwrap();
        let names: Vec<_> = builder.services.iter().map(|service| service.as_ref().unwrap().service.as_str()).collect();
        assert_eq!((names.as_slice(), builder.request_timeout), (&["a", "b"][..], Duration::from_secs(3)));
        assert!(!builder.liveness);
        assert_eq!(builder.groups, "[kernel://a,kernel://b]".parse().unwrap());
        assert_eq!(builder.info, ClientInfo::new([("nodeName".to_owned(), "worker-1".to_owned())]));
        let lookup = fixed(&[
            ("NSM_NETWORK_SERVICES", "memif://a"),
            ("NSM_REQUEST_TIMEOUT", "x"),
            ("NSM_AWARENESS_GROUPS", "[kernel://a"),
        ]);
        let faults = Client::builder().read(&lookup).err().unwrap().to_string();
        assert_eq!(faults.lines().count(), 3, "{faults}");
    }

    #[test]
    fn what_an_earlier_run_left_is_asked_for_as_it_is_unless_it_is_dead() {
        let service: ServiceUrl = "kernel://svc/nsm-1?color=red".parse().unwrap();
        let new = request("nsc-0", &service, None, false);
        let connection = new.connection.unwrap();
        assert_eq!((connection.id.as_str(), connection.labels["color"].as_str()), ("nsc-0", "red"));
        assert_eq!(new.mechanism_preferences[0].parameters["name"], "nsm-1");

        let mechanism = |url: &str| Mechanism {
            r#type: KERNEL.into(),
            parameters: [(INODE_URL.to_owned(), url.to_owned())].into(),
            ..Default::default()
        };
        let left = |url| Connection {
            id: "nsc-0".into(),
            network_service_endpoint_name: "nse-1".into(),
            mechanism: Some(mechanism(url)),
            ..Default::default()
        };
        let what = |url, dead| {
            let connection = request("nsc-0", &service, Some(left(url)), dead).connection.unwrap();
            (connection.mechanism.is_some(), connection.state())
        };
        assert_eq!(what("file:///proc/thread-self/ns/net", false), (true, State::Up));
        assert_eq!(what("file:///proc/thread-self/ns/net", true), (false, State::ReselectRequested));
        assert_eq!(what("inode://4/1", false), (false, State::ReselectRequested), "an earlier pod's");
    }

    #[tokio::test]
    async fn a_manager_that_is_not_there_is_named_with_the_cause() {
        let folder = tempfile::tempdir().unwrap();
        let connecting = Client::builder()
            .name("nsc")
            .service("svc")
            .identity(crate::test_source())
            .connect_to(format!("unix://{}/nsm.io.sock", folder.path().display()))
            .patience(Duration::from_millis(300))
            .connect();
        let error = connecting.await.err().unwrap().to_string();
        assert!(error.starts_with("no connection nsc-0 to svc: ") && error.contains("No such file"), "{error}");
        let error = Client::builder().name("nsc").service("memif://x").connect().await.err().unwrap().to_string();
        assert!(error.contains("only kernel"), "{error}");
    }
}
