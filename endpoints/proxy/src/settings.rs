//! Settings of the proxy (spec: environment prefix `NSM_`).

use meridio_common::GoDuration;

/// The smallest MTU that every IPv4 host has to accept (RFC 791), in bytes.
const LEAST_MTU_V4: u32 = 576;
/// The smallest MTU of an IPv6 link (RFC 8200), in bytes.
const LEAST_MTU_V6: u32 = 1280;

/// Settings of the proxy.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Name of this pod and of its NSM endpoint.
    #[arg(long, env = "NSM_NAME", default_value = "proxy")]
    pub name: String,
    /// NSM network service that is offered to targets.
    #[arg(long, env = "NSM_SERVICE_NAME", default_value = "proxy")]
    pub service_name: String,
    /// NSM manager of this node.
    #[arg(long, env = "NSM_CONNECT_TO", default_value = "unix:///var/lib/networkservicemesh/nsm.io.sock")]
    pub connect_to: String,
    /// Time to connect to the manager.
    #[arg(long, env = "NSM_DIAL_TIMEOUT", default_value = "5s")]
    pub dial_timeout: GoDuration,
    /// Time for one NSM request.
    #[arg(long, env = "NSM_REQUEST_TIMEOUT", default_value = "15s")]
    pub request_timeout: GoDuration,
    /// Longest life of a path token.
    #[arg(long, env = "NSM_MAX_TOKEN_LIFETIME", default_value = "24h")]
    pub max_token_lifetime: GoDuration,
    /// Address of the IPAM.
    #[arg(long, env = "NSM_IPAM_SERVICE", default_value = "ipam-service:7777")]
    pub ipam_service: String,
    /// Name of this node; targets of the same node are served.
    #[arg(long, env = "NSM_HOST", default_value = "")]
    pub host: String,
    /// NSM network service of the load balancers.
    #[arg(long, env = "NSM_NETWORK_SERVICE_NAME", default_value = "load-balancer")]
    pub network_service_name: String,
    /// Namespace of the trench.
    #[arg(long, env = "NSM_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// Trench.
    #[arg(long, env = "NSM_TRENCH", default_value = "default")]
    pub trench: String,
    /// Conduit.
    #[arg(long, env = "NSM_CONDUIT", default_value = "load-balancer")]
    pub conduit: String,
    /// First part of the NSP's name; `-<trench>.<namespace>` is added.
    #[arg(long, env = "NSM_NSP_SERVICE_NAME", default_value = "nsp-service")]
    pub nsp_service_name: String,
    /// Port of the NSP.
    #[arg(long, env = "NSM_NSP_SERVICE_PORT", default_value_t = 7778)]
    pub nsp_service_port: u16,
    /// Address families: ipv4, ipv6 or dualstack.
    #[arg(long, env = "NSM_IP_FAMILY", default_value = "dualstack")]
    pub ip_family: String,
    /// MTU of every interface of the conduit, in bytes.
    #[arg(long, env = "NSM_MTU", default_value_t = 1500)]
    pub mtu: u32,
    /// How long addresses of a closed connection stay reserved.
    #[arg(long, env = "NSM_IP_RELEASE_DELAY", default_value = "20s")]
    pub ip_release_delay: GoDuration,
    /// How often the lease of the bridge's addresses is renewed.
    #[arg(long, env = "NSM_BRIDGE_IP_RENEW_INTERVAL", default_value = "5m")]
    pub bridge_ip_renew_interval: GoDuration,
    /// How often each load balancer is probed.
    #[arg(long, env = "NSM_PROBE_INTERVAL", default_value = "100ms")]
    pub probe_interval: GoDuration,
    /// Probes in a row without an answer after which a load balancer is no next hop.
    #[arg(long, env = "NSM_PROBE_MISSES", default_value_t = 3)]
    pub probe_misses: u32,
    /// Directory where connections to load balancers are noted, for a restart of proxy and NSM at once; empty: nowhere.
    #[arg(long, env = "NSM_STATE_DIR", default_value = "/run/meridio")]
    pub state_dir: String,
    /// Keep-alive interval towards NSP and IPAM.
    #[arg(long, env = "NSM_GRPC_KEEPALIVE_TIME", default_value = "30s")]
    pub grpc_keepalive_time: GoDuration,
    /// Log level.
    #[arg(long, env = "NSM_LOG_LEVEL", default_value = "DEBUG")]
    pub log_level: String,
    /// Socket of the gRPC health service.
    #[arg(long, env = "HEALTH_SOCKET", default_value = "unix:///tmp/health.sock")]
    pub health_socket: String,
    /// SPIFFE Workload API.
    #[arg(long, env = "SPIFFE_ENDPOINT_SOCKET", default_value = nsm_identity::DEFAULT_ENDPOINT_SOCKET)]
    pub spiffe_endpoint_socket: String,
}

