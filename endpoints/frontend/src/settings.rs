//! Settings of the frontend.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use clap::ArgAction;
use meridio_common::{GoDuration, names};

use crate::agent::Options;
use crate::bird::process::Paths;
use crate::bird::render::Base;

/// Settings of `meridio frontend`; names and defaults of the original.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Next hops of static default routes that replace what gateways tell, separated by commas
    #[arg(long, env = "NFE_VRRPS", default_value = "")]
    pub vrrps: String,
    /// Interface on the external network
    #[arg(long, env = "NFE_EXTERNAL_INTERFACE", default_value = "ext-vlan")]
    pub external_interface: String,
    /// Directory of BIRD's configuration
    #[arg(long, env = "NFE_BIRD_CONFIG_PATH", default_value = "/etc/bird")]
    pub bird_config_path: PathBuf,
    /// BIRD's control socket
    #[arg(long, env = "NFE_BIRD_COMMUNICATION_SOCK", default_value = "/var/run/bird/bird.ctl")]
    pub bird_communication_sock: PathBuf,
    /// The BIRD 2 program; without a slash it is looked for in PATH
    #[arg(long, env = "NFE_BIRD_BINARY", default_value = "bird")]
    pub bird_binary: PathBuf,
    /// BIRD's log file
    #[arg(long, env = "NFE_BIRD_LOG_FILE", default_value = "/var/log/bird.log")]
    pub bird_log_file: PathBuf,
    /// Bytes of BIRD's log file, which is rotated once; 0 means none
    #[arg(long, env = "NFE_BIRD_LOG_FILE_SIZE", default_value_t = 20_000)]
    pub bird_log_file_size: u64,
    /// Seconds between BIRD's scans of the kernel's routes
    #[arg(long, env = "NFE_BIRD_KERNEL_SCAN_TIME", default_value_t = 10)]
    pub bird_kernel_scan_time: u32,
    /// BIRD's router id; by default the first IPv4 address of the external interface, or a number made of the host name
    #[arg(long, env = "NFE_ROUTER_ID", default_value = "")]
    pub router_id: String,
    /// Own autonomous system of gateways that name none
    #[arg(long, env = "NFE_LOCAL_AS", default_value_t = 8103)]
    pub local_as: u32,
    /// Autonomous system of gateways that name none
    #[arg(long, env = "NFE_REMOTE_AS", default_value_t = 4_248_829_953)]
    pub remote_as: u32,
    /// Own BGP port of gateways that name none
    #[arg(long, env = "NFE_BGP_LOCAL_PORT", default_value_t = 10_179)]
    pub bgp_local_port: u16,
    /// BGP port of gateways that name none
    #[arg(long, env = "NFE_BGP_REMOTE_PORT", default_value_t = 10_179)]
    pub bgp_remote_port: u16,
    /// BGP hold time in seconds of gateways that name none
    #[arg(long, env = "NFE_BGP_HOLD_TIME", default_value_t = 3)]
    pub bgp_hold_time: u32,
    /// Kernel table of learnt routes; the next number is the drop table
    #[arg(long, env = "NFE_TABLE_ID", default_value_t = 4096)]
    pub table_id: u32,
    /// Several gateways become one multipath route
    #[arg(long, env = "NFE_ECMP", action = ArgAction::Set, num_args = 0..=1, default_value_t = false, default_missing_value = "true")]
    pub ecmp: bool,
    /// Drop VIP traffic while no gateway gives a route, instead of sending it to the primary network
    #[arg(long, env = "NFE_DROP_IF_NO_PEER", action = ArgAction::Set, num_args = 0..=1, default_value_t = true, default_missing_value = "true")]
    pub drop_if_no_peer: bool,
    /// BIRD's messages go to this process's stderr too
    #[arg(long, env = "NFE_LOG_BIRD", action = ArgAction::Set, num_args = 0..=1, default_value_t = false, default_missing_value = "true")]
    pub log_bird: bool,
    /// Kubernetes namespace
    #[arg(long, env = "NFE_NAMESPACE", default_value = "default")]
    pub namespace: String,
    /// Address of the NSP
    #[arg(long, env = "NFE_NSP_SERVICE", default_value = "nsp-service-trench-a:7778")]
    pub nsp_service: String,
    /// Trench
    #[arg(long, env = "NFE_TRENCH_NAME", default_value = "default")]
    pub trench_name: String,
    /// Attractor this frontend works for
    #[arg(long, env = "NFE_ATTRACTOR_NAME", default_value = "default")]
    pub attractor_name: String,
    /// Log level: INFO, DEBUG or TRACE
    #[arg(long, env = "NFE_LOG_LEVEL", default_value = "DEBUG")]
    pub log_level: String,
    /// Time between refreshes of this frontend's entry in the NSP
    #[arg(long, env = "NFE_NSP_ENTRY_TIMEOUT", default_value = "30s")]
    pub nsp_entry_timeout: GoDuration,
    /// Time between keep-alives of gRPC connections
    #[arg(long, env = "NFE_GRPC_KEEPALIVE_TIME", default_value = "30s")]
    pub grpc_keepalive_time: GoDuration,
    /// Longest time between attempts to connect
    #[arg(long, env = "NFE_GRPC_MAX_BACKOFF", default_value = "5s")]
    pub grpc_max_backoff: GoDuration,
    /// Time between looks at BIRD with connectivity, beside those that events cause
    #[arg(long, env = "NFE_DELAYCONNECTIVITY", default_value = "1s")]
    pub delay_connectivity: GoDuration,
    /// Time between looks at BIRD without connectivity, beside those that events cause
    #[arg(long, env = "NFE_DELAYNOCONNECTIVITY", default_value = "3s")]
    pub delay_no_connectivity: GoDuration,
    /// Availability service of the load balancer in this pod
    #[arg(long, env = "NFE_LB_SOCKET", default_value = "unix:///var/lib/meridio/lb.sock")]
    pub lb_socket: String,
    /// Directory of BGP passwords: one sub-directory for each secret, one file for each key
    #[arg(long, env = "NFE_SECRETS_DIR", default_value = "")]
    pub secrets_dir: String,
    /// Name under which the load balancer of this pod is known; by default the host name
    #[arg(long, env = "NFE_HOSTNAME", default_value = "")]
    pub hostname: String,
    /// Socket of the health service
    #[arg(long, env = "HEALTH_SOCKET", default_value = "unix:///tmp/health.sock")]
    pub health_socket: String,
    /// Socket of the SPIFFE Workload API
    #[arg(long, env = "SPIFFE_ENDPOINT_SOCKET", default_value = "unix:///run/spire/sockets/agent.sock")]
    pub spiffe_endpoint_socket: String,
}

