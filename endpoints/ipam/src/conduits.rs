//! Follows the NSP's list of conduits.

use std::collections::BTreeSet;
use std::time::Duration;

use meridio_common::{Backoff, Health, WatchEvent, watch_events};
use meridio_proto::nsp::v1::configuration_manager_client::ConfigurationManagerClient;
use meridio_proto::nsp::v1::{Conduit, Trench};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::service::Service;

/// Subservice that tells of the connection to the NSP. No probe depends on it: known conduits are served without.
const NSP: &str = "NSPCli";

/// Takes each list over, until `stop`. A lost stream says nothing about the conduits.
pub(crate) async fn follow(
    service: Service,
    channel: Channel,
    trench: String,
    address: String,
    health: Health,
    stop: CancellationToken,
) {
    let to_do = "new conduits get no addresses meanwhile; check that the NSP runs";
    health.waiting(NSP, &format!("the NSP at {address}"), to_do);
    let open = || {
        let mut client = ConfigurationManagerClient::new(channel.clone());
        let pattern = Conduit { trench: Some(Trench { name: trench.clone() }), ..Conduit::default() };
        async move { client.watch_conduit(pattern).await }
    };
    watch_events("conduits", &stop, open, |event| {
        let (service, health, address) = (service.clone(), health.clone(), address.clone());
        async move {
            match event {
                WatchEvent::Lost(_) => health.waiting(NSP, &format!("the NSP at {address}"), to_do),
                WatchEvent::Message(message) => {
                    health.serving(NSP);
                    let listed = message.conduits.into_iter().map(|conduit| conduit.name).collect();
                    take_over(&service, &listed, &health).await;
                }
            }
        }
    })
    .await;
}

/// Tries for a while; what is left over then is a matter of configuration (a pool that is too small) and stays visible.
async fn take_over(service: &Service, listed: &BTreeSet<String>, health: &Health) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
    for _ in 0..5 {
        match service.set_conduits(listed).await {
            Ok(()) => return health.note("conduits", Vec::new()),
            Err(error) => {
                tracing::error!(%error, "conduits not taken over");
                health.note("conduits", vec![error.to_string()]);
            }
        }
        backoff.wait().await;
    }
}
