//! Settings of the load balancer (environment prefix `NSM_`).

use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;

use meridio_common::GoDuration;

use crate::routing::GUARD_TABLE;

/// Chunks of the tables: from those of one small stream to more than all streams that fit the other limits can take.
const TABLE_CHUNKS: RangeInclusive<u32> = 2..=4096;

/// Numbers that marks and tables of targets can have, from the offset's start on.
const TABLES: u32 = 32_768;

/// Settings of the load balancer.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Name of this pod and of its NSM endpoint.
    #[arg(long, env = "NSM_NAME", default_value = "load-balancer")]
    pub name: String,
    /// NSM network service that is offered to proxies; its first ten characters begin the names of NSM interfaces.
    #[arg(long, env = "NSM_SERVICE_NAME", default_value = "load-balancer")]
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
    /// Address of the NSP.
    #[arg(long, env = "NSM_NSP_SERVICE", default_value = "nsp-service:7778")]
    pub nsp_service: String,
    /// Conduit.
    #[arg(long, env = "NSM_CONDUIT_NAME", default_value = "load-balancer")]
    pub conduit_name: String,
    /// Trench.
    #[arg(long, env = "NSM_TRENCH_NAME", default_value = "default")]
    pub trench_name: String,
    /// Log level.
    #[arg(long, env = "NSM_LOG_LEVEL", default_value = "DEBUG")]
    pub log_level: String,
    /// First firewall mark and routing table of targets (the slow path).
    #[arg(long, env = "NSM_IDENTIFIER_OFFSET_START", default_value_t = 5000)]
    pub identifier_offset_start: u32,
    /// Keep-alive interval towards the NSP.
    #[arg(long, env = "NSM_GRPC_KEEPALIVE_TIME", default_value = "30s")]
    pub grpc_keepalive_time: GoDuration,
    /// Serve metrics.
    #[arg(long, env = "NSM_METRICS_ENABLED", default_value_t = false, action = clap::ArgAction::Set)]
    pub metrics_enabled: bool,
    /// Port of the metrics.
    #[arg(long, env = "NSM_METRICS_PORT", default_value_t = 2223)]
    pub metrics_port: u16,
    /// Socket of the stream-availability service, which the frontend of this pod watches.
    #[arg(long, env = "NSM_SOCKET", default_value = "unix:///var/lib/meridio/lb.sock")]
    pub socket: String,
    /// Interface towards the gateways, where packets for VIPs arrive.
    #[arg(long, env = "NSM_EXTERNAL_INTERFACE", default_value = "ext-vlan0")]
    pub external_interface: String,
    /// Directory on a BPF file system that outlives this process. Load balancers of several pods can share it: in it each network
    /// namespace has a directory of its own.
    #[arg(long, env = "NSM_BPF_DIR", default_value = "/sys/fs/bpf/meridio")]
    pub bpf_dir: PathBuf,
    /// Streams whose SCTP packets are spread by their ports alone, so that all paths of a multihomed association meet in
    /// one target; separated by commas.
    #[arg(long, env = "NSM_SCTP_PORTS_ONLY", value_delimiter = ',')]
    pub sctp_ports_only: Vec<String>,
    /// Room for the tables of streams, in chunks of 128 KiB of kernel memory: a stream takes 2 up to 600 targets, 4 up to 1,300, else 32, and as
    /// many again while it changes. Counts when the maps are made: in a new pod, or after `--remove`.
    #[arg(long, env = "NSM_TABLE_CHUNKS", default_value_t = meridio_maglev::DEFAULT_CHUNKS as u32)]
    pub table_chunks: u32,
    /// Take away what load balancers have left in this network namespace (programs, maps, rules and routes), and end.
    /// Forwarding ends with it.
    #[arg(long)]
    pub remove: bool,
    /// Table that holds the routes to the gateways (the frontend's `NFE_TABLE_ID`).
    #[arg(long, env = "NSM_GATEWAY_TABLE", default_value_t = 4096)]
    pub gateway_table: u32,
    /// How long what the NSP told before it was lost, or what an earlier process has left in the tables, outweighs an empty list
    /// told after.
    #[arg(long, env = "NSM_EMPTY_HOLD", default_value = "60s")]
    pub empty_hold: GoDuration,
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
            ("NSM_NAME", &self.name),
            ("NSM_SERVICE_NAME", &self.service_name),
            ("NSM_CONDUIT_NAME", &self.conduit_name),
            ("NSM_TRENCH_NAME", &self.trench_name),
        ] {
            if value.is_empty() {
                faults.push(format!("{name} is empty"));
            }
        }
        if let Err(fault) = meridio_common::names::interface_name(&self.external_interface) {
            faults.push(format!("NSM_EXTERNAL_INTERFACE: {fault}"));
        }
        for (name, url) in
            [("NSM_CONNECT_TO", &self.connect_to), ("NSM_NSP_SERVICE", &self.nsp_service), ("NSM_SOCKET", &self.socket)]
        {
            if let Err(error) = nsm_transport::Address::parse(url) {
                faults.push(format!("{name} {url:?}: {error}"));
            }
        }
        if !TABLE_CHUNKS.contains(&self.table_chunks) {
            let (least, most) = (TABLE_CHUNKS.start(), TABLE_CHUNKS.end());
            faults.push(format!(
                "NSM_TABLE_CHUNKS {} is not in {least}..{most} (a stream takes at least {least}; {most} are 512 MiB)",
                self.table_chunks
            ));
        }
        // The tables of the kernel, of the frontend and of guarded VIPs lie below, and marks have 24 bits for offset and identifier.
        const LEAST: u32 = GUARD_TABLE + 1;
        if !(LEAST..1 << 23).contains(&self.identifier_offset_start) {
            let start = self.identifier_offset_start;
            faults.push(format!("NSM_IDENTIFIER_OFFSET_START {start} is not in {LEAST}..8388607"));
        }
        faults.extend(self.collisions());
        faults
    }

    /// Numbers that the tables of targets can have, which are their marks too.
    pub(crate) fn tables(&self) -> Range<u32> {
        self.identifier_offset_start..self.identifier_offset_start.saturating_add(TABLES)
    }

    /// Tables that would be used for two things: one would take the other's routes away.
    fn collisions(&self) -> Vec<String> {
        let (targets, gateways) = (self.tables(), self.gateway_table);
        // The frontend has two: where the gateways are, and what drops if they are not.
        let drop = gateways.saturating_add(1);
        let (first, last) = (targets.start, targets.end.saturating_sub(1));
        let what = format!("NSM_GATEWAY_TABLE {gateways}: it or the next table, {drop}, is");
        let mut faults = Vec::new();
        if targets.contains(&gateways) || targets.contains(&drop) {
            faults.push(format!("{what} among those of targets, {first} to {last} (NSM_IDENTIFIER_OFFSET_START)"));
        }
        if [gateways, drop].contains(&GUARD_TABLE) {
            faults.push(format!("{what} {GUARD_TABLE}, which keeps packets for VIPs off other ways"));
        }
        faults
    }

    /// How the names of this load balancer's NSM interfaces begin.
    pub(crate) fn interface_prefix(&self) -> String {
        self.service_name.chars().take(10).collect()
    }
}

