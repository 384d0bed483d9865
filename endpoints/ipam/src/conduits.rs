//! Follows the NSP's list of conduits.

use std::collections::BTreeSet;
use std::time::Duration;

use meridio_common::{Backoff, Health, WatchEvent, watch_events};
use meridio_proto::nsp::v1::configuration_manager_client::ConfigurationManagerClient;
use meridio_proto::nsp::v1::{Conduit, Trench};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::Error;
use crate::service::Service;

/// Subservice that tells of the connection to the NSP. No probe depends on it: known conduits are served without.
const NSP: &str = "NSPCli";
/// Key of what keeps conduits out in the health report.
const NOTE: &str = "conduits";
/// Between two attempts to take a list over, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// The newest list; none before the first.
type Listed = Option<BTreeSet<String>>;

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
    let (newest, lists) = watch::channel(Listed::None);
    let watching = watch_events("conduits", &stop, open, |event| {
        match event {
            WatchEvent::Lost(_) => health.waiting(NSP, &format!("the NSP at {address}"), to_do),
            WatchEvent::Message(message) => {
                health.serving(NSP);
                newest.send_replace(Some(message.conduits.into_iter().map(|conduit| conduit.name).collect()));
            }
        }
        std::future::ready(())
    });
    let taking_over = take_over(lists, &health, |listed| {
        let service = service.clone();
        async move { service.set_conduits(&listed).await }
    });
    tokio::select! {
        () = watching => {}
        () = taking_over => {}
    }
}

/// Hands the newest list to `set` until that works: the NSP does not send it again. A newer one is tried at once.
async fn take_over<Set, Done>(mut lists: watch::Receiver<Listed>, health: &Health, mut set: Set)
where
    Set: FnMut(BTreeSet<String>) -> Done,
    Done: Future<Output = Result<(), Error>>,
{
    let mut said = Vec::new();
    while lists.changed().await.is_ok() {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        loop {
            let Some(listed) = lists.borrow_and_update().clone() else { break };
            let result = set(listed).await;
            let fault: Vec<String> = result.err().iter().map(ToString::to_string).collect();
            if fault != said {
                match fault.first() {
                    Some(error) => tracing::error!(%error, "conduits not taken over, trying again"),
                    None => tracing::info!("conduits taken over"),
                }
                health.note(NOTE, fault.clone());
                said.clone_from(&fault);
            }
            if fault.is_empty() {
                break;
            }
            tokio::select! {
                () = backoff.wait() => {}
                changed = lists.changed() => match changed {
                    Ok(()) => {
                        lists.mark_changed();
                        break;
                    }
                    Err(_) => return,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::time::Instant;

    use super::*;

    fn listed(name: &str) -> Listed {
        Some(BTreeSet::from([name.to_owned()]))
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_list_is_tried_until_it_works() {
        let (newest, lists) = watch::channel(None);
        let (health, start) = (Health::detached("test"), Instant::now());
        let attempts: Arc<Mutex<Vec<(Duration, String)>>> = Arc::default();
        // The store is full for ten minutes.
        let full = Duration::from_secs(600);
        let task = tokio::spawn({
            let (health, attempts) = (health.clone(), attempts.clone());
            async move {
                take_over(lists, &health, |listed| {
                    let name = listed.into_iter().collect::<String>();
                    attempts.lock().unwrap().push((start.elapsed(), name.clone()));
                    let fault = Error::PendingConduit { conduit: name, reason: "full".to_owned() };
                    std::future::ready(if start.elapsed() < full { Err(fault) } else { Ok(()) })
                })
                .await;
            }
        });
        newest.send_replace(listed("a"));
        tokio::time::sleep(Duration::from_secs(300)).await;
        let before = attempts.lock().unwrap().len();
        let note = "conduit \"a\" is listed by the NSP, but has no prefix yet: full";
        assert_eq!(health.report().notes["conduits"], [note]);
        newest.send_replace(listed("b"));
        tokio::time::sleep(Duration::from_secs(400)).await;
        assert!(health.report().notes.is_empty());

        let attempts = attempts.lock().unwrap().clone();
        let (old, new) = attempts.split_at(before);
        assert!(old.iter().all(|(_, name)| name == "a") && new.iter().all(|(_, name)| name == "b"), "{attempts:?}");
        assert_eq!(new[0].0, Duration::from_secs(300), "a newer list is tried at once");
        let longest = Duration::from_millis(37_500);
        for pair in [old, new].iter().flat_map(|list| list.windows(2)) {
            assert!(pair[1].0 - pair[0].0 <= longest, "{pair:?}");
        }
        let last = attempts.last().unwrap().0;
        assert!(last >= full && last <= full + longest, "{attempts:?}");
        assert!(attempts.len() < 50, "{}", attempts.len());

        drop(newest);
        task.await.unwrap();
    }
}
