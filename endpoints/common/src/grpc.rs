//! Dialling and serving with mTLS between Meridio's own services, on top of `nsm-transport`.

use std::time::Duration;

use nsm_identity::X509Source;
use nsm_transport::{Address, KeepAlive, Listener, Transport};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::Channel;

use crate::{Backoff, Error};

/// Default of the settings `GRPC_KEEPALIVE_TIME`.
pub const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// How long one attempt to get the identity may take before the wait is logged again.
const IDENTITY_ATTEMPT: Duration = Duration::from_secs(10);

fn failed(object: &str, error: &nsm_transport::Error) -> Error {
    Error::Transport { object: object.to_owned(), reason: error.to_string() }
}

/// The identity of this process from the Workload API at `endpoint_socket`, however long it takes; `None` if `stop` came first.
/// One log line when the wait begins to be long.
pub async fn identity(endpoint_socket: &str, stop: &CancellationToken) -> Option<X509Source> {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    let mut told = false;
    let waiting = async {
        loop {
            match X509Source::connect(endpoint_socket, IDENTITY_ATTEMPT).await {
                Ok(source) => return source,
                Err(error) if !told => {
                    told = true;
                    tracing::warn!(socket = endpoint_socket, %error, "waiting for an identity: is the Workload API running?");
                }
                Err(error) => tracing::debug!(socket = endpoint_socket, %error, "no identity yet"),
            }
            backoff.wait().await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => None,
        source = waiting => Some(source),
    }
}

/// A lazy channel to `address` (`host:port`, `tcp://…` or `unix://…`): it connects at the first call and again after each loss, with
/// mTLS and HTTP/2 pings every 30 s. Only for Meridio's own services; NSM's do not want pings.
///
/// # Errors
/// When `address` is none, or the identity cannot be used.
pub fn connect(source: &X509Source, address: &str) -> Result<Channel, Error> {
    connect_with(source, address, KEEP_ALIVE)
}

/// As [`connect`] with another time between pings (`GRPC_KEEPALIVE_TIME`).
///
/// # Errors
/// As [`connect`].
pub fn connect_with(source: &X509Source, address: &str, keep_alive: Duration) -> Result<Channel, Error> {
    let keep_alive = KeepAlive { interval: keep_alive, ..KeepAlive::default() };
    let parsed = Address::parse(address).map_err(|e| failed(address, &e))?;
    let transport = Transport::new(source.clone()).map_err(|e| failed(address, &e))?;
    Ok(transport.with_keep_alive(Some(keep_alive)).channel(&parsed))
}

/// A bound server that does not serve yet: load the state between binding and serving, or better before both.
#[derive(Debug)]
pub struct Server {
    transport: Transport,
    listener: Listener,
    address: Address,
}

impl Server {
    /// Binds `address`; `:port` means all addresses of both families.
    ///
    /// # Errors
    /// When it is no address, or in use.
    pub async fn bind(address: &str, source: &X509Source) -> Result<Self, Error> {
        let transport = Transport::new(source.clone()).map_err(|e| failed(address, &e))?;
        let parsed = Address::parse(address).map_err(|e| failed(address, &e))?;
        let listener = Listener::bind(&parsed).await.map_err(|e| failed(address, &e))?;
        let address = listener.address().clone();
        Ok(Self { transport, listener, address })
    }

    /// Where it listens; a port of 0 is replaced by the real one.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Serves until `stop`, then cuts streams and returns.
    ///
    /// # Errors
    /// When the HTTP/2 server fails.
    pub async fn serve(self, routes: Routes, stop: CancellationToken) -> Result<(), Error> {
        let Self { transport, listener, address } = self;
        transport.serve(vec![listener], routes, stop).await.map_err(|e| failed(&address.to_string(), &e))
    }
}

/// Binds and serves until `stop`.
///
/// # Errors
/// As [`Server::bind`] and [`Server::serve`].
pub async fn serve(address: &str, routes: Routes, source: &X509Source, stop: CancellationToken) -> Result<(), Error> {
    Server::bind(address, source).await?.serve(routes, stop).await
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::{Health, WatchEvent, watch_events};
    use nsm_identity::Authority;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_client::HealthClient;

    #[tokio::test]
    async fn a_watch_survives_the_restart_of_its_server() {
        let authority = Authority::generate("example.org").unwrap();
        let source = authority.source("/test", Duration::from_secs(600)).unwrap();
        let health = Health::detached("Meridio-test");
        let routes = || Routes::new(health.service());

        let server = Server::bind("127.0.0.1:0", &source).await.unwrap();
        let address = server.address().to_string();
        let first = CancellationToken::new();
        let serving = tokio::spawn(server.serve(routes(), first.clone()));

        let stop = CancellationToken::new();
        let channel = connect(&source, &address).unwrap();
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let (log, token) = (seen.clone(), stop.clone());
        let watching = tokio::spawn(async move {
            let open = || {
                let mut client = HealthClient::new(channel.clone());
                async move { client.watch(HealthCheckRequest::default()).await }
            };
            watch_events("health", &token, open, |event| {
                let word = if matches!(event, WatchEvent::Message(_)) { "message" } else { "lost" };
                log.lock().unwrap().push(word.to_owned());
                async {}
            })
            .await;
        });
        let until = |count: usize| {
            let seen = seen.clone();
            async move {
                let reached = async {
                    while seen.lock().unwrap().len() < count {
                        tokio::time::sleep(Duration::from_millis(10)).await;
                    }
                };
                tokio::time::timeout(Duration::from_secs(20), reached).await.expect("events")
            }
        };
        until(1).await;
        first.cancel();
        serving.await.unwrap().unwrap();
        until(2).await;
        let again = tokio::spawn({
            let (source, stop) = (source.clone(), stop.clone());
            let routes = routes();
            async move { serve(&address, routes, &source, stop).await }
        });
        until(3).await;
        assert_eq!(*seen.lock().unwrap(), ["message", "lost", "message"]);
        stop.cancel();
        watching.await.unwrap();
        again.await.unwrap().unwrap();
    }
}
