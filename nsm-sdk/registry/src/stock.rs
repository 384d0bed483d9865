//! Stock chains in their documented order: the registry itself, and the registry part of a manager.

use crate::{
    Call, Chain, Context, Element, Error, Object,
    elements::{
        authorize::{Authorize, AuthorizeClient, ClientPolicies, Owners, Policies},
        begin::Begin,
        clientinfo::ClientInfo,
        connect::{Connect, Remote, Through},
        descriptors::{RecvFdServer, SendFdServer},
        dial::{Dial, Dialer},
        expire::Expire,
        localbypass::LocalBypass,
        memory::{Memory, load},
        remember::Remember,
        stamp::{SetPayload, SetRegistrationTime},
        updatepath::UpdatePath,
    },
    store::{MemoryStore, Store},
};
use nsm_identity::{X509Source, clock};
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use std::{sync::Arc, time::Duration};

/// Life of an endpoint that nobody refreshes.
pub const DEFAULT_EXPIRATION: Duration = Duration::from_secs(60);
/// What entries get after a restart of the registry at least: time for their owners to come back.
const RESTART_GRACE: Duration = Duration::from_secs(10);

/// Identity and rules of a registry.
#[derive(Clone)]
pub struct Security {
    /// Signs the own tokens.
    pub source: X509Source,
    /// Life of the own tokens.
    pub max_token_lifetime: Duration,
    /// What applies to callers.
    pub policies: Policies,
    /// What applies to the answers of a registry above.
    pub client_policies: ClientPolicies,
}

impl Security {
    /// All policies and tokens of 10 minutes.
    pub fn new(source: X509Source) -> Self {
        Self {
            source,
            max_token_lifetime: Duration::from_secs(600),
            policies: Policies::default(),
            client_policies: ClientPolicies::default(),
        }
    }

    fn update_path(&self) -> UpdatePath {
        UpdatePath::new(self.source.clone(), self.max_token_lifetime)
    }
}

fn chain<T: Object>(elements: Vec<Arc<dyn Element<T>>>) -> Chain<T> {
    Chain::new(elements)
}

/// A whole registry over a [`Store`].
#[derive(Clone)]
pub struct Registry {
    /// For gRPC: with path, tokens and policies.
    pub services: Chain<NetworkService>,
    /// For gRPC: with path, tokens and policies.
    pub endpoints: Chain<NetworkServiceEndpoint>,
    /// For a manager in the same process: names still belong to their owners.
    pub local_services: Chain<NetworkService>,
    /// For a manager in the same process: names still belong to their owners.
    pub local_endpoints: Chain<NetworkServiceEndpoint>,
}

impl Registry {
    /// Serves what is in `store`; what a former process left there is kept, with its end of life.
    pub async fn open(store: Arc<dyn Store>, security: &Security) -> Result<Self, Error> {
        let (service_owners, endpoint_owners) = (Arc::<Owners<_>>::default(), Arc::<Owners<_>>::default());
        let memory = || Memory::new(store.clone());

        // grpcmetadata is the gRPC service itself; updatepath → authorize → setpayload → memory.
        let payload: Arc<dyn Element<NetworkService>> = Arc::new(SetPayload);
        let service_end: Arc<dyn Element<NetworkService>> = Arc::new(memory());
        let services = chain(vec![
            Arc::new(security.update_path()),
            Arc::new(Authorize::new(security.policies, service_owners.clone())),
            payload.clone(),
            service_end.clone(),
        ]);
        let local_services =
            chain(vec![Arc::new(Authorize::new(security.policies, service_owners.clone())), payload, service_end]);

        // updatepath → authorize → begin → setregistrationtime → expire → memory.
        let begin: Arc<dyn Element<NetworkServiceEndpoint>> = Arc::new(Begin::new());
        let time: Arc<dyn Element<NetworkServiceEndpoint>> = Arc::new(SetRegistrationTime::default());
        let expire: Arc<dyn Element<NetworkServiceEndpoint>> =
            Arc::new(Expire::new(Some(DEFAULT_EXPIRATION), endpoint_owners.clone()));
        let end: Arc<dyn Element<NetworkServiceEndpoint>> = Arc::new(memory());
        let endpoints = chain(vec![
            Arc::new(security.update_path()),
            Arc::new(Authorize::new(security.policies, endpoint_owners.clone())),
            begin.clone(),
            time.clone(),
            expire.clone(),
            end.clone(),
        ]);
        let local_endpoints =
            chain(vec![Arc::new(Authorize::new(security.policies, endpoint_owners)), begin, time, expire, end]);

        for service in load::<NetworkService>(&*store).await?.0 {
            service_owners.remember(service);
        }
        let soonest = clock::now() + RESTART_GRACE;
        for mut endpoint in load::<NetworkServiceEndpoint>(&*store).await?.0 {
            endpoint.set_expiration(Some(endpoint.expiration().map_or(soonest, |end| end.max(soonest))));
            local_endpoints.register(Call::new(endpoint, Context::new())).await?;
        }
        Ok(Self { services, endpoints, local_services, local_endpoints })
    }
}

