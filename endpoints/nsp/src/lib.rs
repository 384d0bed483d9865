//! Network service platform: configuration watches and target registry of a trench.
//!
//! Two gRPC services (`nsp.v1`) on one port. `ConfigurationManager` streams the contents of the trench's ConfigMap, read
//! from a watched file; a faulty file leaves the last good one in force, names that lead nowhere are left out. `TargetRegistry` keeps
//! the targets, in SQLite and in memory.
//! Everything is loaded before the port is opened, so a restart never shows anybody an empty list.

mod config;
mod error;
mod filter;
mod manager;
mod registry;
mod settings;
mod snapshot;
mod store;
mod targets;

use meridio_common::{Health, Probe, grpc};
use meridio_proto::nsp::v1::configuration_manager_server::ConfigurationManagerServer;
use meridio_proto::nsp::v1::target_registry_server::TargetRegistryServer;
use nsm_identity::X509Source;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use crate::config::ConfigFile;
use crate::manager::Manager;
use crate::registry::Registry;
use crate::targets::Targets;

pub use crate::error::Error;
pub use crate::settings::Settings;

/// Subservice of the liveness probe.
const SELF_PROBE: &str = "NSP";

/// Runs the component until `stop`.
///
/// # Errors
/// Bad settings or, with nothing stored, a bad configuration: one line for each fault. A database that cannot be opened, a port that
/// is in use.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    let state = load(&settings).await?;
    let health = Health::start("Meridio-nsp", &settings.health_socket, &stop)?;
    health.register(Probe::Startup, &[]);
    health.register(Probe::Readiness, &["Identity"]);
    health.waiting(
        "Identity",
        "an X.509 SVID",
        &format!("check the Workload API at {}", settings.spiffe_endpoint_socket),
    );
    let Some(source) = grpc::identity(&settings.spiffe_endpoint_socket, &stop).await else { return Ok(()) };
    health.serving("Identity");
    state.serve(&settings, source, health, stop).await
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
    load(&settings).await?.serve(&settings, source, health, stop).await
}

/// What has to be in memory before the first client is let in.
struct State {
    config: ConfigFile,
    registry: Registry,
}

async fn load(settings: &Settings) -> anyhow::Result<State> {
    let faults = settings.validate();
    if !faults.is_empty() {
        anyhow::bail!(faults.join("\n"));
    }
    let config = ConfigFile::load(&settings.config_file, &settings.datasource)?;
    let registry = Registry::load(&settings.datasource, settings.entry_timeout.get()).await?;
    Ok(State { config, registry })
}

impl State {
    async fn serve(
        self,
        settings: &Settings,
        source: X509Source,
        health: Health,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let Self { config, registry } = self;
        let address = format!(":{}", settings.port);
        let server = grpc::Server::bind(&address, &source).await?;
        tracing::info!(address = %server.address(), targets = registry.count(), "serving");
        let routes = Routes::new(health.service())
            .add_service(ConfigurationManagerServer::new(Manager::new(config.lists(), stop.clone())))
            .add_service(TargetRegistryServer::new(Targets::new(registry.clone(), stop.clone())));
        let mut tasks = JoinSet::new();
        tasks.spawn(config.follow(health.clone(), stop.clone()));
        tasks.spawn(registry.expire(health.clone(), stop.clone()));
        health.register(Probe::Liveness, &[SELF_PROBE]);
        let own = grpc::connect(&source, &format!("127.0.0.1:{}", settings.port))?;
        let (timeout, token) = (settings.grpc_probe_rpc_timeout.get(), stop.clone());
        tasks.spawn(async move { health.probe_endpoint(SELF_PROBE, own, timeout, token).await });
        let served = server.serve(routes, stop.clone()).await;
        stop.cancel();
        while tasks.join_next().await.is_some() {}
        Ok(served?)
    }
}
