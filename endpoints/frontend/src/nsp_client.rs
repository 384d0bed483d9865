//! The frontend as a client of the NSP: it is told the attractor, and tells whether it has connectivity.

use std::collections::BTreeMap;
use std::time::Duration;

use meridio_common::{Backoff, Health, WatchEvent, watch_events};
use meridio_proto::nsp::v1 as nsp;
use meridio_proto::nsp::v1::configuration_manager_client::ConfigurationManagerClient;
use meridio_proto::nsp::v1::target_registry_client::TargetRegistryClient;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// Name of the health subservice.
pub(crate) const HEALTH_NSP: &str = "NSPCli";
/// Limit of one Register or Unregister.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Limit of the last Unregister when the frontend stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Delay between attempts.
const RETRY: Duration = Duration::from_secs(1);

/// Watches one attractor for ever. An answer without exactly one attractor says nothing: the last one stays.
pub(crate) async fn watch_attractor(
    channel: Channel,
    trench: &str,
    attractor: &str,
    known: watch::Sender<Option<nsp::Attractor>>,
    health: Health,
    stop: CancellationToken,
) {
    let pattern = nsp::Attractor {
        name: attractor.to_owned(),
        trench: Some(nsp::Trench { name: trench.to_owned() }),
        ..Default::default()
    };
    let open = || {
        let (mut client, pattern) = (ConfigurationManagerClient::new(channel.clone()), pattern.clone());
        async move { client.watch_attractor(pattern).await }
    };
    let on_event = |event: WatchEvent<nsp::AttractorResponse>| {
        match event {
            WatchEvent::Message(message) => {
                health.serving(HEALTH_NSP);
                match <[nsp::Attractor; 1]>::try_from(message.attractors) {
                    Ok([attractor]) => {
                        known.send_replace(Some(attractor));
                    }
                    Err(others) => tracing::warn!(count = others.len(), "the NSP does not name exactly one attractor"),
                }
            }
            WatchEvent::Lost(status) => {
                health.waiting(HEALTH_NSP, &format!("the NSP ({})", status.message()), "check the NSP and its address");
            }
        }
        std::future::ready(())
    };
    watch_events(format!("attractor {attractor}"), &stop, open, on_event).await;
}

/// Keeps the NSP's list of frontends in step with `connected` (`None`: nothing is known, nothing is told). At `stop` the
/// frontend is taken from the list.
pub(crate) async fn announce(
    channel: Channel,
    hostname: &str,
    refresh: Duration,
    mut connected: watch::Receiver<Option<bool>>,
    stop: CancellationToken,
) {
    let target = nsp::Target {
        ips: vec![hostname.to_owned()],
        context: BTreeMap::from([("identifier".to_owned(), hostname.to_owned())]),
        status: nsp::target::Status::Enabled.into(),
        r#type: nsp::target::Type::Frontend.into(),
        stream: None,
    };
    let client = TargetRegistryClient::new(channel);
    let mut told = None;
    while !stop.is_cancelled() {
        let wanted = *connected.borrow_and_update();
        let turn = async {
            match wanted {
                None => std::future::pending().await,
                Some(true) => keep_registered(&client, &target, refresh, &mut told).await,
                Some(false) => {
                    let mut backoff = Backoff::constant(RETRY);
                    while told != Some(false) {
                        if unregister(&client, &target, CALL_TIMEOUT).await {
                            told = Some(false);
                        } else {
                            backoff.wait().await;
                        }
                    }
                    std::future::pending().await
                }
            }
        };
        tokio::select! {
            () = stop.cancelled() => break,
            changed = connected.changed() => if changed.is_err() { break },
            () = turn => {}
        }
    }
    if told != Some(false) {
        unregister(&client, &target, STOP_TIMEOUT).await;
    }
}

/// Registers for ever. The first time twice: the NSP stores a target that it does not know as DISABLED whatever is asked.
async fn keep_registered(
    client: &TargetRegistryClient<Channel>,
    target: &nsp::Target,
    refresh: Duration,
    told: &mut Option<bool>,
) {
    loop {
        // An attempt that was cut short may have arrived.
        let first = told.replace(true) != Some(true);
        for _ in 0..if first { 2 } else { 1 } {
            let mut backoff = Backoff::constant(RETRY);
            while !register(client, target).await {
                backoff.wait().await;
            }
        }
        if first {
            tracing::info!("registered in the NSP: this frontend has external connectivity");
        }
        tokio::time::sleep(refresh).await;
    }
}

async fn register(client: &TargetRegistryClient<Channel>, target: &nsp::Target) -> bool {
    let mut client = client.clone();
    let call = client.register(target.clone());
    done("register", tokio::time::timeout(CALL_TIMEOUT, call).await)
}

async fn unregister(client: &TargetRegistryClient<Channel>, target: &nsp::Target, limit: Duration) -> bool {
    let mut client = client.clone();
    let call = client.unregister(target.clone());
    let done = done("unregister", tokio::time::timeout(limit, call).await);
    if done {
        tracing::info!("unregistered from the NSP: this frontend has no external connectivity");
    }
    done
}

type Answer<T> = Result<Result<T, tonic::Status>, tokio::time::error::Elapsed>;

fn done<T>(what: &str, answer: Answer<T>) -> bool {
    match answer {
        Ok(Ok(_)) => return true,
        Ok(Err(status)) => tracing::warn!(error = status.message(), "the NSP does not {what} this frontend"),
        Err(_) => tracing::warn!("the NSP does not answer ({what})"),
    }
    false
}