/// Where a manager's registry passes everything on to.
pub enum Upstream {
    /// A registry elsewhere, by gRPC.
    Remote(Arc<Dialer>),
    /// A registry in this process.
    Local(Registry),
    /// None: the manager keeps everything in memory itself.
    BuiltIn,
}

/// The registry part of a manager.
#[derive(Clone)]
pub struct ManagerRegistry {
    /// For gRPC.
    pub services: Chain<NetworkService>,
    /// For gRPC.
    pub endpoints: Chain<NetworkServiceEndpoint>,
    /// For elements of the same process (discovery): without path, policies and descriptors.
    pub local_services: Chain<NetworkService>,
    /// For elements of the same process: local endpoints under URLs that this process can connect to.
    pub local_endpoints: Chain<NetworkServiceEndpoint>,
    /// For an endpoint in the same process, such as the forwarder of the node.
    pub own_endpoints: Chain<NetworkServiceEndpoint>,
    /// What is kept over a restart, and where it goes then.
    kept: Arc<Kept>,
}

struct Kept {
    remember: Arc<Remember>,
    sockets: Arc<RecvFdServer>,
    bypass: Arc<LocalBypass>,
    owners: Arc<Owners<NetworkServiceEndpoint>>,
}

/// begin → dial → authorize → connect. `authorize` stands below `dial`, which knows who answers.
fn client<T: Remote>(dialer: &Arc<Dialer>, policies: ClientPolicies) -> Chain<T> {
    chain(vec![
        Arc::new(Begin::<T>::new()),
        Arc::new(Dial::new(dialer.clone())),
        Arc::new(AuthorizeClient::new(policies)),
        Arc::new(Connect),
    ])
}

