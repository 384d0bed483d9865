//! Settings of the TAPA (environment prefix `MERIDIO_`).

use meridio_common::GoDuration;
use nsm_transport::Address;
use std::path::PathBuf;

/// Settings of the target access point ambassador.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Name of this target; unique among the targets, and the same after a restart.
    #[arg(long, env = "MERIDIO_NAME", default_value = "nsc")]
    pub name: String,
    /// Name of this node: the proxy of the same node is used.
    #[arg(long, env = "MERIDIO_NODE", default_value = "")]
    pub node: String,
    /// Namespace of the trench.
    #[arg(long, env = "MERIDIO_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// Socket that applications use.
    #[arg(long, env = "MERIDIO_SOCKET", default_value = "/ambassador.sock")]
    pub socket: String,
    /// NSM manager of this node.
    #[arg(long, env = "MERIDIO_NSM_SOCKET", default_value = "unix:///var/lib/networkservicemesh/nsm.io.sock")]
    pub nsm_socket: String,
    /// First part of the NSP's name; `-<trench>.<namespace>` is added.
    #[arg(long, env = "MERIDIO_NSP_SERVICE_NAME", default_value = "nsp-service")]
    pub nsp_service_name: String,
    /// Port of the NSP.
    #[arg(long, env = "MERIDIO_NSP_SERVICE_PORT", default_value_t = 7778)]
    pub nsp_service_port: u16,
    /// Time for one NSM request, for one call of the NSP, and for each part of an orderly end.
    #[arg(long, env = "MERIDIO_TIMEOUT", default_value = "15s")]
    pub timeout: GoDuration,
    /// Time to connect to the NSM manager.
    #[arg(long, env = "MERIDIO_DIAL_TIMEOUT", default_value = "5s")]
    pub dial_timeout: GoDuration,
    /// Longest life of a path token.
    #[arg(long, env = "MERIDIO_MAX_TOKEN_LIFETIME", default_value = "24h")]
    pub max_token_lifetime: GoDuration,
    /// Log level.
    #[arg(long, env = "MERIDIO_LOG_LEVEL", default_value = "DEBUG")]
    pub log_level: String,
    /// How often a registration is renewed; shorter than the NSP's own time-out.
    #[arg(long, env = "MERIDIO_NSP_ENTRY_TIMEOUT", default_value = "30s")]
    pub nsp_entry_timeout: GoDuration,
    /// Longest pause between attempts.
    #[arg(long, env = "MERIDIO_GRPC_MAX_BACKOFF", default_value = "5s")]
    pub grpc_max_backoff: GoDuration,
    /// Time for one call of the self probe.
    #[arg(long, env = "MERIDIO_GRPC_PROBE_RPC_TIMEOUT", default_value = "1s")]
    pub grpc_probe_rpc_timeout: GoDuration,
    /// Directory of what outlives the process: open streams and their connections.
    #[arg(long, env = "MERIDIO_STATE_DIR", default_value = "/run/meridio")]
    pub state_dir: PathBuf,
    /// Socket of the gRPC health service.
    #[arg(long, env = "HEALTH_SOCKET", default_value = "unix:///tmp/health.sock")]
    pub health_socket: String,
    /// SPIFFE Workload API.
    #[arg(long, env = "SPIFFE_ENDPOINT_SOCKET", default_value = nsm_identity::DEFAULT_ENDPOINT_SOCKET)]
    pub spiffe_endpoint_socket: String,
}

impl Settings {
    /// Every fault of the settings, one line each; empty if there is none.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for (name, value) in [
            ("MERIDIO_NAME", &self.name),
            ("MERIDIO_NAMESPACE", &self.namespace),
            ("MERIDIO_NSP_SERVICE_NAME", &self.nsp_service_name),
        ] {
            if value.is_empty() {
                faults.push(format!("{name}: empty"));
            }
        }
        for (name, address) in [
            ("MERIDIO_SOCKET", self.socket()),
            ("MERIDIO_NSM_SOCKET", Address::parse(&self.nsm_socket)),
            ("MERIDIO_NSP_SERVICE_NAME", Address::parse(&self.nsp("trench"))),
        ] {
            if let Err(cause) = address {
                faults.push(format!("{name}: {cause}"));
            }
        }
        for (name, duration) in [
            ("MERIDIO_TIMEOUT", self.timeout),
            ("MERIDIO_DIAL_TIMEOUT", self.dial_timeout),
            ("MERIDIO_MAX_TOKEN_LIFETIME", self.max_token_lifetime),
            ("MERIDIO_NSP_ENTRY_TIMEOUT", self.nsp_entry_timeout),
            ("MERIDIO_GRPC_MAX_BACKOFF", self.grpc_max_backoff),
            ("MERIDIO_GRPC_PROBE_RPC_TIMEOUT", self.grpc_probe_rpc_timeout),
        ] {
            if duration.get().is_zero() {
                faults.push(format!("{name}: must be longer than 0"));
            }
        }
        faults
    }

    /// Where applications connect to; a bare path is as good as a URL.
    pub(crate) fn socket(&self) -> Result<Address, nsm_transport::Error> {
        match self.socket.starts_with('/') {
            true => Ok(Address::Unix(PathBuf::from(&self.socket))),
            false => Address::parse(&self.socket),
        }
    }

    /// Address of a trench's NSP.
    pub(crate) fn nsp(&self, trench: &str) -> String {
        format!("{}-{trench}.{}:{}", self.nsp_service_name, self.namespace, self.nsp_service_port)
    }

    /// NSM network service of a conduit's proxies.
    pub(crate) fn service(&self, conduit: &crate::names::ConduitKey) -> String {
        format!("proxy.{}.{}.{}", conduit.conduit, conduit.trench, self.namespace)
    }

    /// Connection id of a conduit: stable, so that addresses and interface are found again.
    pub(crate) fn connection_id(&self, conduit: &crate::names::ConduitKey) -> String {
        format!("{}-{}-0", self.name, self.service(conduit))
    }
}
