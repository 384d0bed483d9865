//! Settings.

use std::path::PathBuf;

use ipnet::IpNet;
use meridio_common::names::host_port;
use meridio_common::{GoDuration, health};

/// Which addresses a trench has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum IpFamily {
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
    /// Both.
    Dualstack,
}

/// Settings of the IPAM.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Port to listen on, all addresses
    #[arg(long, env = "IPAM_PORT", default_value_t = 7777)]
    pub port: u16,
    /// SQLite file
    #[arg(long, env = "IPAM_DATASOURCE", default_value = "/run/ipam/data/registry.db")]
    pub datasource: PathBuf,
    /// Trench
    #[arg(long, env = "IPAM_TRENCH_NAME", default_value = "default")]
    pub trench_name: String,
    /// Address of the NSP
    #[arg(long, env = "IPAM_NSP_SERVICE", default_value = "nsp-service:7778")]
    pub nsp_service: String,
    /// IPv4 pool; one that is already stored wins
    #[arg(long, env = "IPAM_PREFIX_IPV4", default_value = "169.255.0.0/16")]
    pub prefix_ipv4: String,
    /// IPv6 pool; one that is already stored wins
    #[arg(long, env = "IPAM_PREFIX_IPV6", default_value = "fd00::/48")]
    pub prefix_ipv6: String,
    /// Bits of a conduit's IPv4 prefix
    #[arg(long, env = "IPAM_CONDUIT_PREFIX_LENGTH_IPV4", default_value_t = 20)]
    pub conduit_prefix_length_ipv4: u8,
    /// Bits of a conduit's IPv6 prefix
    #[arg(long, env = "IPAM_CONDUIT_PREFIX_LENGTH_IPV6", default_value_t = 56)]
    pub conduit_prefix_length_ipv6: u8,
    /// Bits of a node's IPv4 prefix
    #[arg(long, env = "IPAM_NODE_PREFIX_LENGTH_IPV4", default_value_t = 24)]
    pub node_prefix_length_ipv4: u8,
    /// Bits of a node's IPv6 prefix
    #[arg(long, env = "IPAM_NODE_PREFIX_LENGTH_IPV6", default_value_t = 64)]
    pub node_prefix_length_ipv6: u8,
    /// Address families of the trench
    #[arg(long, env = "IPAM_IP_FAMILY", value_enum, ignore_case = true, default_value = "dualstack")]
    pub ip_family: IpFamily,
    /// Log level: INFO, DEBUG or TRACE
    #[arg(long, env = "IPAM_LOG_LEVEL", default_value = "DEBUG")]
    pub log_level: String,
    /// Time between pings to the NSP
    #[arg(long, env = "IPAM_GRPC_KEEPALIVE_TIME", default_value = "30s")]
    pub grpc_keepalive_time: GoDuration,
    /// Longest time between connection attempts; kept for compatibility, attempts are 500 ms apart
    #[arg(long, env = "IPAM_GRPC_MAX_BACKOFF", default_value = "5s")]
    pub grpc_max_backoff: GoDuration,
    /// Limit of one self probe
    #[arg(long, env = "IPAM_GRPC_PROBE_RPC_TIMEOUT", default_value = "1s")]
    pub grpc_probe_rpc_timeout: GoDuration,
    /// Remove addresses that are not asked for any more
    #[arg(long, env = "IPAM_GARBAGE_COLLECTION_ENABLED", default_value_t = true, action = clap::ArgAction::Set)]
    pub garbage_collection_enabled: bool,
    /// Time between removals
    #[arg(long, env = "IPAM_GARBAGE_COLLECTION_INTERVAL", default_value = "2h")]
    pub garbage_collection_interval: GoDuration,
    /// Age at which an address is removed
    #[arg(long, env = "IPAM_GARBAGE_COLLECTION_THRESHOLD", default_value = "40m")]
    pub garbage_collection_threshold: GoDuration,
    /// Socket of the health service
    #[arg(long, env = "HEALTH_SOCKET", default_value = health::DEFAULT_SOCKET)]
    pub health_socket: String,
    /// Socket of the SPIFFE Workload API
    #[arg(long, env = "SPIFFE_ENDPOINT_SOCKET", default_value = nsm_identity::DEFAULT_ENDPOINT_SOCKET)]
    pub spiffe_endpoint_socket: String,
}