#[cfg(test)]
mod tests {
    use crate::cli::settings;

    #[test]
    fn defaults_have_no_fault_and_each_fault_names_its_setting() {
        assert_eq!(settings(&[]).validate(), [""; 0]);
        for (setting, value, said) in [
            (
                "--table-chunks",
                "1",
                "NSM_TABLE_CHUNKS 1 is not in 2..4096 (a stream takes at least 2; 4096 are 512 MiB)",
            ),
            ("--table-chunks", "4097", "NSM_TABLE_CHUNKS 4097 is not in 2..4096"),
            ("--external-interface", "a/b", "NSM_EXTERNAL_INTERFACE: "),
            ("--trench-name", "", "NSM_TRENCH_NAME is empty"),
        ] {
            let faults = settings(&[setting, value]).validate();
            assert!(faults.len() == 1 && faults[0].starts_with(said), "{setting} {value:?}: {faults:?}");
        }
        for (offset, gateways, said) in [
            (
                "6000",
                "6000",
                &[
                    "NSM_GATEWAY_TABLE 6000: it or the next table, 6001, is among those of targets, 6000 to 38767 (NSM_IDENTIFIER_OFFSET_START)",
                ][..],
            ),
            ("6000", "5999", &["NSM_GATEWAY_TABLE 5999: it or the next table, 6000, is among those of targets"]),
            ("6000", "38767", &["NSM_GATEWAY_TABLE 38767: "]),
            (
                "6000",
                "4098",
                &["NSM_GATEWAY_TABLE 4098: it or the next table, 4099, is 4098, which keeps packets for VIPs"],
            ),
            (
                "6000",
                "4097",
                &["NSM_GATEWAY_TABLE 4097: it or the next table, 4098, is 4098, which keeps packets for VIPs"],
            ),
            ("4098", "100", &["NSM_IDENTIFIER_OFFSET_START 4098 is not in 4099..8388607"]),
            ("8388608", "100", &["NSM_IDENTIFIER_OFFSET_START 8388608 is not in 4099..8388607"]),
            ("256", "4096", &["NSM_IDENTIFIER_OFFSET_START 256 ", "NSM_GATEWAY_TABLE 4096: "]),
            ("6000", "5998", &[]),
            ("6000", "38768", &[]),
            ("4099", "4096", &[]),
            ("6000", "4294967295", &[]),
        ] {
            let faults = settings(&["--identifier-offset-start", offset, "--gateway-table", gateways]).validate();
            let right = faults.len() == said.len() && faults.iter().zip(said).all(|(f, s)| f.starts_with(s));
            assert!(right, "{offset} {gateways}: {faults:?}");
        }
        for chunks in ["2", "4096"] {
            assert_eq!(settings(&["--table-chunks", chunks]).validate(), [""; 0]);
        }
    }
}
