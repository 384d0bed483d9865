//! Target access point ambassador (TAPA): the side-car that turns a pod into a target.
//!
//! Applications ask for streams over a unix socket. The set of streams asked for is the desired state; a loop for each conduit keeps
//! the NSM connection to the proxy of the node and the VIPs on it, a loop for each stream keeps the registration in the NSP. Both work
//! from what they read (NSM's monitor, the NSP's lists) and not from what they remember, so a restarted TAPA, whose open streams are
//! on disk, goes on with the same identifier, addresses and interface.

mod api;
mod board;
mod conduit;
mod context;
mod identifier;
mod names;
mod probe;
mod settings;
mod store;
mod stream;
mod view;
mod wire;

pub use settings::Settings;

use crate::{
    api::Api,
    board::Board,
    names::ConduitKey,
    store::Store,
    wire::{NsmWire, Wire},
};
use anyhow::Context;
use meridio_common::{Health, Probe, grpc::identity};
use meridio_proto::ambassador::v1::tap_server::TapServer;
use nsm_chain::{Connector, remote::Grpc};
use nsm_identity::X509Source;
use nsm_transport::{Address, KeepAlive, Listener, Transport};
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Channel};

/// Pings to the NSP.
const NSP_KEEP_ALIVE: Duration = Duration::from_secs(20);

/// What the loops share.
struct Shared {
    settings: Settings,
    board: Board,
    store: Store,
    network: Box<dyn Network>,
}

/// How the loops reach the outside; tests replace it.
trait Network: Send + Sync + 'static {
    fn nsp(&self, address: &str) -> Result<Channel, nsm_transport::Error>;
    fn wire(&self, settings: &Settings, key: &ConduitKey, interface: &str) -> Arc<dyn Wire>;
}

/// mTLS to the NSP, NSM by the node's manager.
struct Real {
    services: Transport,
    connector: Arc<dyn Connector>,
}

impl Network for Real {
    fn nsp(&self, address: &str) -> Result<Channel, nsm_transport::Error> {
        Ok(self.services.channel(&Address::parse(address)?))
    }

    fn wire(&self, settings: &Settings, key: &ConduitKey, interface: &str) -> Arc<dyn Wire> {
        Arc::new(NsmWire::new(settings, key, interface, self.connector.clone()))
    }
}

impl Real {
    fn new(settings: &Settings, source: X509Source) -> Result<Self, nsm_transport::Error> {
        let transport = Transport::new(source)?;
        let keep_alive = KeepAlive { interval: NSP_KEEP_ALIVE, ..KeepAlive::default() };
        let services = transport.clone().with_keep_alive(Some(keep_alive));
        let nsm = transport.with_max_token_lifetime(settings.max_token_lifetime.get());
        Ok(Self { services, connector: Arc::new(Grpc::new(nsm).sharing()) })
    }
}

impl Shared {
    fn nsp(&self, trench: &str) -> Result<Channel, nsm_transport::Error> {
        self.network.nsp(&self.settings.nsp(trench))
    }

    fn wire(&self, key: &ConduitKey) -> Arc<dyn Wire> {
        self.network.wire(&self.settings, key, &self.store.interface(key))
    }
}

/// Serves applications until `stop`; then takes registrations back and closes connections, each within `MERIDIO_TIMEOUT`. The open
/// streams stay on disk: a TAPA that is started again opens them again.
///
/// # Errors
/// The socket or the state directory cannot be used.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    let health = Health::start("Meridio-tapa", &settings.health_socket, &stop)?;
    health.register(Probe::Startup, &[]);
    health.register(Probe::Readiness, &[]);
    health.register(Probe::Liveness, &[AMBASSADOR]);
    let store = Store::open(&settings.state_dir, &settings.name)
        .with_context(|| format!("state directory {}", settings.state_dir.display()))?;
    let board = Board::new(store.streams().into_iter().map(|saved| saved.key));
    // Applications may ask before there is an identity.
    let api = Api::new(board.clone(), store.clone());
    let address = settings.socket()?;
    let listener = Listener::bind(&address).await?;
    let routes = Routes::new(TapServer::new(api)).add_service(health.service());
    let plain = Transport::insecure();
    let probed = plain.channel(&address);
    let mut tasks = JoinSet::new();
    let probing = (health.clone(), settings.grpc_probe_rpc_timeout.get(), stop.clone());
    tasks.spawn(async move {
        let (health, limit, stop) = probing;
        health.probe_endpoint(AMBASSADOR, probed, limit, stop).await;
    });
    let stopped = stop.clone();
    tasks.spawn(async move {
        if let Err(error) = plain.serve(vec![listener], routes, stopped).await {
            tracing::error!(%error, "the ambassador socket is no longer served");
        }
    });
    tracing::info!(socket = %address, name = settings.name, "ambassador serves");
    if let Some(source) = identity(&settings.spiffe_endpoint_socket, &stop).await {
        let network = Box::new(Real::new(&settings, source)?);
        supervise(Arc::new(Shared { settings, board, store, network }), stop).await;
    }
    while tasks.join_next().await.is_some() {}
    Ok(())
}

const AMBASSADOR: &str = "Ambassador";

/// One loop for each conduit that ever had a stream.
async fn supervise(shared: Arc<Shared>, stop: CancellationToken) {
    let (mut board, mut known, mut loops) = (shared.board.subscribe(), BTreeSet::new(), JoinSet::new());
    loop {
        for key in shared.board.conduits() {
            if known.insert(key.clone()) {
                loops.spawn(conduit::run(shared.clone(), key, stop.clone()));
            }
        }
        tokio::select! {
            () = stop.cancelled() => break,
            _ = board.changed() => {}
        }
    }
    while loops.join_next().await.is_some() {}
}

#[cfg(test)]
mod tests;
