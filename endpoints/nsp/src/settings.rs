//! Settings.

use std::path::PathBuf;

use meridio_common::{GoDuration, health};

/// Settings of the NSP.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Namespace of the configuration
    #[arg(long, env = "NSP_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// Port to listen on, all addresses
    #[arg(long, env = "NSP_PORT", default_value_t = 7778)]
    pub port: u16,
    /// Name of the ConfigMap, for logs: its contents come from the configuration file
    #[arg(long, env = "NSP_CONFIG_MAP_NAME", default_value = "meridio-configuration")]
    pub config_map_name: String,
    /// File with the ConfigMap (a YAML document with `data:`, or its seven keys), or the directory that a ConfigMap is mounted at, with a
    /// file for each key; changes are noticed within 200 ms
    #[arg(long, env = "NSP_CONFIG_FILE", default_value = "/run/nsp/config/configuration.yaml")]
    pub config_file: PathBuf,
    /// SQLite file of the targets; the last good configuration lies beside it
    #[arg(long, env = "NSP_DATASOURCE", default_value = "/run/nsp/data/registry.db")]
    pub datasource: PathBuf,
    /// Log level: INFO, DEBUG or TRACE
    #[arg(long, env = "NSP_LOG_LEVEL", default_value = "DEBUG")]
    pub log_level: String,
    /// A target that is not registered again for this long is removed
    #[arg(long, env = "NSP_ENTRY_TIMEOUT", default_value = "60s")]
    pub entry_timeout: GoDuration,
    /// Limit of one self probe
    #[arg(long, env = "NSP_GRPC_PROBE_RPC_TIMEOUT", default_value = "1s")]
    pub grpc_probe_rpc_timeout: GoDuration,
    /// Socket of the health service
    #[arg(long, env = "HEALTH_SOCKET", default_value = health::DEFAULT_SOCKET)]
    pub health_socket: String,
    /// Socket of the SPIFFE Workload API
    #[arg(long, env = "SPIFFE_ENDPOINT_SOCKET", default_value = nsm_identity::DEFAULT_ENDPOINT_SOCKET)]
    pub spiffe_endpoint_socket: String,
}

impl Settings {
    /// Every fault, one line each; empty means fine.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.port == 0 {
            faults.push("NSP_PORT: 0 is not a port that clients could know".to_owned());
        }
        if self.config_file.as_os_str().is_empty() {
            faults.push("NSP_CONFIG_FILE: is empty".to_owned());
        }
        if self.datasource.file_name().is_none() {
            faults.push(format!("NSP_DATASOURCE: {:?} names no file", self.datasource));
        }
        if self.entry_timeout.is_zero() {
            faults.push("NSP_ENTRY_TIMEOUT: has to be longer than 0".to_owned());
        }
        if self.grpc_probe_rpc_timeout.is_zero() {
            faults.push("NSP_GRPC_PROBE_RPC_TIMEOUT: has to be longer than 0".to_owned());
        }
        faults
    }
}
