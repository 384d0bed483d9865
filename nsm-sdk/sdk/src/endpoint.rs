//! An endpoint: chain, socket, identity and registration in one.

use crate::{
    Error,
    settings::{self, Env, Settings},
    shutdown::signalled,
};
use ipnet::IpNet;
use nsm_chain::{
    Connection, Element, Side,
    elements::{
        authorize::Policies,
        ipam::{PointToPoint, Strict},
        kernel_mechanism::{KERNEL, KernelServer},
        mechanisms::Mechanisms,
        monitor::Hub,
        null::Null,
        sendfd::SendFdServer,
    },
    registry::{NetworkService, NetworkServiceEndpoint},
    token,
};
use nsm_registry::{ClientPolicies, NetworkServiceLabels, RegistryClient};
use nsm_transport::{Address, Listener, Transport};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

/// Mechanism without anything to carry packets.
const NOOP: &str = "NOOP";
/// What taking back the registration may take at the end.
const UNREGISTER: Duration = Duration::from_secs(5);

/// An endpoint that serves and is registered.
///
/// [`Endpoint::run`] serves until a signal; [`Endpoint::stop`] ends it in order: first nobody finds it any more, then its socket goes.
/// Dropping it ends it like a crash: the registration expires by itself.
pub struct Endpoint {
    registration: NetworkServiceEndpoint,
    registry: RegistryClient,
    hub: Hub,
    unregister: bool,
    stop: CancellationToken,
    server: JoinHandle<Result<(), nsm_transport::Error>>,
    /// The folder of the socket.
    _folder: Option<TempDir>,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Endpoint {
    /// Starts with the defaults of [`EndpointBuilder`].
    pub fn builder() -> EndpointBuilder {
        EndpointBuilder {
            settings: Settings::new(""),
            services: Vec::new(),
            payload: "ETHERNET".to_owned(),
            labels: BTreeMap::new(),
            prefixes: Vec::new(),
            strict: false,
            interface: None,
            listen_on: None,
            policies: Policies::server(),
            guarded: false,
            registry_policies: ClientPolicies::default(),
            register_services: true,
            unregister: true,
            elements: Vec::new(),
        }
    }

    /// A builder with what the environment says, under the names of NSM's own endpoints: `NSM_NAME`, `NSM_CONNECT_TO`,
    /// `NSM_SERVICE_NAMES`, `NSM_PAYLOAD`, `NSM_LABELS`, `NSM_CIDR_PREFIX`, `NSM_IPAM_POLICY`, `NSM_REGISTER_SERVICE`,
    /// `NSM_UNREGISTER_ITSELF`, `NSM_REGISTRY_CLIENT_POLICIES`, `NSM_MAX_TOKEN_LIFETIME`, `NSM_DIAL_TIMEOUT`, `SPIFFE_ENDPOINT_SOCKET`.
    ///
    /// # Errors
    /// Every value that cannot be used.
    pub fn from_env() -> Result<EndpointBuilder, Error> {
        Self::builder().read(&settings::process)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.registration.name
    }

    /// Where the manager reaches it.
    pub fn url(&self) -> &str {
        &self.registration.url
    }

    /// The connections that it serves now.
    pub fn connections(&self) -> Vec<Connection> {
        self.hub.connections()
    }

    /// Asks all clients to request their connections again, at once and not only when their tokens near their end: for an endpoint that
    /// would answer something else now (addresses, routes, labels). What works meanwhile goes on.
    pub fn ask_for_refresh(&self) {
        self.hub.ask_for_refresh();
    }

    /// Serves until SIGTERM, SIGINT, SIGHUP or SIGQUIT, then stops in order.
    ///
    /// # Errors
    /// The server ended by itself, or see [`Endpoint::stop`].
    pub async fn run(mut self) -> Result<(), Error> {
        tokio::select! {
            signal = signalled() => {
                signal?;
                self.stop().await
            }
            ended = &mut self.server => Err(self.ended(ended.unwrap_or(Ok(())))),
        }
    }

    /// Takes back the registration, lets calls in progress end and closes the socket. Connections stay: their clients find another
    /// endpoint, or this one when it comes back.
    ///
    /// # Errors
    /// The registration could not be taken back, or the server failed. Everything is stopped all the same.
    pub async fn stop(mut self) -> Result<(), Error> {
        let unregistered = match self.unregister {
            true => self.registry.unregister_nse(self.registration.clone(), Some(UNREGISTER)).await,
            false => Ok(()),
        };
        self.stop.cancel();
        let served = (&mut self.server).await.unwrap_or(Ok(()));
        unregistered.map_err(|cause| Error::Unregister { endpoint: self.name().to_owned(), cause })?;
        served.map_err(|cause| self.ended(Err(cause)))
    }

    fn ended(&self, result: Result<(), nsm_transport::Error>) -> Error {
        let cause = result.err().unwrap_or_else(|| nsm_transport::Error::Serve("it has ended by itself".into()));
        Error::Serve { endpoint: self.name().to_owned(), cause }
    }
}

/// What an endpoint is made of. The order of its chain: addresses, own elements, mechanisms (KERNEL, NOOP).
pub struct EndpointBuilder {
    settings: Settings,
    services: Vec<NetworkService>,
    payload: String,
    labels: BTreeMap<String, String>,
    prefixes: Vec<Vec<IpNet>>,
    strict: bool,
    interface: Option<String>,
    listen_on: Option<String>,
    policies: Policies,
    guarded: bool,
    registry_policies: ClientPolicies,
    register_services: bool,
    unregister: bool,
    elements: Vec<Arc<dyn Element>>,
}

impl EndpointBuilder {
    settings::setters!(
        name: "Name of the endpoint and of its segment on each path. It has to be unique, and to stay the same over restarts.",
        max_token_lifetime: "Longest life of its tokens (10 min). Connections live as long and are refreshed well before.",
        patience: "How long [`EndpointBuilder::start`] waits for identity and registration (1 min each).",
        element: "Adds an element below the addresses and above the mechanisms."
    );

