//! An endpoint that can be pinged: each client gets an interface, a pair of addresses and a route.
//!
//! `NSM_NAME=nse-1 NSM_SERVICE_NAME=icmp-responder NSM_CIDR_PREFIX=172.16.1.0/24 endpoint` next to an NSM manager
//! (`NSM_CONNECT_TO`) and a SPIFFE Workload API (`SPIFFE_ENDPOINT_SOCKET`).

use nsm_chain::{
    Endpoint, Side,
    elements::{
        ipam::PointToPoint,
        kernel_mechanism::{KERNEL, KernelServer},
        mechanisms::Mechanisms,
        sendfd::SendFdServer,
    },
    registry::{NetworkService, NetworkServiceEndpoint},
    token,
};
use nsm_identity::X509Source;
use nsm_registry::RegistryClient;
use nsm_transport::{Address, Listener, Transport};
use std::{error::Error, time::Duration};
use tokio_util::sync::CancellationToken;

fn setting(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (name, service) = (setting("NSM_NAME", "nse-1"), setting("NSM_SERVICE_NAME", "icmp-responder"));
    let manager = setting("NSM_CONNECT_TO", "unix:///var/lib/networkservicemesh/nsm.io.sock");
    let workload_api = setting("SPIFFE_ENDPOINT_SOCKET", "unix:///run/spire/sockets/agent.sock");
    let source = X509Source::connect(&workload_api, Duration::from_secs(30)).await?;

    let tokens = token::from_source(source.clone(), Duration::from_secs(600));
    let endpoint = Endpoint::builder(&name, tokens)
        .element(PointToPoint::new([setting("NSM_CIDR_PREFIX", "172.16.1.0/24").parse()?]))
        .element(Mechanisms::new(Side::Server).with(KERNEL, KernelServer::new()))
        .element(SendFdServer)
        .build();

    let url = format!("unix://{}/{name}.sock", std::env::temp_dir().display());
    let listener = Listener::bind(&Address::parse(&url)?).await?;
    let (stop, routes) = (CancellationToken::new(), endpoint.service().routes());
    let server = tokio::spawn({
        let (transport, stop) = (Transport::new(source.clone())?, stop.clone());
        async move { transport.serve(vec![listener], routes, stop).await }
    });

    let registry = RegistryClient::builder(manager, source).build()?;
    registry.register_ns(NetworkService { name: service.clone(), ..Default::default() }).await?;
    let nse = NetworkServiceEndpoint { name, url, network_service_names: vec![service], ..Default::default() };
    registry.register_nse(nse.clone()).await?;
    println!("serving as {}; Ctrl-C ends it", nse.name);
    tokio::signal::ctrl_c().await?;
    registry.unregister_nse(nse, None).await?;
    stop.cancel();
    server.await?.map_err(Into::into)
}
