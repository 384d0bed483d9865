//! Per-node bridge between the targets of a conduit and its load balancers.
//!
//! Towards targets the proxy is an NSM endpoint, towards load balancers an NSM client with one connection to each. All interfaces
//! are ports of one bridge; the bridge's addresses are the targets' gateways. Replies of the targets, which have a VIP as
//! source, are spread over the load balancers that are alive.
//!
//! ```text
//!  NSP ── VIPs ──────────┐
//!  registry ── LBs ──────┤            pure                      thin
//!  NSM ── connections ───┼──► Inputs ─────► ports, rules, routes ────► kernel
//!  probes ── answers ────┤                        ▲                     │
//!  IPAM ── addresses ────┘                        └──── read back ──────┘
//! ```

mod bridge;
mod elements;
mod endpoint;
mod inputs;
mod ipam;
mod ipcontext;
mod mesh;
mod probe;
mod routing;
mod settings;
mod store;
#[cfg(test)]
mod testing;
mod vips;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use meridio_common::{Backoff, Health, Probe};
use nsm_chain::elements::heal::LivenessCheck;
use nsm_chain::elements::kernel_mechanism::{KernelClient, KernelServer};
use nsm_chain::elements::mechanisms::Mechanisms;
use nsm_chain::elements::mtu::Mtu;
use nsm_chain::elements::null::Null;
use nsm_chain::elements::sendfd::{SendFdClient, SendFdServer};
use nsm_chain::{Client, Endpoint, EndpointBuilder, Side};
use nsm_identity::X509Source;
use nsm_registry::RegistryClient;
use nsm_transport::Transport;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::bridge::Bridge;
use crate::elements::TargetAddresses;
use crate::inputs::Shared;
use crate::ipam::Addresses;
use crate::mesh::Mesh;
use crate::settings::Families;
use crate::store::Store;

pub use settings::Settings;

/// Probes that heal counts before it believes that a data path is dead, five a second: longer than any of our own restarts.
const DEAD_AFTER: u32 = 10;

/// How often a target that is silent towards NSM is looked at, as in NSM's own processes.
const KEEP_INTERVAL: Duration = Duration::from_secs(30);

/// Runs the proxy until `stop`. What it has set up in the kernel stays: the next run adopts it.
///
/// # Errors
/// Faulty settings, no rights, or a bridge that cannot be made.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    let families = settings.families().context("NSM_IP_FAMILY")?;
    let health = Health::start("Meridio-proxy", &settings.health_socket, &stop)?;
    health.register(Probe::Startup, &[]);
    health.register(Probe::Readiness, &["Sysctl", "IPAMCli", "NSPCli", "NSMEndpoint", "Egress"]);
    health.register(Probe::Liveness, &["NSMEndpoint"]);
    match bridge::prepare(families).await {
        Ok(()) => health.serving("Sysctl"),
        Err(fault) => {
            tracing::error!(fault, "kernel settings");
            health.waiting("Sysctl", &fault, "set it in an init container");
        }
    }

    let seed = format!("{}/{}", settings.host, settings.name);
    let bridge = Bridge::adopt_or_make(&seed, families).await.context("bridge")?;
    let shared = Shared::new();
    let inherited = bridge.inherited().await.context("reply routes")?;
    shared.change(|inputs| inputs.inherited = inherited);

    let Some(source) = meridio_common::grpc::identity(&settings.spiffe_endpoint_socket, &stop).await else {
        return Ok(());
    };
    let parts = Parts { settings, families, health, shared, source };
    parts.run(bridge, stop).await
}

/// What all tasks of a proxy share.
struct Parts {
    settings: Settings,
    families: Families,
    health: Health,
    shared: Shared,
    source: X509Source,
}

