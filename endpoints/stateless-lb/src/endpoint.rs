//! This load balancer as an NSM endpoint for the proxies, registered only while its frontend has connectivity.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use meridio_common::{Backoff, Health};
use meridio_proto::nsm::registry::{NetworkService, NetworkServiceEndpoint};
use nsm_chain::elements::kernel_mechanism::KernelServer;
use nsm_chain::elements::mechanisms::Mechanisms;
use nsm_chain::elements::null::Null;
use nsm_chain::elements::sendfd::SendFdServer;
use nsm_chain::{Endpoint, Side};
use nsm_identity::X509Source;
use nsm_registry::RegistryClient;
use nsm_transport::{Address, Listener, Transport};
use tokio_util::sync::CancellationToken;

use crate::inputs::Shared;
use crate::settings::Settings;

/// Time for taking the endpoint out of the registry at the end.
const UNREGISTER_AT_END: Duration = Duration::from_secs(3);
/// And on loss of the frontend.
const UNREGISTER: Duration = Duration::from_secs(15);

/// The endpoint's chain: addresses are the proxy's business.
pub(crate) fn chain(settings: &Settings, source: X509Source) -> Endpoint {
    let tokens = nsm_chain::token::from_source(source, settings.max_token_lifetime.into());
    Endpoint::builder(&settings.name, tokens)
        .element(Mechanisms::new(Side::Server).with("KERNEL", KernelServer::new()).with("NOOP", Null))
        .element(SendFdServer)
        .build()
}

/// Serves the endpoint on a socket of its own until `stop`, registered while the frontend is there.
///
/// # Errors
/// When the socket cannot be made.
pub(crate) async fn run(
    settings: &Settings,
    service: &Endpoint,
    transport: Transport,
    registry: RegistryClient,
    shared: Shared,
    health: Health,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let path: PathBuf = std::env::temp_dir().join(&settings.name).join("listen.on");
    let listener = Listener::bind(&Address::Unix(path.clone())).await.context("socket of the endpoint")?;
    let url = format!("unix://{}", path.display());
    // It outlives `stop` by the time that unregistering takes, so that nobody is sent to a socket that is gone.
    let end = CancellationToken::new();
    let routes = service.service().routes();
    let server = tokio::spawn({
        let end = end.clone();
        async move { transport.serve(vec![listener], routes, end).await }
    });
    health.serving("NSMEndpoint");
    let name = settings.service_name.clone();
    let gate = Gate {
        endpoint: NetworkServiceEndpoint {
            name: settings.name.clone(),
            network_service_names: vec![name.clone()],
            url,
            ..NetworkServiceEndpoint::default()
        },
        service: NetworkService { name, payload: "ETHERNET".to_owned(), ..NetworkService::default() },
        registry,
        health,
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = gate.follow(&shared) => {}
    }
    gate.close(UNREGISTER_AT_END).await;
    end.cancel();
    server.await.context("endpoint")?.context("endpoint")
}

struct Gate {
    endpoint: NetworkServiceEndpoint,
    service: NetworkService,
    registry: RegistryClient,
    health: Health,
}

impl Gate {
    /// Registers and unregisters as the frontend comes and goes. Whatever the state, what arrives is forwarded.
    async fn follow(&self, shared: &Shared) {
        let mut inputs = shared.subscribe();
        // At first it is not known what an earlier process has left in the registry.
        let mut open = None;
        loop {
            let frontend = inputs.borrow_and_update().frontend;
            match frontend {
                Some(true) if open != Some(true) => {
                    tokio::select! {
                        () = self.open() => open = Some(true),
                        // It may have been registered by now, or be still: the client goes on trying by itself.
                        () = until(&mut inputs, |frontend| frontend == Some(false)) => open = None,
                    }
                    continue;
                }
                Some(false) => {
                    self.health.waiting("Egress", "the frontend of this pod", "is a gateway reachable?");
                    if open != Some(false) {
                        self.close(UNREGISTER).await;
                        open = Some(false);
                        continue;
                    }
                }
                _ => {}
            }
            if inputs.changed().await.is_err() {
                return;
            }
        }
    }

    async fn open(&self) {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        loop {
            let registered = async {
                self.registry.register_ns(self.service.clone()).await?;
                self.registry.register_nse(self.endpoint.clone()).await
            };
            match registered.await {
                Ok(_) => {
                    tracing::info!(endpoint = self.endpoint.name, "registered");
                    return self.health.serving("Egress");
                }
                Err(error) => {
                    let waits = format!("its registration ({error})");
                    self.health.waiting("Egress", &waits, "is the NSM manager running?");
                }
            }
            backoff.wait().await;
        }
    }

