//! Settings of the embedded mesh, under the environment names of NSM's own manager, registry and forwarder.

use meridio_common::GoDuration;
use nsm_identity::DEFAULT_ENDPOINT_SOCKET;
use nsm_kernel::elements::vxlan;
use nsm_transport::Address;
use std::{net::IpAddr, path::PathBuf};

/// All policies of a registry server.
const REGISTRY_POLICIES: &str = "etc/nsm/opa/common/.*.rego,etc/nsm/opa/registry/.*.rego,etc/nsm/opa/server/.*.rego";
/// All policies of a registry's client.
const CLIENT_POLICIES: &str = "etc/nsm/opa/common/.*.rego,etc/nsm/opa/registry/.*.rego,etc/nsm/opa/client/.*.rego";

/// Settings of the node.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Name of the manager. It has to stay the same over restarts.
    #[arg(long, env = "NSM_NAME", default_value = "nsmgr")]
    pub name: String,
    /// Where the manager listens. The first tcp:// URL is where other nodes reach it.
    #[arg(
        long,
        env = "NSM_LISTEN_ON",
        value_delimiter = ',',
        default_value = "unix:///var/lib/networkservicemesh/nsm.io.sock"
    )]
    pub listen_on: Vec<String>,
    /// Manager in another process to be the forwarder of; empty to be manager and forwarder. As a forwarder only, the first
    /// unix:// URL of NSM_LISTEN_ON is where the manager reaches it.
    #[arg(long, env = "NSM_CONNECT_TO", default_value = "")]
    pub connect_to: String,
    /// The registry; empty for the one in this process.
    #[arg(long, env = "NSM_REGISTRY_URL", default_value = "")]
    pub registry_url: String,
    /// Where the registry of this process listens for other nodes' managers; empty for nowhere.
    #[arg(long, env = "NSM_REGISTRY_LISTEN_ON", default_value = "")]
    pub registry_listen_on: String,
    /// Folder of the registry's store, and of what the manager knows of its local endpoints; empty to keep both in memory only.
    #[arg(long, env = "NSM_STATE_DIR", default_value = "/var/lib/nsm")]
    pub state_dir: String,
    /// Own address of tunnels to other nodes; empty for a node by itself.
    #[arg(long, env = "NSM_TUNNEL_IP", default_value = "")]
    pub tunnel_ip: String,
    /// UDP port of tunnels; 0 means 4789, the only one supported.
    #[arg(long, env = "NSM_VXLAN_PORT", default_value_t = 0)]
    pub vxlan_port: u16,
    /// Name of the forwarder; `forwarder-<name of the manager>` if empty.
    #[arg(long, env = "NSM_FORWARDER_NAME", default_value = "")]
    pub forwarder_name: String,
    /// Network service that forwarders are registered under.
    #[arg(long, env = "NSM_FORWARDER_NETWORK_SERVICE_NAME", default_value = "forwarder")]
    pub forwarder_network_service_name: String,
    /// Labels of the forwarder, `key:value`.
    #[arg(long, env = "NSM_FORWARDER_LABELS", value_delimiter = ',', default_value = "p2p:true")]
    pub forwarder_labels: Vec<String>,
    /// Longest life of own tokens.
    #[arg(long, env = "NSM_MAX_TOKEN_LIFETIME", default_value = "10m")]
    pub max_token_lifetime: GoDuration,
    /// What connecting to a next hop may take.
    #[arg(long, env = "NSM_DIAL_TIMEOUT", default_value = "3s")]
    pub dial_timeout: GoDuration,
    /// Masks of the policies of the registries.
    #[arg(long, env = "NSM_REGISTRY_SERVER_POLICIES", value_delimiter = ',', default_value = REGISTRY_POLICIES)]
    pub registry_server_policies: Vec<String>,
    /// Masks of the policies for what the registry above answers.
    #[arg(long, env = "NSM_REGISTRY_CLIENT_POLICIES", value_delimiter = ',', default_value = CLIENT_POLICIES)]
    pub registry_client_policies: Vec<String>,
    /// Lets several owners register the same network service, as long as they agree on it.
    #[arg(long, env = "NSM_REGISTRY_EQUAL_SERVICES", default_value_t = true, action = clap::ArgAction::Set)]
    pub registry_equal_services: bool,
    /// YAML list of prefixes that no endpoint may hand out.
    #[arg(long, env = "NSM_EXCLUDED_PREFIXES_FILE", default_value = nsm_mesh::excluded::DEFAULT_FILE)]
    pub excluded_prefixes_file: PathBuf,
    /// Before a connection is closed because its client is silent, look whether it works.
    #[arg(long, env = "NSM_KEEP_WHILE_ALIVE", default_value_t = true, action = clap::ArgAction::Set)]
    pub keep_while_alive: bool,
    /// Name of this node, for the label nodeName.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node_name: String,
    /// Name of this cluster, for the label clusterName.
    #[arg(long, env = "CLUSTER_NAME", default_value = "")]
    pub cluster_name: String,
    /// Socket of the SPIFFE Workload API.
    #[arg(long, env = "SPIFFE_ENDPOINT_SOCKET", default_value = DEFAULT_ENDPOINT_SOCKET)]
    pub spiffe_endpoint_socket: String,
    /// Socket of the health service; empty for none.
    #[arg(long, env = "HEALTH_SOCKET", default_value = meridio_common::health::DEFAULT_SOCKET)]
    pub health_socket: String,
    /// Level of logs.
    #[arg(long, env = "NSM_LOG_LEVEL", default_value = "INFO")]
    pub log_level: String,
}

