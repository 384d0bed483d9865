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
                        () = until(&mut inputs, |frontend| frontend == Some(false)) => {}
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