impl Settings {
    /// Every fault of the settings, one line each.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if let Err(fault) = names::interface_name(&self.external_interface) {
            faults.push(format!("NFE_EXTERNAL_INTERFACE: {fault}"));
        } else if self.external_interface.contains(['"', '\'']) {
            faults.push(format!(
                "NFE_EXTERNAL_INTERFACE: {:?} has quotes, BIRD's configuration cannot",
                self.external_interface
            ));
        }
        for (name, path) in [
            ("NFE_BIRD_CONFIG_PATH", &self.bird_config_path),
            ("NFE_BIRD_COMMUNICATION_SOCK", &self.bird_communication_sock),
            ("NFE_BIRD_LOG_FILE", &self.bird_log_file),
        ] {
            if !path.is_absolute() || path.to_string_lossy().contains(['"', '\n']) {
                faults.push(format!("{name}: {path:?} is no absolute path without quotes"));
            }
        }
        for text in self.vrrps.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            if text.parse::<IpAddr>().is_err() {
                faults.push(format!("NFE_VRRPS: {text:?} is no IP address"));
            }
        }
        if !self.router_id.is_empty() && !self.router_id.parse::<Ipv4Addr>().is_ok_and(|id| !id.is_unspecified()) {
            faults.push(format!("NFE_ROUTER_ID: {:?} is no IPv4 address", self.router_id));
        }
        if self.bgp_hold_time < 3 || self.bgp_hold_time > 65_535 {
            faults.push(format!("NFE_BGP_HOLD_TIME: {} is not within 3..65535", self.bgp_hold_time));
        }
        // 253 to 255 are default, main and local; both tables have to be free.
        if self.table_id == 0 || (252..=255).contains(&self.table_id) || self.table_id == u32::MAX {
            faults.push(format!("NFE_TABLE_ID: tables {0} and {0}+1 cannot both be used", self.table_id));
        }
        for (name, value) in [("NFE_LOCAL_AS", self.local_as), ("NFE_REMOTE_AS", self.remote_as)] {
            if value == 0 {
                faults.push(format!("{name}: 0 is no autonomous system"));
            }
        }
        for (name, port) in [("NFE_BGP_LOCAL_PORT", self.bgp_local_port), ("NFE_BGP_REMOTE_PORT", self.bgp_remote_port)]
        {
            if port == 0 {
                faults.push(format!("{name}: 0 is no TCP port"));
            }
        }
        if self.bird_kernel_scan_time == 0 {
            faults.push("NFE_BIRD_KERNEL_SCAN_TIME: has to be at least 1".to_owned());
        }
        for (name, value) in [
            ("NFE_DELAYCONNECTIVITY", self.delay_connectivity),
            ("NFE_DELAYNOCONNECTIVITY", self.delay_no_connectivity),
            ("NFE_NSP_ENTRY_TIMEOUT", self.nsp_entry_timeout),
        ] {
            if value.get() < Duration::from_millis(10) {
                faults.push(format!("{name}: {value} is shorter than 10ms"));
            }
        }
        faults.extend(names::host_port("NFE_NSP_SERVICE", &self.nsp_service).err());
        faults
    }

    /// Where BIRD and its files are.
    pub fn paths(&self) -> Paths {
        Paths {
            binary: self.bird_binary.clone(),
            config_dir: self.bird_config_path.clone(),
            socket: self.bird_communication_sock.clone(),
            log_bird: self.log_bird,
        }
    }

    /// Name of this pod towards NSP and load balancer.
    pub fn hostname(&self) -> String {
        if self.hostname.is_empty() {
            rustix::system::uname().nodename().to_string_lossy().into_owned()
        } else {
            self.hostname.clone()
        }
    }

    /// Router id that the settings name, if any.
    pub fn named_router_id(&self) -> Option<Ipv4Addr> {
        self.router_id.parse().ok()
    }

    /// Fixed settings of the loop.
    pub fn options(&self, router_id: Ipv4Addr) -> Options {
        let vrrps: Vec<IpAddr> = self.vrrps.split(',').filter_map(|text| text.trim().parse().ok()).collect();
        let drop = self.drop_if_no_peer && vrrps.is_empty();
        let base = Base {
            interface: self.external_interface.clone(),
            router_id,
            table: self.table_id,
            kernel_scan: self.bird_kernel_scan_time,
            ecmp: self.ecmp,
            log_file: (self.bird_log_file_size > 0).then(|| (self.bird_log_file.clone(), self.bird_log_file_size)),
            log_all: self.log_bird,
            hold_time: self.bgp_hold_time,
            local_as: self.local_as,
            remote_as: self.remote_as,
            local_port: self.bgp_local_port,
            remote_port: self.bgp_remote_port,
            vrrps,
        };
        Options {
            base,
            secrets_dir: (!self.secrets_dir.is_empty()).then(|| self.secrets_dir.clone().into()),
            drop,
            poll_connected: self.delay_connectivity.get(),
            poll_disconnected: self.delay_no_connectivity.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        settings: Settings,
    }

    fn parse(args: &[&str]) -> Settings {
        use clap::Parser as _;
        Cli::try_parse_from(["frontend"].iter().chain(args)).expect("arguments").settings
    }

    #[test]
    fn defaults_are_without_fault() {
        assert_eq!(parse(&[]).validate(), Vec::<String>::new());
        assert!(parse(&["--ecmp"]).ecmp);
        assert!(!parse(&["--drop-if-no-peer", "false"]).drop_if_no_peer);
    }

    #[test]
    fn every_fault_is_named_at_once() {
        let settings = parse(&[
            "--external-interface=an-interface-of-20-b",
            "--bird-config-path=etc",
            "--vrrps=1.2.3.4,x",
            "--router-id=::1",
            "--bgp-hold-time=2",
            "--table-id=254",
            "--nsp-service=nsp",
        ]);
        assert_eq!(settings.validate().len(), 7, "{:#?}", settings.validate());
    }
}
