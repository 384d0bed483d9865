//! Example application of a target pod: opens a stream through the ambassador and says its host name to whoever connects.
//!
//! TCP: the line `<host name>\n` at once, then an echo of what arrives, until the peer closes.
//! UDP: `<host name> ` followed by the datagram, sent from the address the datagram came to (a VIP).

mod tcp;
mod udp;

use anyhow::Context;
use meridio_ambassador::{Ambassador, StreamName};
use tokio_util::sync::CancellationToken;

/// Settings of the example application.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Ambassador socket of the TAPA in this pod.
    #[arg(long, env = "MERIDIO_SOCKET", default_value = "unix:///ambassador.sock")]
    pub socket: String,
    /// Trench of the stream to open.
    #[arg(long, env = "TARGET_TRENCH", default_value = "trench-a")]
    pub trench: String,
    /// Conduit of the stream to open.
    #[arg(long, env = "TARGET_CONDUIT", default_value = "conduit-a-1")]
    pub conduit: String,
    /// Stream to open at start and to close at the end; empty for none.
    #[arg(long, env = "TARGET_STREAM", default_value = "stream-a-i")]
    pub stream: String,
    /// TCP ports to serve.
    #[arg(long, env = "TARGET_TCP_PORTS", value_delimiter = ',', default_value = "4000")]
    pub tcp_ports: Vec<u16>,
    /// UDP ports to serve.
    #[arg(long, env = "TARGET_UDP_PORTS", value_delimiter = ',', default_value = "4003")]
    pub udp_ports: Vec<u16>,
}

impl Settings {
    /// Every fault of the settings, one line each; empty if there is none.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if let Err(error) = Ambassador::check(&self.socket) {
            faults.push(format!("MERIDIO_SOCKET: {error}"));
        }
        if !self.stream.is_empty() && (self.trench.is_empty() || self.conduit.is_empty()) {
            faults.push(format!("TARGET_STREAM {:?} needs TARGET_TRENCH and TARGET_CONDUIT", self.stream));
        }
        faults
    }
}

/// Serves until `stop`, with the stream of the settings kept open meanwhile.
///
/// # Errors
/// A port that cannot be bound, by its number.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    let name = nix::unistd::gethostname().context("host name")?.to_string_lossy().into_owned();
    let mut tasks = tokio::task::JoinSet::new();
    for &port in &settings.tcp_ports {
        let listener = tcp::bind(port).with_context(|| format!("TCP port {port}"))?;
        tasks.spawn(tcp::serve(listener, name.clone(), stop.clone()));
    }
    for &port in &settings.udp_ports {
        let socket = udp::bind(port).with_context(|| format!("UDP port {port}"))?;
        tasks.spawn(udp::serve(socket, name.clone(), stop.clone()));
    }
    if !settings.stream.is_empty() {
        let tapa = Ambassador::new(&settings.socket)?;
        let stream = StreamName::new(settings.trench, settings.conduit, settings.stream);
        let stop = stop.clone();
        tasks.spawn(async move {
            if let Err(error) = tapa.keep_open(&stream, stop).await {
                tracing::warn!(%error, "the stream was not closed in order");
            }
        });
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

#[cfg(test)]
mod tests;