    async fn close(&self, timeout: Duration) {
        match self.registry.unregister_nse(self.endpoint.clone(), Some(timeout)).await {
            Ok(()) => tracing::info!(endpoint = self.endpoint.name, "unregistered"),
            Err(error) => tracing::warn!(%error, "endpoint not unregistered; it will expire"),
        }
    }
}

async fn until(inputs: &mut tokio::sync::watch::Receiver<crate::inputs::Inputs>, wanted: fn(Option<bool>) -> bool) {
    // An error means that nobody can change the inputs any more: wait for ever, the caller's other branch decides.
    if inputs.wait_for(|inputs| wanted(inputs.frontend)).await.is_err() {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nsm_registry::{Chain, service};
    use tokio::sync::watch;
    use tonic::service::Routes;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    /// What a manager has been told, and whether it takes who registers.
    #[derive(Clone, Debug, Default)]
    struct Told {
        refuses: bool,
        arrived: u32,
        registered: bool,
        unregistered: u32,
    }

    struct Manager(watch::Sender<Told>);

    #[tonic::async_trait]
    impl nsm_registry::Element<NetworkServiceEndpoint> for Manager {
        fn name(&self) -> &'static str {
            "manager"
        }

        async fn register(
            &self,
            call: nsm_registry::Call<NetworkServiceEndpoint>,
            _: nsm_registry::Next<NetworkServiceEndpoint>,
        ) -> Result<NetworkServiceEndpoint, nsm_registry::Error> {
            self.0.send_modify(|told| told.arrived += 1);
            if self.0.borrow().refuses {
                return Err(nsm_registry::Error::new("manager", &call.message.name, "not now"));
            }
            self.0.send_modify(|told| told.registered = true);
            Ok(call.message)
        }

        async fn unregister(
            &self,
            _: nsm_registry::Call<NetworkServiceEndpoint>,
            _: nsm_registry::Next<NetworkServiceEndpoint>,
        ) -> Result<(), nsm_registry::Error> {
            self.0.send_modify(|told| (told.registered, told.unregistered) = (false, told.unregistered + 1));
            Ok(())
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_registration_under_way_ends_with_the_frontend() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("unix://{}", folder.path().join("manager").display());
        let told = watch::Sender::new(Told::default());
        let manager: Chain<NetworkServiceEndpoint> = Chain::new(vec![Arc::new(Manager(told.clone())) as Arc<_>]);
        let services: Chain<NetworkService> = Chain::new(vec![]);
        let routes = service::add_routes(Routes::default(), services, manager);
        let listener = Listener::bind(&Address::parse(&url).unwrap()).await.unwrap();
        let end = CancellationToken::new();
        let serving = Transport::insecure();
        let server = tokio::spawn({
            let end = end.clone();
            async move { serving.serve(vec![listener], routes, end).await }
        });
        let endpoint = NetworkServiceEndpoint { name: "lb".to_owned(), ..NetworkServiceEndpoint::default() };
        let gate = Gate {
            endpoint,
            service: NetworkService { name: "s".to_owned(), ..NetworkService::default() },
            registry: RegistryClient::insecure(url).build().unwrap(),
            health: Health::detached("test"),
        };
        let shared = Shared::new();
        let following = tokio::spawn({
            let shared = shared.clone();
            async move { gate.follow(&shared).await }
        });
        let until = async |what: &str, condition: fn(&Told) -> bool| {
            let mut seen = told.subscribe();
            let waited = tokio::time::timeout(SOON, seen.wait_for(condition)).await.is_ok();
            assert!(waited, "{what}: {:?}", *told.borrow());
        };
        let frontend = |there| shared.change(|inputs| inputs.frontend = Some(there));

        frontend(true);
        until("registered", |told| told.registered).await;
        frontend(false);
        until("unregistered", |told| told.unregistered == 1 && !told.registered).await;
        told.send_modify(|told| (told.refuses, told.arrived) = (true, 0));
        frontend(true);
        until("under way", |told| told.arrived > 0).await;
        frontend(false);
        until("unregistered again", |told| told.unregistered == 2).await;
        told.send_modify(|told| told.refuses = false);
        // A client that still tried would have come by then.
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(!told.borrow().registered, "{:?}", *told.borrow());

        frontend(true);
        until("registered once more", |told| told.registered).await;
        following.abort();
        end.cancel();
        server.await.unwrap().unwrap();
    }
}
