//! Stateless load balancer of a conduit.
//!
//! Packets for VIPs are forwarded by the eBPF program of `meridio-maglev`; this process keeps its tables in step. It is an
//! NSM endpoint for the proxies, through whose interfaces targets are reached.
//!
//! ```text
//!  NSP ── VIPs, conduit, streams, flows ─┐            pure
//!  NSP ── targets, frontends ────────────┼──► Inputs ─────► Desired ──► engine (tables), rules and routes
//!  kernel ── interfaces, neighbours ─────┘       │
//!                                                └─ frontend here? ──► NSM endpoint registered or not
//! ```
//!
//! Nothing that forwards is taken away because this process starts, stops, or hears nothing.

mod apply;
mod availability;
#[cfg(test)]
mod cli;
mod dataplane;
mod desired;
mod endpoint;
mod gate;
mod hops;
mod inputs;
pub mod inspect;
mod links;
mod metrics;
#[cfg(test)]
mod namespaces;
mod prepare;
mod removal;
mod routing;
mod settings;
mod told;
mod watches;

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use meridio_common::{Health, Probe};
use nsm_kernel::Netns;
use nsm_registry::RegistryClient;
use nsm_transport::Transport;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::availability::Availability;
use crate::dataplane::Dataplane;
use crate::inputs::Shared;
use crate::watches::Watches;

pub use settings::Settings;

/// Time for watchers of the availability to hear the last word.
const LAST_WORD: Duration = Duration::from_millis(200);

/// How long a process that is about to end is waited for.
const PREDECESSOR: Duration = Duration::from_secs(5);

/// Runs the load balancer until `stop`. What it has set up in the kernel stays: the next run adopts it.
///
/// # Errors
/// Faulty settings, a socket that cannot be made, or another process that runs the load balancer of this network namespace. What the kernel refuses is told by readiness and tried again.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    if settings.remove {
        return removal::remove(&settings).await;
    }
    alone(&settings.bpf_dir, PREDECESSOR).await?;
    let health = Health::start("Meridio-load-balancer", &settings.health_socket, &stop)?;
    health.register(Probe::Startup, &[]);
    health.register(
        Probe::Readiness,
        &["Sysctl", "DataPlane", "Configuration", "NSPCli", "NSMEndpoint", "Egress", "Stream", "Flow"],
    );
    health.register(Probe::Liveness, &["NSMEndpoint"]);
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").context("hostname")?.trim().to_owned();
    let netns = Netns::current().context("network namespace")?;
    let faults = prepare::prepare(&settings, &netns).await;
    let availability = Availability::new(&hostname);
    let dataplane = Dataplane::new(&settings, netns.clone(), health.clone(), availability.clone());

    let shared = Shared::new();
    let mut tasks = JoinSet::new();
    let (own, namespace) = (settings.clone(), netns.clone());
    tasks.spawn(prepare::until_prepared(health.clone(), stop.clone(), faults, move || {
        let (own, namespace) = (own.clone(), namespace.clone());
        async move { prepare::prepare(&own, &namespace).await }
    }));
    let (prefix, external) = (settings.interface_prefix(), settings.external_interface.clone());
    if settings.metrics_enabled {
        tasks.spawn(metrics::run(settings.clone(), netns.clone(), health.clone(), stop.clone()));
    }
    tasks.spawn(removal::clean_up(settings.bpf_dir.clone(), stop.clone()));
    tasks.spawn(links::run(netns, prefix, external, shared.clone(), stop.clone()));
    // The data plane ends before the socket that tells the frontend about it.
    let told = CancellationToken::new();
    let forwarding = tokio::spawn(dataplane.run(shared.clone(), stop.clone()));
    let result = control(&settings, &hostname, &shared, &health, availability, &mut tasks, &stop, &told).await;
    // Who cannot serve ends the load balancer, and with it all tasks.
    stop.cancel();
    let _ = forwarding.await;
    tokio::time::sleep(LAST_WORD).await;
    told.cancel();
    while tasks.join_next().await.is_some() {}
    result
}

/// Two processes in one network namespace would take sockets and registrations from each other: the second one ends before it has
/// touched anything.
async fn alone(base: &Path, patience: Duration) -> anyhow::Result<()> {
    let end = Instant::now() + patience;
    loop {
        let base = base.to_owned();
        let vacant = move || meridio_maglev::own_directory(&base).and_then(|own| meridio_maglev::vacant(&own));
        match tokio::task::spawn_blocking(vacant).await? {
            Err(error @ meridio_maglev::Error::Held { .. }) if Instant::now() >= end => return Err(error.into()),
            Err(meridio_maglev::Error::Held { .. }) => tokio::time::sleep(Duration::from_millis(100)).await,
            // What else is wrong is told by readiness.
            _ => return Ok(()),
        }
    }
}

/// Everything that needs an identity.
#[allow(clippy::too_many_arguments)] // the parts of one process, used once
async fn control(
    settings: &Settings,
    hostname: &str,
    shared: &Shared,
    health: &Health,
    availability: Availability,
    tasks: &mut JoinSet<()>,
    stop: &CancellationToken,
    told: &CancellationToken,
) -> anyhow::Result<()> {
    let Some(source) = meridio_common::grpc::identity(&settings.spiffe_endpoint_socket, stop).await else {
        return Ok(());
    };
    let server = meridio_common::grpc::Server::bind(&settings.socket, &source).await.context("NSM_SOCKET")?;
    let serving = server.serve(Routes::new(availability.server()), told.clone());
    tasks.spawn(async move {
        if let Err(error) = serving.await {
            tracing::error!(%error, "stream availability");
        }
    });
    let keep_alive = settings.grpc_keepalive_time.into();
    let nsp = meridio_common::grpc::connect_with(&source, &settings.nsp_service, keep_alive)?;
    Watches::new(nsp, settings, hostname, shared.clone(), health.clone(), stop.clone()).spawn(tasks);

    let transport = Transport::new(source.clone())?.with_max_token_lifetime(settings.max_token_lifetime.into());
    let registry = RegistryClient::builder(settings.connect_to.clone(), source.clone())
        .max_token_lifetime(settings.max_token_lifetime.into())
        .dial_timeout(settings.dial_timeout.into())
        .build()?;
    let chain = endpoint::chain(settings, source);
    endpoint::run(settings, &chain, transport, registry, shared.clone(), health.clone(), stop.clone()).await
}
