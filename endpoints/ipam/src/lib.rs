//! Address allocation for the conduits of a trench.
//!
//! One gRPC service (`ipam.v1`): a pool for each family, carved into conduits, nodes and single addresses by first fit,
//! idempotent by name, kept in SQLite. The NSP says which conduits exist. Everything is loaded before the port is opened.

mod api;
mod conduits;
mod error;
pub mod prefix;
mod service;
mod settings;
mod store;
pub mod tree;

use std::time::Duration;

use meridio_common::{Health, Probe, grpc};
use meridio_proto::ipam::v1::ipam_server::IpamServer;
use nsm_identity::X509Source;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::service::Service;

pub use crate::error::Error;
pub use crate::settings::{IpFamily, Pool, Settings};

/// Subservice of the liveness probe.
const SELF_PROBE: &str = "IPAM";

/// Runs the component until `stop`.
///
/// # Errors
/// Bad settings, one line for each fault; a database that cannot be opened; a port that is in use.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    let service = load(&settings).await?;
    let health = Health::start("Meridio-ipam", &settings.health_socket, &stop)?;
    health.register(Probe::Startup, &[]);
    health.register(Probe::Readiness, &["Identity"]);
    health.waiting(
        "Identity",
        "an X.509 SVID",
        &format!("check the Workload API at {}", settings.spiffe_endpoint_socket),
    );
    let Some(source) = grpc::identity(&settings.spiffe_endpoint_socket, &stop).await else { return Ok(()) };
    health.serving("Identity");
    serve(service, settings, source, health, stop).await
}

/// As [`run`], with an identity and a health of the caller's.
///
/// # Errors
/// As [`run`].
pub async fn run_with(
    settings: Settings,
    source: X509Source,
    health: Health,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    serve(load(&settings).await?, settings, source, health, stop).await
}

async fn load(settings: &Settings) -> anyhow::Result<Service> {
    let faults = settings.validate();
    if !faults.is_empty() {
        anyhow::bail!(faults.join("\n"));
    }
    Ok(Service::load(&settings.datasource, &settings.trench_name, &settings.pools()).await?)
}

async fn serve(
    service: Service,
    settings: Settings,
    source: X509Source,
    health: Health,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let server = grpc::Server::bind(&format!(":{}", settings.port), &source).await?;
    let (conduits, addresses) = service.counts().await;
    tracing::info!(address = %server.address(), conduits, addresses, "serving");
    let mut tasks = JoinSet::new();
    let nsp = grpc::connect_with(&source, &settings.nsp_service, settings.grpc_keepalive_time.get())?;
    let (trench, address) = (settings.trench_name.clone(), settings.nsp_service.clone());
    tasks.spawn(conduits::follow(service.clone(), nsp, trench.clone(), address, health.clone(), stop.clone()));
    if settings.garbage_collection_enabled {
        let (interval, age) = (settings.garbage_collection_interval.get(), settings.garbage_collection_threshold.get());
        tasks.spawn(collect_garbage(service.clone(), interval, age, stop.clone()));
    }
    health.register(Probe::Liveness, &[SELF_PROBE]);
    let own = grpc::connect(&source, &format!("127.0.0.1:{}", settings.port))?;
    let routes = Routes::new(health.service()).add_service(IpamServer::new(api::Api::new(service, trench)));
    let (timeout, token) = (settings.grpc_probe_rpc_timeout.get(), stop.clone());
    tasks.spawn(async move { health.probe_endpoint(SELF_PROBE, own, timeout, token).await });
    let served = server.serve(routes, stop.clone()).await;
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    Ok(served?)
}

/// The first run is one interval after the start, so that everybody had time to ask again.
async fn collect_garbage(service: Service, interval: Duration, age: Duration, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(interval) => {}
        }
        match service.collect_garbage(age).await {
            Ok(0) => {}
            Ok(count) => tracing::info!(count, "entries removed that nobody asked for"),
            Err(error) => tracing::error!(%error, "garbage collection failed"),
        }
    }
}
