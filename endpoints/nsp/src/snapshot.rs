//! Server streams that always send the latest state.

use std::pin::Pin;

use futures_util::Stream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

pub(crate) type Updates<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>;

/// A stream with the present answer at once and each further one that differs. Every client reads the latest value at its own pace: one
/// that is stuck misses states in between and holds up nobody. Ends when the server stops.
pub(crate) fn updates<V, M>(
    state: watch::Receiver<V>,
    stop: CancellationToken,
    answer: impl Fn(&V) -> M + Send + 'static,
) -> Updates<M>
where
    V: Send + Sync + 'static,
    M: Clone + PartialEq + Send + 'static,
{
    struct Position<V, M, F> {
        state: watch::Receiver<V>,
        stop: CancellationToken,
        answer: F,
        sent: Option<M>,
    }
    let start = Position { state, stop, answer, sent: None };
    Box::pin(futures_util::stream::unfold(start, |mut at| async move {
        loop {
            if at.sent.is_some() {
                tokio::select! {
                    () = at.stop.cancelled() => return None,
                    changed = at.state.changed() => changed.ok()?,
                }
            }
            let message = (at.answer)(&at.state.borrow_and_update());
            if at.sent.as_ref() != Some(&message) {
                at.sent = Some(message.clone());
                return Some((Ok(message), at));
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    #[tokio::test]
    async fn latest_value_only_when_it_differs() {
        let (sender, receiver) = watch::channel(1);
        let stop = CancellationToken::new();
        let mut even = updates(receiver, stop.clone(), |n: &i32| n / 2);
        assert_eq!(even.next().await.unwrap().unwrap(), 0);
        for n in [0, 4, 6] {
            sender.send_replace(n);
        }
        assert_eq!(even.next().await.unwrap().unwrap(), 3, "states in between are skipped");
        sender.send_replace(7);
        let quiet = tokio::time::timeout(std::time::Duration::from_millis(50), even.next()).await;
        assert!(quiet.is_err(), "7 gives the same answer as 6");
        stop.cancel();
        assert!(even.next().await.is_none());
    }
}