    /// Serves the network service of this name.
    #[must_use]
    pub fn service(self, name: impl Into<String>) -> Self {
        self.network_service(NetworkService { name: name.into(), ..Default::default() })
    }

    /// Serves a network service with matches of its own. Without a payload it gets the endpoint's.
    #[must_use]
    pub fn network_service(mut self, service: NetworkService) -> Self {
        self.services.push(service);
        self
    }

    /// Payload of its services, `ETHERNET` by default.
    #[must_use]
    pub fn payload(mut self, payload: impl Into<String>) -> Self {
        self.payload = payload.into();
        self
    }

    /// A label by which clients choose it, for each of its services.
    #[must_use]
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// Gives each connection a pair of host addresses from these prefixes and a route to the other end. Once more for a second family.
    #[must_use]
    pub fn addresses(mut self, prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        self.prefixes.push(prefixes.into_iter().collect());
        self
    }

    /// Takes addresses that are not of its prefixes, or that another connection has, out of what a client brings along. By default a
    /// client keeps what it has of other endpoints.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// Name of the interface of each connection. By default one is made up from the service's name.
    #[must_use]
    pub fn interface(mut self, name: impl Into<String>) -> Self {
        self.interface = Some(name.into());
        self
    }

    /// The socket to listen on. By default one in a folder of its own below the directory of temporary files.
    #[must_use]
    pub fn listen_on(mut self, url: impl Into<String>) -> Self {
        self.listen_on = Some(url.into());
        self
    }

    /// Policies for its callers, instead of NSM's.
    #[must_use]
    pub fn policies(mut self, policies: Policies) -> Self {
        self.policies = policies;
        self
    }

    /// Lets callers watch none but their own connections. By default everybody with an identity may watch all, as in NSM.
    #[must_use]
    pub fn guarded_monitor(mut self) -> Self {
        self.guarded = true;
        self
    }

    /// Policies for what the manager answers to its registration, all of them by default.
    #[must_use]
    pub fn registry_policies(mut self, policies: ClientPolicies) -> Self {
        self.registry_policies = policies;
        self
    }

