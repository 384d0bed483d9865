//! Connections of one endpoint, and who wants to hear of them.

use super::selector::matches;
use crate::{Connection, ConnectionEvent, ConnectionEventType, Key, MonitorScopeSelector, Side};
use futures_util::Stream;
use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
};

/// Where the `monitor` element leaves the hub for elements that have something to announce.
pub const HUB: Key<Hub> = Key::shared(Side::Server);

/// Beyond this many waiting events only the latest of each connection is kept.
const BACKLOG: usize = 256;

/// Collects the state of connections and hands it to subscribers. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Hub(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    connections: BTreeMap<String, Connection>,
    subscribers: Vec<Weak<Mutex<Queue>>>,
}

#[derive(Debug, Default)]
struct Queue {
    selector: MonitorScopeSelector,
    events: VecDeque<ConnectionEvent>,
    waker: Option<Waker>,
    ended: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Hub {
    /// A hub without connections.
    pub fn new() -> Self {
        Self::default()
    }

    /// Announces a new or changed connection.
    pub fn update(&self, connection: Connection) {
        let mut inner = lock(&self.0);
        inner.connections.insert(connection.id.clone(), connection.clone());
        inner.announce(ConnectionEventType::Update, &connection);
    }

    /// Announces something about a connection without remembering it (REFRESH_REQUESTED and the like).
    pub fn notify(&self, connection: &Connection) {
        lock(&self.0).announce(ConnectionEventType::Update, connection);
    }

    /// Announces the end of a connection.
    pub fn delete(&self, connection: &Connection) {
        let mut inner = lock(&self.0);
        let connection = inner.connections.remove(&connection.id).unwrap_or_else(|| connection.clone());
        inner.announce(ConnectionEventType::Delete, &connection);
    }

    /// The connections as they are.
    pub fn connections(&self) -> Vec<Connection> {
        lock(&self.0).connections.values().cloned().collect()
    }

    /// One connection as it is.
    pub fn get(&self, id: &str) -> Option<Connection> {
        lock(&self.0).connections.get(id).cloned()
    }

    /// Number of live subscriptions.
    pub fn subscribers(&self) -> usize {
        lock(&self.0).subscribers.iter().filter(|queue| queue.strong_count() > 0).count()
    }

    /// All matching connections at once, empty or not, then each change of one.
    pub fn subscribe(&self, selector: MonitorScopeSelector) -> Subscription {
        let mut inner = lock(&self.0);
        let connections = inner.connections.iter().filter(|(_, connection)| matches(&selector, connection));
        let connections = connections.map(|(id, connection)| (id.clone(), connection.clone())).collect();
        let first = ConnectionEvent { r#type: ConnectionEventType::InitialStateTransfer.into(), connections };
        let queue = Queue { selector, events: VecDeque::from([first]), ..Queue::default() };
        let queue = Arc::new(Mutex::new(queue));
        inner.subscribers.retain(|queue| queue.strong_count() > 0);
        inner.subscribers.push(Arc::downgrade(&queue));
        Subscription(queue)
    }

    /// Ends every subscription, after what is waiting in it.
    pub fn end(&self) {
        for queue in lock(&self.0).subscribers.drain(..).filter_map(|queue| queue.upgrade()) {
            let mut queue = lock(&queue);
            queue.ended = true;
            queue.wake();
        }
    }
}

impl Inner {
    fn announce(&mut self, kind: ConnectionEventType, connection: &Connection) {
        self.subscribers.retain(|queue| match queue.upgrade() {
            None => false,
            Some(queue) => {
                let mut queue = lock(&queue);
                if matches(&queue.selector, connection) {
                    queue.push(kind, connection);
                }
                true
            }
        });
    }
}

impl Queue {
    fn push(&mut self, kind: ConnectionEventType, connection: &Connection) {
        let connections = BTreeMap::from([(connection.id.clone(), connection.clone())]);
        self.events.push_back(ConnectionEvent { r#type: kind.into(), connections });
        if self.events.len() > BACKLOG {
            self.events = coalesce(std::mem::take(&mut self.events));
        }
        self.wake();
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// Keeps the initial state and the latest event of each connection, in order: a slow reader catches up on states,
/// not on history, and a queue never holds more than there are connections.
fn coalesce(events: VecDeque<ConnectionEvent>) -> VecDeque<ConnectionEvent> {
    let id = |event: &ConnectionEvent| event.connections.keys().next().cloned();
    let initial = |event: &ConnectionEvent| event.r#type() == ConnectionEventType::InitialStateTransfer;
    let mut last = HashMap::new();
    for (n, event) in events.iter().enumerate() {
        last.insert(id(event), n);
    }
    let keep = |(n, event): &(usize, ConnectionEvent)| initial(event) || last.get(&id(event)) == Some(n);
    events.into_iter().enumerate().filter(keep).map(|(_, event)| event).collect()
}

/// The events of one subscriber; dropping it ends the subscription.
#[derive(Debug)]
pub struct Subscription(Arc<Mutex<Queue>>);

impl Stream for Subscription {
    type Item = ConnectionEvent;

    fn poll_next(self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<Option<ConnectionEvent>> {
        let mut queue = lock(&self.0);
        match queue.events.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None if queue.ended => Poll::Ready(None),
            None => {
                queue.waker = Some(ctx.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Path, PathSegment};
    use futures_util::{FutureExt, StreamExt};

    fn conn(id: &str, service: &str) -> Connection {
        let path_segments = vec![
            PathSegment { name: "nsc".into(), id: format!("{id}-0"), ..Default::default() },
            PathSegment { name: "mgr".into(), id: id.into(), ..Default::default() },
        ];
        let path = Some(Path { index: 1, path_segments });
        Connection { id: id.into(), network_service: service.into(), path, ..Default::default() }
    }

    fn segment(name: &str, id: &str) -> PathSegment {
        PathSegment { name: name.into(), id: id.into(), ..Default::default() }
    }

    fn selector(path_segments: Vec<PathSegment>, services: &[&str]) -> MonitorScopeSelector {
        let network_services = services.iter().map(|name| (*name).to_owned()).collect();
        MonitorScopeSelector { path_segments, network_services }
    }

    fn next(subscription: &mut Subscription) -> Option<(ConnectionEventType, Vec<String>)> {
        let event = subscription.next().now_or_never()??;
        Some((event.r#type(), event.connections.into_keys().collect()))
    }

    #[test]
    fn selectors() {
        let c = conn("c", "svc");
        let hits = [
            selector(vec![], &[]),
            selector(vec![segment("nsc", "")], &["svc"]),
            selector(vec![segment("", "c-0"), segment("mgr", "c")], &[]),
        ];
        let misses = [
            selector(vec![], &["other"]),
            selector(vec![segment("mgr", ""), segment("nsc", "")], &[]),
            selector(vec![segment("nsc", "c")], &[]),
            selector(vec![segment("", ""); 3], &[]),
        ];
        assert!(hits.iter().all(|selector| matches(selector, &c)));
        assert!(!misses.iter().any(|selector| matches(selector, &c)));
    }

    // Conformance 37
    #[test]
    fn initial_state_then_matching_changes() {
        use ConnectionEventType::{Delete, InitialStateTransfer, Update};
        let hub = Hub::new();
        let mut all = hub.subscribe(selector(vec![], &[]));
        let mut mine = hub.subscribe(selector(vec![segment("", "c-0")], &[]));
        let mut other = hub.subscribe(selector(vec![segment("", "d-0")], &[]));
        hub.update(conn("c", "svc"));
        let mut late = hub.subscribe(selector(vec![], &[]));
        hub.delete(&conn("c", "svc"));
        let c = || vec!["c".to_owned()];
        for stream in [&mut all, &mut mine] {
            assert_eq!(next(stream), Some((InitialStateTransfer, vec![])));
            assert_eq!(next(stream), Some((Update, c())));
            assert_eq!(next(stream), Some((Delete, c())));
            assert_eq!(next(stream), None);
        }
        assert_eq!(next(&mut other), Some((InitialStateTransfer, vec![])));
        assert_eq!(next(&mut other), None);
        assert_eq!(next(&mut late), Some((InitialStateTransfer, c())));
        assert_eq!(next(&mut late), Some((Delete, c())));
        drop((all, mine, other));
        assert_eq!(hub.subscribers(), 1);
        hub.end();
        assert_eq!(late.next().now_or_never(), Some(None));
    }

    #[test]
    fn a_slow_subscriber_gets_states_not_history() {
        let hub = Hub::new();
        let mut slow = hub.subscribe(selector(vec![], &[]));
        for n in 0..10_000 {
            hub.update(conn(&format!("c{}", n % 3), "svc"));
        }
        hub.delete(&conn("c1", "svc"));
        let events: Vec<_> = std::iter::from_fn(|| next(&mut slow)).collect();
        assert!(events.len() <= BACKLOG + 1);
        assert_eq!(events[0].0, ConnectionEventType::InitialStateTransfer);
        assert_eq!(events.last().unwrap(), &(ConnectionEventType::Delete, vec!["c1".to_owned()]));
    }
}
