//! An endpoint that can be pinged: each client gets an interface, a pair of addresses and a route.
//!
//! `NSM_NAME=nse-1 NSM_SERVICE_NAMES=icmp-responder NSM_CIDR_PREFIX=172.16.1.0/24 endpoint` next to an NSM manager
//! (`NSM_CONNECT_TO`) and a SPIFFE Workload API (`SPIFFE_ENDPOINT_SOCKET`).

use nsm_sdk::{CloseCall, Connection, Element, Endpoint, Error, Next, RequestCall, chain};

/// An element of one's own: says who comes and goes.
struct Visitors;

#[nsm_sdk::async_trait]
impl Element for Visitors {
    fn name(&self) -> &'static str {
        "visitors"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, chain::Error> {
        let connection = next.request(call).await?;
        println!("{} is served", connection.id);
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), chain::Error> {
        println!("{} leaves", call.id());
        next.close(call).await
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let endpoint = Endpoint::from_env()?.element(Visitors).start().await?;
    println!("serving as {}; Ctrl-C ends it", endpoint.name());
    endpoint.run().await
}
