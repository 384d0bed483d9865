//! Development issuer of SPIFFE identities: the Workload API without SPIRE.
//!
//! A workload is known by the socket it uses: each sub-directory `<name>` of the workloads directory gets a socket `agent.sock` that
//! serves `spiffe://<trust domain>/<name>`. Who can reach the directory gets the identity, so the directories are given to containers
//! one by one. There is no attestation: this is for one machine, for tests and demonstrations.

mod ca;
mod service;
mod workloads;

use meridio_common::{GoDuration, Health, Probe};
use nsm_identity::SpiffeId;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio_util::sync::CancellationToken;

/// Settings of the issuer.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Directory of the CA key; issuers that share it share the CA.
    #[arg(long, env = "IDENTITY_STATE_DIR", default_value = "/var/lib/meridio/identity")]
    pub state_dir: PathBuf,
    /// Trust domain of all identities.
    #[arg(long, env = "IDENTITY_TRUST_DOMAIN", default_value = "example.org")]
    pub trust_domain: String,
    /// Directory with one sub-directory for each workload.
    #[arg(long, env = "IDENTITY_WORKLOADS", default_value = "/run/spire/workloads")]
    pub workloads: PathBuf,
    /// Life of an X.509-SVID; it is replaced at half of it.
    #[arg(long, env = "IDENTITY_SVID_TTL", default_value = "1h")]
    pub svid_ttl: GoDuration,
    /// Socket of the health service; empty for none.
    #[arg(long, env = "HEALTH_SOCKET", default_value = "unix:///tmp/health.sock")]
    pub health_socket: String,
}

/// Shorter lives leave no time to notice a rotation.
const MIN_TTL: Duration = Duration::from_secs(2);

impl Settings {
    /// Every fault of the settings, one line each; empty if there is none.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if let Err(cause) = SpiffeId::new(&self.trust_domain, "workload") {
            faults.push(format!("IDENTITY_TRUST_DOMAIN: {cause}"));
        }
        if self.svid_ttl.get() < MIN_TTL {
            faults.push(format!("IDENTITY_SVID_TTL: shorter than {MIN_TTL:?}"));
        }
        for (name, path) in [("IDENTITY_STATE_DIR", &self.state_dir), ("IDENTITY_WORKLOADS", &self.workloads)] {
            if path.as_os_str().is_empty() {
                faults.push(format!("{name}: empty"));
            }
        }
        faults
    }
}

/// Serves every workload directory until `stop`.
///
/// # Errors
/// The CA cannot be loaded or created.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    let authority = Arc::new(ca::load_or_create(&settings.state_dir, &settings.trust_domain)?);
    let health = Health::start("Meridio-identity", &settings.health_socket, &stop)?;
    for probe in [Probe::Startup, Probe::Readiness, Probe::Liveness] {
        health.register(probe, &[]);
    }
    tracing::info!(trust_domain = %settings.trust_domain, workloads = %settings.workloads.display(), "issuer started");
    let issuer = service::Issuer::new(authority, settings.svid_ttl.get());
    workloads::serve(issuer, settings.workloads, health, stop).await;
    Ok(())
}

#[cfg(test)]
mod tests;