/// Address families of a trench.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Families {
    pub(crate) v4: bool,
    pub(crate) v6: bool,
}

impl Families {
    /// The families by IP version: `false` for IPv4, `true` for IPv6.
    pub(crate) fn each(self) -> impl Iterator<Item = bool> {
        [(self.v4, false), (self.v6, true)].into_iter().filter_map(|(has, v6)| has.then_some(v6))
    }
}

impl Settings {
    /// Every fault of the settings, one line each; empty if there is none.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        for (name, value) in [
            ("NSM_NAME", &self.name),
            ("NSM_SERVICE_NAME", &self.service_name),
            ("NSM_NETWORK_SERVICE_NAME", &self.network_service_name),
            ("NSM_TRENCH", &self.trench),
            ("NSM_CONDUIT", &self.conduit),
            ("NSM_HOST", &self.host),
        ] {
            if value.is_empty() {
                faults.push(format!("{name} is empty"));
            }
        }
        match self.families() {
            None => faults.push(format!("NSM_IP_FAMILY {:?} is none of ipv4, ipv6, dualstack", self.ip_family)),
            Some(families) => {
                let least = if families.v6 { LEAST_MTU_V6 } else { LEAST_MTU_V4 };
                if self.mtu < least {
                    faults.push(format!("NSM_MTU {} is below {least}, the least for {}", self.mtu, self.ip_family));
                }
            }
        }
        for (name, url) in [
            ("NSM_CONNECT_TO", &self.connect_to),
            ("NSM_IPAM_SERVICE", &self.ipam_service),
            ("NSM_NSP_SERVICE_NAME", &self.nsp_address()),
        ] {
            if let Err(error) = nsm_transport::Address::parse(url) {
                faults.push(format!("{name} {url:?}: {error}"));
            }
        }
        for (name, zero) in [
            ("NSM_PROBE_MISSES", self.probe_misses == 0),
            ("NSM_PROBE_INTERVAL", self.probe_interval.get().is_zero()),
            ("NSM_BRIDGE_IP_RENEW_INTERVAL", self.bridge_ip_renew_interval.get().is_zero()),
        ] {
            if zero {
                faults.push(format!("{name} is 0"));
            }
        }
        faults
    }

    pub(crate) fn families(&self) -> Option<Families> {
        match self.ip_family.as_str() {
            "ipv4" => Some(Families { v4: true, v6: false }),
            "ipv6" => Some(Families { v4: false, v6: true }),
            "dualstack" => Some(Families { v4: true, v6: true }),
            _ => None,
        }
    }

    pub(crate) fn nsp_address(&self) -> String {
        format!("{}-{}.{}:{}", self.nsp_service_name, self.trench, self.namespace, self.nsp_service_port)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        settings: Settings,
    }

    /// Settings as they are when nothing but the node is said.
    pub(crate) fn defaults() -> Settings {
        Settings { host: "node".into(), ..Cli::parse_from(["proxy"]).settings }
    }

    #[test]
    fn a_loop_without_a_pause_is_refused_by_name() {
        assert_eq!(defaults().validate(), [""; 0]);
        let zero: GoDuration = "0s".parse().unwrap();
        let faulty = Settings { bridge_ip_renew_interval: zero, probe_interval: zero, probe_misses: 0, ..defaults() };
        let faults = ["NSM_PROBE_MISSES is 0", "NSM_PROBE_INTERVAL is 0", "NSM_BRIDGE_IP_RENEW_INTERVAL is 0"];
        assert_eq!(faulty.validate(), faults);
    }
}