impl Settings {
    /// Every fault of the settings, one line each; empty if there is none.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.name.is_empty() {
            faults.push("NSM_NAME: empty".into());
        }
        if self.name == self.forwarder_name {
            faults.push("NSM_FORWARDER_NAME: the same as NSM_NAME; names on a path have to differ".into());
        }
        if self.listen_on.iter().all(|url| url.trim().is_empty()) {
            faults.push("NSM_LISTEN_ON: empty".into());
        }
        let urls = self.listen_on.iter().map(|url| ("NSM_LISTEN_ON", url));
        let others = [
            ("NSM_REGISTRY_URL", &self.registry_url),
            ("NSM_REGISTRY_LISTEN_ON", &self.registry_listen_on),
            ("NSM_CONNECT_TO", &self.connect_to),
        ];
        for (setting, url) in urls.chain(others).filter(|(_, url)| !url.is_empty()) {
            if let Err(cause) = Address::parse(url) {
                faults.push(format!("{setting}: {cause}"));
            }
        }
        if !self.registry_url.is_empty() && !self.registry_listen_on.is_empty() {
            faults.push(
                "NSM_REGISTRY_LISTEN_ON: this process has no registry to serve when NSM_REGISTRY_URL is set".into(),
            );
        }
        if !self.connect_to.is_empty() && !self.listen_on.iter().any(|url| url.starts_with("unix:")) {
            faults.push(
                "NSM_LISTEN_ON: a forwarder by itself needs a unix socket, its manager gets the descriptor".into(),
            );
        }
        if !self.tunnel_ip.is_empty() && self.tunnel_ip.parse::<IpAddr>().is_err() {
            faults.push(format!("NSM_TUNNEL_IP: {:?} is no IP address", self.tunnel_ip));
        }
        if self.vxlan_port != 0 && self.vxlan_port != vxlan::PORT {
            faults.push(format!("NSM_VXLAN_PORT: {} is not supported, only {}", self.vxlan_port, vxlan::PORT));
        }
        for label in self.forwarder_labels.iter().filter(|label| !label.is_empty() && !label.contains(':')) {
            faults.push(format!("NSM_FORWARDER_LABELS: {label:?} is not key:value"));
        }
        for (setting, value) in
            [("NSM_MAX_TOKEN_LIFETIME", self.max_token_lifetime), ("NSM_DIAL_TIMEOUT", self.dial_timeout)]
        {
            if value.get().is_zero() {
                faults.push(format!("{setting}: has to be longer than 0"));
            }
        }
        faults
    }

    /// Labels of the forwarder.
    pub(crate) fn labels_of_forwarder(&self) -> Vec<(String, String)> {
        let pair = |label: &String| label.split_once(':').map(|(key, value)| (key.to_owned(), value.to_owned()));
        self.forwarder_labels.iter().filter_map(pair).collect()
    }

    /// Labels of this node.
    pub(crate) fn labels_of_node(&self) -> Vec<(String, String)> {
        [("nodeName", &self.node_name), ("clusterName", &self.cluster_name)]
            .into_iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(key, value)| (key.to_owned(), value.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        settings: Settings,
    }

    fn parse(args: &[&str]) -> Settings {
        Cli::parse_from([&["nsm"], args].concat()).settings
    }

    #[test]
    fn defaults_are_sound() {
        let settings = parse(&[]);
        assert_eq!(settings.validate(), Vec::<String>::new());
        assert_eq!(settings.labels_of_forwarder(), [("p2p".to_owned(), "true".to_owned())]);
    }

    #[test]
    fn every_fault_is_named_at_once() {
        let faults = parse(&[
            "--name=",
            "--listen-on=tcp://x",
            "--registry-url=tcp://1.2.3.4:5",
            "--registry-listen-on=http://x",
            "--tunnel-ip=ten",
            "--vxlan-port=1",
            "--forwarder-labels=p2p",
            "--dial-timeout=0s",
        ])
        .validate();
        for setting in [
            "NSM_NAME",
            "NSM_LISTEN_ON",
            "NSM_REGISTRY_LISTEN_ON",
            "NSM_TUNNEL_IP",
            "NSM_VXLAN_PORT",
            "NSM_FORWARDER_LABELS",
            "NSM_DIAL_TIMEOUT",
        ] {
            assert!(faults.iter().any(|fault| fault.starts_with(setting)), "{setting}: {faults:?}");
        }
    }
}
