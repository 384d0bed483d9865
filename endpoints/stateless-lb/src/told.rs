//! What the NSP tells, taken into the inputs: at once, or after a while when it is an empty list and more is known.

use std::time::Duration;

use meridio_common::{EmptyHold, Word};

use crate::inputs::{Inputs, Shared};

/// One watch: what it tells, in the order in which it tells it. Right after the start an empty list is doubted if an earlier process
/// has left something to lose.
#[derive(Debug)]
pub(crate) struct Told {
    shared: Shared,
    hold: EmptyHold,
}

impl Told {
    pub(crate) fn new(name: &'static str, shared: Shared, hold: Duration) -> Self {
        Told { shared, hold: EmptyHold::new(name, hold) }
    }

    /// The server is lost.
    pub(crate) fn lost(&mut self) {
        self.hold.lost();
    }

    /// Takes a list.
    pub(crate) fn list<T: Send + 'static>(&mut self, items: Vec<T>, field: fn(&mut Inputs) -> &mut Option<Vec<T>>) {
        let known = field(&mut self.shared.get()).as_ref().map(|known| !known.is_empty());
        self.take(items.is_empty(), known, move |inputs| *field(inputs) = Some(items));
    }

    /// Takes whether the frontend of this pod is among those that are registered; `nobody`: none is.
    pub(crate) fn frontend(&mut self, present: bool, nobody: bool) {
        let known = self.shared.look(|inputs| inputs.frontend);
        self.take(nobody, known, move |inputs| inputs.frontend = Some(present));
    }

    /// `known`: whether there is something known that would be lost; `None`: nothing has been told yet.
    fn take(&mut self, empty: bool, known: Option<bool>, change: impl FnOnce(&mut Inputs) + Send + 'static) {
        let to_lose = known.unwrap_or_else(|| self.shared.look(|inputs| inputs.kept != Some(false)));
        let (shared, mut inputs, first) = (self.shared.clone(), self.shared.subscribe(), known.is_none());
        let nothing_to_lose = async move {
            if !first || inputs.wait_for(|inputs| inputs.kept == Some(false)).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        let take = move |word: &Word| {
            // Within the change: a list that is told at this moment comes after it.
            shared.change(|inputs| {
                if word.stands() {
                    change(inputs);
                }
            });
        };
        self.hold.take(empty, to_lose, take, nothing_to_lose);
    }
}

#[cfg(test)]
mod tests {
    use meridio_proto::nsp::v1 as nsp;

    use super::*;

    const HOLD: Duration = Duration::from_secs(60);

    fn watch() -> (Told, Shared) {
        let shared = Shared::new();
        (Told::new("streams", shared.clone(), HOLD), shared)
    }

    fn some() -> Vec<nsp::Stream> {
        vec![nsp::Stream::default()]
    }

    /// How many streams are known after a while.
    async fn after(shared: &Shared, time: Duration) -> Option<usize> {
        tokio::time::sleep(time).await;
        shared.get().streams.map(|streams| streams.len())
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_list_after_a_loss_is_believed_after_a_while_or_when_it_is_repeated() {
        let (mut watch, shared) = watch();
        watch.list(some(), |inputs| &mut inputs.streams);
        watch.lost();
        watch.list(vec![], |inputs| &mut inputs.streams);
        assert_eq!(after(&shared, HOLD / 2).await, Some(1));
        assert_eq!(after(&shared, HOLD).await, Some(0));
        watch.list(some(), |inputs| &mut inputs.streams);
        watch.lost();
        watch.list(vec![], |inputs| &mut inputs.streams);
        watch.list(some(), |inputs| &mut inputs.streams);
        assert_eq!(after(&shared, 2 * HOLD).await, Some(1), "overtaken");
        watch.list(vec![], |inputs| &mut inputs.streams);
        assert_eq!(after(&shared, Duration::ZERO).await, Some(0), "a change, not a loss");
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_server_said_that_is_lost_again_is_not_believed_later() {
        let (mut watch, shared) = watch();
        watch.list(some(), |inputs| &mut inputs.streams);
        watch.frontend(true, false);
        for _ in 0..2 {
            watch.lost();
            watch.list(vec![], |inputs| &mut inputs.streams);
            watch.lost();
            assert_eq!(after(&shared, 2 * HOLD).await, Some(1), "an empty list of a session that has ended");
            watch.frontend(false, true);
            watch.lost();
            tokio::time::sleep(2 * HOLD).await;
            assert_eq!(shared.get().frontend, Some(true));
        }
        watch.list(vec![], |inputs| &mut inputs.streams);
        assert_eq!(after(&shared, HOLD / 2).await, Some(1), "held anew by the next session");
        assert_eq!(after(&shared, HOLD).await, Some(0));

        // The same when nothing has been told yet.
        let (mut first, shared) = self::watch();
        first.list(vec![], |inputs| &mut inputs.streams);
        first.lost();
        assert_eq!(after(&shared, 2 * HOLD).await, None);
        shared.change(|inputs| inputs.kept = Some(false));
        assert_eq!(after(&shared, HOLD).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_restart_an_empty_list_is_held_if_there_is_something_to_lose() {
        for (kept, soon) in [(Some(true), None), (None, None), (Some(false), Some(0))] {
            let (mut watch, shared) = watch();
            shared.change(|inputs| inputs.kept = kept);
            watch.list(vec![], |inputs| &mut inputs.streams);
            assert_eq!(after(&shared, HOLD / 2).await, soon, "{kept:?}");
            assert_eq!(after(&shared, HOLD).await, Some(0), "{kept:?}");
        }
        // Known a moment later.
        let (mut watch, shared) = watch();
        watch.list(vec![], |inputs| &mut inputs.streams);
        shared.change(|inputs| inputs.kept = Some(false));
        assert_eq!(after(&shared, Duration::from_millis(1)).await, Some(0));
    }

    #[tokio::test(start_paused = true)]
    async fn the_frontend_is_not_lost_with_the_storage_of_the_nsp() {
        let (mut watch, shared) = watch();
        watch.frontend(true, false);
        watch.lost();
        watch.frontend(false, true);
        tokio::time::sleep(HOLD / 2).await;
        assert_eq!(shared.get().frontend, Some(true));
        watch.lost();
        watch.frontend(false, false);
        assert_eq!(shared.get().frontend, Some(false), "others are registered, this one is not");
    }
}