impl ManagerRegistry {
    /// `url` is where other nodes reach this manager; `info` labels the endpoints of this node; `state` keeps where they are,
    /// for [`ManagerRegistry::recall`].
    pub fn new(
        upstream: Upstream,
        url: &str,
        info: ClientInfo,
        security: &Security,
        state: Option<Arc<dyn Store>>,
    ) -> Self {
        let (services, endpoints): (Chain<NetworkService>, Chain<NetworkServiceEndpoint>) = match upstream {
            Upstream::Remote(dialer) => (
                chain(vec![Arc::new(Through::new(client(&dialer, security.client_policies)))]),
                chain(vec![Arc::new(Through::new(client(&dialer, security.client_policies)))]),
            ),
            Upstream::Local(registry) => (
                chain(vec![Arc::new(Through::new(registry.local_services))]),
                chain(vec![Arc::new(Through::new(registry.local_endpoints))]),
            ),
            Upstream::BuiltIn => {
                let store = Arc::new(MemoryStore::default());
                let memory = || Memory::new(store.clone());
                (chain(vec![Arc::new(SetPayload), Arc::new(memory())]), chain(vec![Arc::new(memory())]))
            }
        };

        let kept = Kept {
            remember: Arc::new(Remember::new(state)),
            sockets: Arc::default(),
            bypass: Arc::new(LocalBypass::new(url)),
            owners: Arc::default(),
        };
        let upstream_endpoints: Arc<dyn Element<NetworkServiceEndpoint>> = Arc::new(Through::new(endpoints));
        let inner: Vec<Arc<dyn Element<NetworkServiceEndpoint>>> = vec![kept.bypass.clone(), upstream_endpoints];

        let owners = kept.owners.clone();
        let expire = Expire::new(Some(DEFAULT_EXPIRATION), owners.clone());
        let expire = expire.holder(kept.sockets.clone()).holder(kept.bypass.clone());
        let mut own: Vec<Arc<dyn Element<NetworkServiceEndpoint>>> = vec![
            Arc::new(Begin::new()),
            Arc::new(info),
            Arc::new(expire),
            kept.sockets.clone(),
            Arc::new(SendFdServer),
            kept.remember.clone(),
        ];
        own.extend(inner.iter().cloned());
        let mut outer: Vec<Arc<dyn Element<NetworkServiceEndpoint>>> =
            vec![Arc::new(security.update_path()), Arc::new(Authorize::new(security.policies, owners))];
        outer.extend(own.iter().cloned());

        let passed: Arc<dyn Element<NetworkService>> = Arc::new(Through::new(services.clone()));
        Self {
            services: chain(vec![
                Arc::new(security.update_path()),
                Arc::new(Authorize::new(security.policies, Arc::<Owners<NetworkService>>::default())),
                passed,
            ]),
            endpoints: chain(outer),
            local_services: services,
            local_endpoints: chain(inner),
            own_endpoints: chain(own),
            kept: Arc::new(kept),
        }
    }

    /// Takes over the local endpoints that a former run of this manager knew, as far as they are still there; to be called before
    /// anything is served. Returns their names.
    ///
    /// # Errors
    /// The store cannot be read.
    pub async fn recall(&self) -> Result<Vec<String>, Error> {
        let Kept { remember, sockets, bypass, owners } = &*self.kept;
        Ok(remember.recall(sockets, bypass, owners).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_transport::{Address, Transport};

    fn security() -> Security {
        let authority = nsm_identity::Authority::generate("example.org").unwrap();
        Security::new(authority.source("/registry", Duration::from_secs(3600)).unwrap())
    }

    #[tokio::test]
    async fn the_registrys_chains_have_their_documented_order() {
        let registry = Registry::open(Arc::new(MemoryStore::default()), &security()).await.unwrap();
        assert_eq!(registry.services.names(), ["updatepath", "authorize", "setpayload", "memory"]);
        let endpoints = ["updatepath", "authorize", "begin", "setregistrationtime", "expire", "memory"];
        assert_eq!(registry.endpoints.names(), endpoints);
        assert_eq!(registry.local_services.names(), ["authorize", "setpayload", "memory"]);
        assert_eq!(registry.local_endpoints.names(), endpoints[1..]);
    }

    #[tokio::test]
    async fn the_managers_chains_have_their_documented_order() {
        let manager = ManagerRegistry::new(Upstream::BuiltIn, "tcp://m", ClientInfo::default(), &security(), None);
        assert_eq!(manager.services.names(), ["updatepath", "authorize", "connect"]);
        let endpoints = [
            "updatepath",
            "authorize",
            "begin",
            "clientinfo",
            "expire",
            "recvfd",
            "sendfd",
            "remember",
            "localbypass",
            "connect",
        ];
        assert_eq!(manager.endpoints.names(), endpoints);
        assert_eq!(manager.own_endpoints.names(), endpoints[2..]);
        assert_eq!(manager.local_endpoints.names(), endpoints[8..]);
        let address = Address::parse("tcp://127.0.0.1:1").unwrap();
        let dialer = Dialer::new(Transport::insecure(), address, Duration::from_secs(1));
        let upstream = client::<NetworkService>(&dialer, ClientPolicies::default());
        assert_eq!(upstream.names(), ["begin", "dial", "authorize", "connect"]);
    }
}
