//! Whether the load balancer of this pod can forward.

use std::time::Duration;

use meridio_common::{WatchEvent, watch_events};
use meridio_proto::loadbalancer::v1 as lb;
use meridio_proto::loadbalancer::v1::stream_availability_service_client::StreamAvailabilityServiceClient;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// How long a lost socket leaves the last answer standing. While the process of the load balancer restarts the kernel
/// goes on forwarding; one that does not come back must not attract traffic for ever.
pub(crate) const GRACE: Duration = Duration::from_secs(10);

/// Watches for ever. `forwarding` becomes `Some(false)` when nothing was heard for [`GRACE`].
pub(crate) async fn watch_load_balancer(
    channel: Channel,
    hostname: &str,
    forwarding: watch::Sender<Option<bool>>,
    stop: CancellationToken,
) {
    let lost = watch::Sender::new(Some(Instant::now()));
    let open = || {
        let mut client = StreamAvailabilityServiceClient::new(channel.clone());
        async move { client.watch(()).await }
    };
    let on_event = |event: WatchEvent<lb::Response>| {
        match event {
            WatchEvent::Message(message) => {
                lost.send_replace(None);
                tell(&forwarding, forwards(&message, hostname));
            }
            WatchEvent::Lost(_) => {
                lost.send_replace(Some(Instant::now()));
            }
        }
        std::future::ready(())
    };
    tokio::join!(
        watch_events("load balancer", &stop, open, on_event),
        expire(lost.subscribe(), &forwarding, stop.clone())
    );
}

/// Whether the answer holds a target with our name.
fn forwards(message: &lb::Response, hostname: &str) -> bool {
    message.targets.iter().any(|target| target.context.get("identifier").is_some_and(|name| name == hostname))
}

fn tell(forwarding: &watch::Sender<Option<bool>>, now: bool) {
    let changed = forwarding.send_if_modified(|known| known.replace(now) != Some(now));
    if changed {
        tracing::info!(forwarding = now, "load balancer");
    }
}

async fn expire(
    mut lost: watch::Receiver<Option<Instant>>,
    forwarding: &watch::Sender<Option<bool>>,
    stop: CancellationToken,
) {
    loop {
        let since = *lost.borrow_and_update();
        let limit = async {
            match since {
                Some(since) => tokio::time::sleep_until(since + GRACE).await,
                None => std::future::pending().await,
            }
            tell(forwarding, false);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = stop.cancelled() => return,
            _ = lost.changed() => {}
            () = limit => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_with_our_name_counts() {
        let target =
            |name: &str| lb::Target { context: [("identifier".to_owned(), name.to_owned())].into(), stream: None };
        assert!(forwards(&lb::Response { targets: vec![target("lb-1")] }, "lb-1"));
        assert!(!forwards(&lb::Response { targets: vec![target("lb-2")] }, "lb-1"));
        assert!(!forwards(&lb::Response { targets: vec![lb::Target::default()] }, "lb-1"));
        assert!(!forwards(&lb::Response::default(), "lb-1"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_socket_counts_after_the_grace_and_not_when_it_returns() {
        let (forwarding, stop) = (watch::Sender::new(Some(true)), CancellationToken::new());
        let lost = watch::Sender::new(Some(Instant::now()));
        let expiring = expire(lost.subscribe(), &forwarding, stop.clone());
        let story = async {
            tokio::time::sleep(GRACE / 2).await;
            lost.send_replace(None);
            tokio::time::sleep(GRACE * 2).await;
            assert_eq!(*forwarding.borrow(), Some(true), "it came back in time");
            lost.send_replace(Some(Instant::now()));
            tokio::time::sleep(GRACE - Duration::from_millis(1)).await;
            assert_eq!(*forwarding.borrow(), Some(true));
            tokio::time::sleep(Duration::from_millis(2)).await;
            assert_eq!(*forwarding.borrow(), Some(false));
            stop.cancel();
        };
        tokio::join!(expiring, story);
    }
}
