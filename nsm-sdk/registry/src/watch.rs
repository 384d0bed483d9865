//! A watch that survives restarts of whoever answers it.
//!
//! When the stream breaks, what is known stays known. After a reconnect the peer replays what it has; an object that is
//! missing then may just not have registered again yet (a manager forgets its local endpoints when it restarts), so it is
//! suspected first, and reported as gone only after a grace and a fresh list that lacks it as well.

use crate::{Call, Chain, Context, Error, Event, Object, Query};
use futures_util::{Stream, StreamExt};
use rand::Rng;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use tokio::{sync::mpsc, time::Instant};

/// How long a missing object stays known after a reconnect.
pub const GRACE: Duration = Duration::from_secs(2);
/// Pause before a broken watch is opened again.
const REOPEN: Duration = Duration::from_millis(500);
/// What the confirming list may take.
const LIST_TIMEOUT: Duration = Duration::from_secs(5);
const QUEUE: usize = 64;

/// What one reader has been told. Pure: events in, events out.
#[derive(Debug)]
pub struct Reconciler<T> {
    known: BTreeMap<String, T>,
    suspects: BTreeSet<String>,
    /// When the suspects may be asked for again.
    confirm_at: Option<Instant>,
    grace: Duration,
}

impl<T: Object> Reconciler<T> {
    /// Nothing known.
    pub fn new(grace: Duration) -> Self {
        Self { known: BTreeMap::new(), suspects: BTreeSet::new(), confirm_at: None, grace }
    }

    /// The stream is open (again): everything known has to be seen again.
    pub fn connected(&mut self, now: Instant) {
        self.suspects = self.known.keys().cloned().collect();
        self.confirm_at = (!self.suspects.is_empty()).then(|| now + self.grace);
    }

    /// The stream is broken: nothing can be confirmed until it is back.
    pub fn disconnected(&mut self) {
        self.confirm_at = None;
    }

    /// When [`Reconciler::confirm`] is due.
    pub fn confirm_at(&self) -> Option<Instant> {
        self.confirm_at
    }

    /// An event of the stream; what to tell the reader.
    pub fn apply(&mut self, event: Event<T>) -> Option<Event<T>> {
        let name = event.object.name().to_owned();
        self.suspects.remove(&name);
        if self.suspects.is_empty() {
            self.confirm_at = None;
        }
        if event.deleted || event.object.marked_deleted() {
            return self.known.remove(&name).map(|_| Event::gone(event.object));
        }
        if self.known.get(&name) == Some(&event.object) {
            return None;
        }
        self.known.insert(name, event.object.clone());
        Some(Event::present(event.object))
    }

    /// A full list taken after the grace: the suspects that it lacks are gone. `None` if the list could not be had.
    pub fn confirm(&mut self, list: Option<&[T]>, now: Instant) -> Vec<Event<T>> {
        let Some(list) = list else {
            self.confirm_at = Some(now + self.grace);
            return Vec::new();
        };
        self.confirm_at = None;
        let suspects = std::mem::take(&mut self.suspects);
        suspects
            .into_iter()
            .filter(|name| !list.iter().any(|object| object.name() == name))
            .filter_map(|name| self.known.remove(&name))
            .map(Event::gone)
            .collect()
    }
}

/// Events of all objects like `template`, for ever: it ends only when the reader drops it.
pub fn watch<T: Object>(chain: Chain<T>, template: T, grace: Duration) -> impl Stream<Item = Event<T>> + Send + use<T> {
    let (queue, events) = mpsc::channel(QUEUE);
    tokio::spawn(drive(chain, template, Reconciler::new(grace), queue));
    tokio_stream::wrappers::ReceiverStream::new(events)
}

async fn drive<T: Object>(chain: Chain<T>, template: T, mut state: Reconciler<T>, queue: mpsc::Sender<Event<T>>) {
    let mut said = false;
    loop {
        match follow(&chain, &template, &mut state, &queue).await {
            Ok(()) if queue.is_closed() => return,
            Ok(()) => said = false,
            Err(cause) if !said => {
                tracing::warn!(kind = T::KIND, %cause, "the registry's watch is interrupted");
                said = true;
            }
            Err(_) => {}
        }
        state.disconnected();
        let pause = REOPEN.mul_f64(rand::rng().random_range(0.75..1.25));
        tokio::select! {
            () = queue.closed() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// One stream, until it ends or the reader leaves.
async fn follow<T: Object>(
    chain: &Chain<T>,
    template: &T,
    state: &mut Reconciler<T>,
    queue: &mpsc::Sender<Event<T>>,
) -> Result<(), Error> {
    let mut events = tokio::select! {
        () = queue.closed() => return Ok(()),
        events = chain.find(Call::new(Query::watch(template.clone()), Context::new())) => events?,
    };
    state.connected(Instant::now());
    loop {
        let due = state.confirm_at();
        tokio::select! {
            () = queue.closed() => return Ok(()),
            event = events.next() => match event {
                None => return Ok(()),
                Some(event) => {
                    if let Some(event) = state.apply(event?) {
                        let _ = queue.send(event).await;
                    }
                }
            },
            () = sleep_until(due) => {
                let list = chain.list(template.clone(), Context::new().with_timeout(LIST_TIMEOUT)).await;
                for event in state.confirm(list.as_deref().ok(), Instant::now()) {
                    let _ = queue.send(event).await;
                }
            }
        }
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_proto::registry::NetworkServiceEndpoint;

    fn endpoint(name: &str, url: &str) -> NetworkServiceEndpoint {
        NetworkServiceEndpoint { name: name.into(), url: url.into(), ..Default::default() }
    }

    #[test]
    fn a_broken_stream_deletes_nothing_and_a_confirmed_absence_does() {
        let now = Instant::now();
        let mut state = Reconciler::new(GRACE);
        state.connected(now);
        assert_eq!(state.confirm_at(), None);
        for name in ["a", "b", "c"] {
            assert_eq!(state.apply(Event::present(endpoint(name, "1"))), Some(Event::present(endpoint(name, "1"))));
        }
        assert_eq!(state.apply(Event::present(endpoint("a", "1"))), None);

        state.disconnected();
        state.connected(now);
        assert_eq!(state.apply(Event::present(endpoint("a", "1"))), None);
        assert_eq!(state.confirm_at(), Some(now + GRACE));
        // The list could not be had: asked for again later.
        assert!(state.confirm(None, now).is_empty());
        assert_eq!(state.confirm_at(), Some(now + GRACE));
        // b came back in the meantime.
        assert_eq!(
            state.confirm(Some(&[endpoint("a", "1"), endpoint("b", "2")]), now),
            [Event::gone(endpoint("c", "1"))]
        );
        assert_eq!(state.confirm_at(), None);
        assert_eq!(state.apply(Event::present(endpoint("b", "2"))), Some(Event::present(endpoint("b", "2"))));
    }

    #[test]
    fn an_explicit_removal_is_reported_once() {
        let mut state = Reconciler::new(GRACE);
        state.apply(Event::present(endpoint("a", "1")));
        let mut old_style = endpoint("a", "1");
        old_style.expiration_time = Some(prost_types::Timestamp { seconds: -1, nanos: 0 });
        assert!(state.apply(Event::present(old_style)).is_some_and(|event| event.deleted));
        assert_eq!(state.apply(Event::gone(endpoint("a", "1"))), None);
    }
}
