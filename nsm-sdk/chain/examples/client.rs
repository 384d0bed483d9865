//! A client: asks for a connection to a service and keeps it until Ctrl-C.
//!
//! `NSM_NAME=nsc-1 NSM_SERVICE_NAME=icmp-responder client` next to an NSM manager (`NSM_CONNECT_TO`) and a SPIFFE
//! Workload API (`SPIFFE_ENDPOINT_SOCKET`).

use nsm_chain::{
    Client, Connection, NetworkServiceRequest, Side,
    elements::{
        kernel_mechanism::{KERNEL, KernelClient},
        mechanisms::Mechanisms,
        sendfd::SendFdClient,
    },
    remote::Grpc,
};
use nsm_identity::X509Source;
use nsm_transport::Transport;
use std::{error::Error, sync::Arc, time::Duration};

const TIMEOUT: Duration = Duration::from_secs(15);

fn setting(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (name, service) = (setting("NSM_NAME", "nsc-1"), setting("NSM_SERVICE_NAME", "icmp-responder"));
    let workload_api = setting("SPIFFE_ENDPOINT_SOCKET", "unix:///run/spire/sockets/agent.sock");
    let source = X509Source::connect(&workload_api, Duration::from_secs(30)).await?;

    let client = Client::builder(&name, Arc::new(Grpc::new(Transport::new(source)?)))
        .url(setting("NSM_CONNECT_TO", "unix:///var/lib/networkservicemesh/nsm.io.sock"))
        .element(Mechanisms::new(Side::Client).with(KERNEL, KernelClient::with_name("nsm-1")))
        .element(SendFdClient)
        .build();

    // The same id again after a restart: then this is the connection that the last run has left.
    let id = format!("{name}-0");
    let new = || Connection { id: id.clone(), network_service: service.clone(), ..Default::default() };
    let connection = client.find(&id).await?.unwrap_or_else(new);
    let request = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
    let connection = client.request(request, TIMEOUT).await?;
    println!("connected: {:?}", connection.context);
    tokio::signal::ctrl_c().await?;
    Ok(client.close(connection, TIMEOUT).await?)
}