    fn read(mut self, lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self, Error> {
        let mut env = Env::new(lookup);
        self.settings.read(&mut env);
        let mut names: Vec<String> = Vec::new();
        env.list("NSM_SERVICE_NAMES", &mut names);
        env.text("NSM_PAYLOAD", &mut self.payload);
        env.read("NSM_LABELS", &mut self.labels, labels);
        env.read("NSM_CIDR_PREFIX", &mut self.prefixes, groups);
        env.read("NSM_IPAM_POLICY", &mut self.strict, strict);
        let masks = |text: &str| Ok(ClientPolicies::from_masks(&text.split(',').map(str::trim).collect::<Vec<_>>()));
        env.read("NSM_REGISTRY_CLIENT_POLICIES", &mut self.registry_policies, masks);
        env.boolean("NSM_REGISTER_SERVICE", &mut self.register_services);
        env.boolean("NSM_UNREGISTER_ITSELF", &mut self.unregister);
        env.finish()?;
        Ok(names.into_iter().fold(self, Self::service))
    }

    /// What is entered into the registry.
    fn registration(&self, url: String) -> NetworkServiceEndpoint {
        let names: Vec<String> = self.services.iter().map(|service| service.name.clone()).collect();
        let labels = NetworkServiceLabels { labels: self.labels.clone() };
        NetworkServiceEndpoint {
            name: self.settings.name.clone(),
            network_service_labels: names.iter().map(|name| (name.clone(), labels.clone())).collect(),
            network_service_names: names,
            url,
            ..Default::default()
        }
    }

    fn chain(&self, source: nsm_identity::X509Source) -> nsm_chain::Endpoint {
        let tokens = token::from_source(source, self.settings.max_token_lifetime);
        let kernel = self.interface.as_deref().map_or_else(KernelServer::new, KernelServer::with_name);
        let mut chain = nsm_chain::Endpoint::builder(&self.settings.name, tokens).policies(self.policies.clone());
        if self.guarded {
            chain = chain.guarded_monitor();
        }
        if self.strict {
            chain = chain.element(Strict::new(self.prefixes.iter().flatten().copied()));
        }
        for group in &self.prefixes {
            chain = chain.element(PointToPoint::new(group.iter().copied()));
        }
        self.elements
            .iter()
            .fold(chain, |chain, element| chain.shared(element.clone()))
            .element(Mechanisms::new(Side::Server).with(KERNEL, kernel).with(NOOP, Null))
            .element(SendFdServer)
            .build()
    }

    async fn listen(&self) -> Result<(Listener, Option<TempDir>), Error> {
        let fail = |cause| Error::Serve { endpoint: self.settings.name.clone(), cause };
        let (url, folder) = match &self.listen_on {
            Some(url) => (url.clone(), None),
            None => {
                let unusable =
                    |cause| nsm_transport::Error::Listen { address: std::env::temp_dir().display().to_string(), cause };
                let folder =
                    tempfile::Builder::new().prefix("nse-").tempdir().map_err(|cause| fail(unusable(cause)))?;
                (format!("unix://{}/listen.on", folder.path().display()), Some(folder))
            }
        };
        let listener = Listener::bind(&Address::parse(&url).map_err(fail)?).await.map_err(fail)?;
        Ok((listener, folder))
    }

    async fn register(
        &self,
        registry: &RegistryClient,
        registration: &NetworkServiceEndpoint,
        name: &mut String,
    ) -> Result<(), nsm_registry::Error> {
        for service in self.services.iter().filter(|_| self.register_services) {
            name.clone_from(&service.name);
            let mut service = service.clone();
            if service.payload.is_empty() {
                service.payload.clone_from(&self.payload);
            }
            registry.register_ns(service).await?;
        }
        name.clone_from(&registration.name);
        registry.register_nse(registration.clone()).await.map(drop)
    }

    /// Waits for the identity, listens, registers; returns when clients can find it.
    ///
    /// # Errors
    /// No identity or no registration in time, or a socket that cannot be opened.
    pub async fn start(self) -> Result<Endpoint, Error> {
        if self.services.is_empty() {
            return Err(Error::setting("NSM_SERVICE_NAMES", "an endpoint needs a service"));
        }
        let settings = &self.settings;
        let (source, transport) = settings.transport().await?;
        let (listener, folder) = self.listen().await?;
        let registration = self.registration(listener.address().to_string());
        let chain = self.chain(source.clone());
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(transport, listener, chain.service().routes(), stop.clone()));
        // From here on a failure ends the server by `stop`.
        let guard = stop.clone().drop_guard();
        let mut failing = settings.name.clone();
        let registered = async {
            let registry = RegistryClient::builder(&settings.manager, source)
                .max_token_lifetime(settings.max_token_lifetime)
                .dial_timeout(settings.dial_timeout)
                .patience(settings.patience)
                .policies(self.registry_policies)
                .build()?;
            self.register(&registry, &registration, &mut failing).await.map(|()| registry)
        };
        let registry = registered.await.map_err(|cause| Error::Register {
            endpoint: failing,
            manager: settings.manager.clone(),
            cause,
        })?;
        tracing::info!(endpoint = registration.name, url = registration.url, "serving");
        let (hub, stop) = (chain.hub().clone(), guard.disarm());
        Ok(Endpoint { registration, registry, hub, unregister: self.unregister, stop, server, _folder: folder })
    }
}

async fn serve(
    transport: Transport,
    listener: Listener,
    routes: Routes,
    stop: CancellationToken,
) -> Result<(), nsm_transport::Error> {
    transport.serve(vec![listener], routes, stop).await
}

/// `key:value,key:value`
fn labels(text: &str) -> Result<BTreeMap<String, String>, String> {
    let pair = |pair: &str| {
        let (key, value) = pair.split_once(':').ok_or_else(|| format!("{pair:?} is not key:value"))?;
        Ok((key.trim().to_owned(), value.trim().to_owned()))
    };
    text.split(',').filter(|part| !part.trim().is_empty()).map(pair).collect()
}

/// Whether addresses that are not of the endpoint are dropped.
fn strict(text: &str) -> Result<bool, String> {
    match text {
        "polite" => Ok(false),
        "strict" => Ok(true),
        _ => Err(format!("{text:?} is neither polite nor strict")),
    }
}

/// `prefix,prefix` for one group, `[prefix,prefix],[prefix]` for several: a connection gets addresses from each.
fn groups(text: &str) -> Result<Vec<Vec<IpNet>>, String> {
    let group = |text: &str| {
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        parts.map(|part| part.parse().map_err(|_| format!("{part:?} is no prefix"))).collect::<Result<Vec<_>, _>>()
    };
    let text = text.trim();
    let Some(inner) = text.strip_prefix('[') else { return Ok(vec![group(text)?]) };
    let inner = inner.strip_suffix(']').ok_or_else(|| format!("{text:?}: a bracket is not closed"))?;
    inner.split("],").map(|part| group(part.trim().trim_start_matches('['))).collect()
}

#[cfg(test)]
mod tests;
