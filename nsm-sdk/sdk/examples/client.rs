//! A client: asks for a connection and keeps it until Ctrl-C.
//!
//! `NSM_NAME=nsc-1 NSM_NETWORK_SERVICES=kernel://icmp-responder/nsm-1 client` next to an NSM manager (`NSM_CONNECT_TO`) and a
//! SPIFFE Workload API (`SPIFFE_ENDPOINT_SOCKET`).

use nsm_sdk::{Client, ConnectionStatus, Error};

#[tokio::main]
async fn main() -> Result<(), Error> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let client = Client::from_env()?.connect().await?;
    for connection in client.connections() {
        let ip = connection.context.clone().unwrap_or_default().ip_context.unwrap_or_default();
        println!("connected: {} from {:?} to {:?}", connection.id, ip.src_ip_addrs, ip.dst_ip_addrs);
    }
    if let Some(mut status) = client.watch(0) {
        tokio::spawn(async move {
            while status.changed().await.is_ok() {
                match &*status.borrow_and_update() {
                    ConnectionStatus::Down(connection) => println!("lost: {}", connection.id),
                    ConnectionStatus::Up(connection) => println!("up: {}", connection.id),
                    ConnectionStatus::New | ConnectionStatus::Closed => {}
                }
            }
        });
    }
    client.run().await
}