impl Parts {
    async fn run(self, bridge: Bridge, stop: CancellationToken) -> anyhow::Result<()> {
        let settings = &self.settings;
        let kept = bridge.has_rules().await.context("reply rules")?;
        let keep_alive: Duration = settings.grpc_keepalive_time.into();
        let connect = |address: &str| meridio_common::grpc::connect_with(&self.source, address, keep_alive);
        let addresses = Addresses::new(connect(&settings.ipam_service)?, settings, self.families);
        let nsp = connect(&settings.nsp_address())?;
        let transport =
            Transport::new(self.source.clone())?.with_max_token_lifetime(settings.max_token_lifetime.into());
        let registry = RegistryClient::builder(settings.connect_to.clone(), self.source.clone())
            .max_token_lifetime(settings.max_token_lifetime.into())
            .dial_timeout(settings.dial_timeout.into())
            .build()?;

        let mut tasks = JoinSet::new();
        let (shared, health) = (self.shared.clone(), self.health.clone());
        tasks.spawn(bridge.reconcile(shared.clone(), health.clone(), settings.mtu, stop.clone()));
        tasks.spawn(probe::run(shared.clone(), settings.probe_interval.into(), settings.probe_misses, stop.clone()));
        tasks.spawn(vips::watch(nsp, settings.trench.clone(), kept, shared.clone(), health.clone(), stop.clone()));
        let renew = settings.bridge_ip_renew_interval.into();
        tasks.spawn(bridge_addresses(addresses.clone(), shared.clone(), health.clone(), renew, stop.clone()));

        let mesh = Mesh {
            client: self.client(&transport, &addresses),
            registry: registry.clone(),
            shared: shared.clone(),
            store: Store::open(&settings.state_dir, &settings.name),
            service: settings.network_service_name.clone(),
            name: settings.name.clone(),
            request_timeout: settings.request_timeout.into(),
        };
        tasks.spawn(Mesh::settle(shared.clone(), stop.clone()));
        tasks.spawn(mesh.run(stop.clone()));
        let endpoint = self.endpoint(&addresses);
        tasks.spawn(endpoint::announce(endpoint.hub().clone(), shared, stop.clone()));
        let served = endpoint::run(settings, &endpoint, transport, registry, health, stop.clone()).await;
        // An endpoint that cannot serve ends the proxy, and with it all tasks.
        stop.cancel();
        while tasks.join_next().await.is_some() {}
        served
    }

    fn client(&self, transport: &Transport, addresses: &Addresses) -> Client {
        let liveness =
            LivenessCheck { misses: DEAD_AFTER, ..LivenessCheck::new(Arc::new(mesh::Probed(self.shared.clone()))) };
        Client::builder(&self.settings.name, Arc::new(nsm_chain::remote::Grpc::new(transport.clone()).sharing()))
            .url(&self.settings.connect_to)
            .dial_timeout(self.settings.dial_timeout.into())
            .liveness(liveness)
            .reselect(mesh::reselect_pinned())
            .element(Mechanisms::new(Side::Client).with("KERNEL", KernelClient::new()))
            .element(elements::BalancerAddresses::new(addresses.clone()))
            .element(Mtu(self.settings.mtu))
            .element(SendFdClient)
            .build()
    }

    fn endpoint(&self, addresses: &Addresses) -> Endpoint {
        let tokens = nsm_chain::token::from_source(self.source.clone(), self.settings.max_token_lifetime.into());
        let asker = Arc::new(probe::Asker::default());
        let targets = TargetAddresses::new(addresses.clone(), self.shared.clone(), asker);
        for_targets(Endpoint::builder(&self.settings.name, tokens), Arc::new(targets), self.settings.mtu)
    }
}

/// The endpoint for targets.
fn for_targets(builder: EndpointBuilder, targets: Arc<TargetAddresses>, mtu: u32) -> Endpoint {
    builder
        .keep_while(targets.clone(), KEEP_INTERVAL)
        .element(Mechanisms::new(Side::Server).with("KERNEL", KernelServer::new()).with("NOOP", Null))
        .shared(targets)
        .element(Mtu(mtu))
        .element(SendFdServer)
        .build()
}

/// Asks the IPAM for the bridge's addresses until it answers, and again every `renew` to keep the lease.
async fn bridge_addresses(
    addresses: Addresses,
    shared: Shared,
    health: Health,
    renew: Duration,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    let asking = async {
        loop {
            match addresses.allocate("bridge").await {
                Ok(nets) => {
                    health.serving("IPAMCli");
                    shared.change(|inputs| inputs.bridge = nets.into_iter().collect());
                    backoff.reset();
                    tokio::time::sleep(renew).await;
                }
                Err(status) => {
                    health.waiting(
                        "IPAMCli",
                        &format!("addresses for the bridge ({})", status.message()),
                        "is the IPAM running?",
                    );
                    backoff.wait().await;
                }
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = asking => {}
    }
}