/// The pool of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Addresses of the trench.
    pub prefix: IpNet,
    /// Bits of a conduit's prefix.
    pub conduit_length: u8,
    /// Bits of a node's prefix.
    pub node_length: u8,
}

impl Settings {
    /// Every fault, one line each; empty means fine.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.port == 0 {
            faults.push("IPAM_PORT: 0 is not a port that clients could know".to_owned());
        }
        if self.datasource.file_name().is_none() {
            faults.push(format!("IPAM_DATASOURCE: {:?} names no file", self.datasource));
        }
        if self.trench_name.is_empty() {
            faults.push("IPAM_TRENCH_NAME: is empty".to_owned());
        }
        faults.extend(host_port("IPAM_NSP_SERVICE", &self.nsp_service).err());
        for (family, pool) in self.checked_pools() {
            faults.extend(pool.err().into_iter().flatten().map(|reason| format!("{reason} ({family})")));
        }
        for (name, value) in [
            ("GRPC_KEEPALIVE_TIME", self.grpc_keepalive_time),
            ("GRPC_PROBE_RPC_TIMEOUT", self.grpc_probe_rpc_timeout),
            ("GARBAGE_COLLECTION_INTERVAL", self.garbage_collection_interval),
            ("GARBAGE_COLLECTION_THRESHOLD", self.garbage_collection_threshold),
        ] {
            if value.is_zero() {
                faults.push(format!("IPAM_{name}: has to be longer than 0"));
            }
        }
        faults
    }

    /// The pools of the configured families. Empty where [`Settings::validate`] finds faults.
    pub fn pools(&self) -> Vec<Pool> {
        self.checked_pools().into_iter().filter_map(|(_, pool)| pool.ok()).collect()
    }

    fn checked_pools(&self) -> Vec<(&'static str, Result<Pool, Vec<String>>)> {
        let mut pools = Vec::new();
        if self.ip_family != IpFamily::Ipv6 {
            let lengths = (self.conduit_prefix_length_ipv4, self.node_prefix_length_ipv4);
            pools.push(("IPv4", pool("IPAM_PREFIX_IPV4", &self.prefix_ipv4, lengths, 32)));
        }
        if self.ip_family != IpFamily::Ipv4 {
            let lengths = (self.conduit_prefix_length_ipv6, self.node_prefix_length_ipv6);
            pools.push(("IPv6", pool("IPAM_PREFIX_IPV6", &self.prefix_ipv6, lengths, 128)));
        }
        pools
    }
}

fn pool(setting: &str, text: &str, (conduit_length, node_length): (u8, u8), bits: u8) -> Result<Pool, Vec<String>> {
    let mut faults = Vec::new();
    let prefix: Option<IpNet> = text.parse().ok().filter(|net: &IpNet| net.max_prefix_len() == bits);
    match prefix {
        None => faults.push(format!("{setting}: {text:?} is not a prefix of this family")),
        Some(net) if net.addr() != net.network() => {
            faults.push(format!("{setting}: {text:?} has host bits set, did you mean {}?", net.trunc()))
        }
        Some(net) if conduit_length <= net.prefix_len() => {
            faults.push(format!(
                "conduit prefix length {conduit_length}: has to be longer than the pool's, {}",
                net.prefix_len()
            ));
        }
        Some(_) => {}
    }
    if node_length <= conduit_length {
        faults.push(format!("node prefix length {node_length}: has to be longer than the conduit's, {conduit_length}"));
    }
    // First and last address are not given out.
    if node_length > bits - 2 {
        faults.push(format!("node prefix length {node_length}: leaves no address (at most {})", bits - 2));
    }
    match prefix {
        Some(prefix) if faults.is_empty() => Ok(Pool { prefix, conduit_length, node_length }),
        _ => Err(faults),
    }
}
