//! Connections of one endpoint, and who wants to hear of them.

use super::selector::matches;
use crate::{Connection, ConnectionEvent, ConnectionEventType, Kept, Key, MonitorScopeSelector, Side, State};
use futures_util::Stream;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    hash::{BuildHasher, RandomState},
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

/// Nearly every subscriber follows one connection: both sides are found by ids, however many others there are. By hashes of ids, to be
/// exact, which take less memory: what is found is compared with the selector in any case.
#[derive(Debug, Default)]
struct Inner {
    connections: BTreeMap<Arc<str>, Kept>,
    /// Ids of connections by the ids of the segments of their paths.
    by_segment: BTreeSet<(u64, Arc<str>)>,
    /// Subscribers whose selector names a segment's id, by that id.
    followers: HashMap<u64, Vec<Weak<Mutex<Queue>>>>,
    hashes: RandomState,
    /// The other subscribers.
    others: Vec<Weak<Mutex<Queue>>>,
}

/// A segment's id that every connection has which the selector covers; `None` if it names none.
fn followed(selector: &MonitorScopeSelector) -> Option<&str> {
    selector.path_segments.iter().map(|segment| segment.id.as_str()).find(|id| !id.is_empty())
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
        self.update_kept(&connection, Kept::new(&connection));
    }

    /// The same for one that is kept already.
    pub(super) fn update_kept(&self, connection: &Connection, kept: Kept) {
        let mut inner = lock(&self.0);
        inner.announce(ConnectionEventType::Update, connection);
        inner.insert(connection, kept);
    }

    /// Announces a wish about a connection (REFRESH_REQUESTED and the like). Who comes to listen later, perhaps because it was still
    /// busy with the answer, finds it in the initial state, until the connection is updated. Unknown connections stay unknown.
    pub fn notify(&self, connection: &Connection) {
        let mut inner = lock(&self.0);
        inner.announce(ConnectionEventType::Update, connection);
        if inner.connections.contains_key(connection.id.as_str()) {
            inner.insert(connection, Kept::new(connection));
        }
    }

    /// Asks the clients of all connections to request them again: something that they have been told is not so any more.
    pub fn ask_for_refresh(&self) {
        let ids: Vec<_> = lock(&self.0).connections.keys().cloned().collect();
        for id in ids {
            // One at a time, and as it is at that moment: requests and closes go on meanwhile.
            let mut inner = lock(&self.0);
            let Some(mut connection) = inner.connections.get(&id).map(Kept::get) else { continue };
            connection.set_state(State::RefreshRequested);
            inner.announce(ConnectionEventType::Update, &connection);
            inner.insert(&connection, Kept::new(&connection));
        }
    }

    /// Announces the end of a connection.
    pub fn delete(&self, connection: &Connection) {
        let mut inner = lock(&self.0);
        let connection = inner.remove(&connection.id).unwrap_or_else(|| connection.clone());
        inner.announce(ConnectionEventType::Delete, &connection);
    }

    /// The connections as they are.
    pub fn connections(&self) -> Vec<Connection> {
        lock(&self.0).connections.values().map(Kept::get).collect()
    }

    /// One connection as it is.
    pub fn get(&self, id: &str) -> Option<Connection> {
        lock(&self.0).connections.get(id).map(Kept::get)
    }

    /// Number of live subscriptions.
    pub fn subscribers(&self) -> usize {
        let inner = lock(&self.0);
        inner.others.len() + inner.followers.values().map(Vec::len).sum::<usize>()
    }

    /// All matching connections at once, empty or not, then each change of one.
    pub fn subscribe(&self, selector: MonitorScopeSelector) -> Subscription {
        let mut inner = lock(&self.0);
        let connections = inner.covered(&selector);
        let first = ConnectionEvent { r#type: ConnectionEventType::InitialStateTransfer.into(), connections };
        let id = followed(&selector).map(|id| inner.hashes.hash_one(id));
        let queue = Queue { selector, events: VecDeque::from([first]), ..Queue::default() };
        let queue = Arc::new(Mutex::new(queue));
        match id {
            Some(id) => inner.followers.entry(id).or_default().push(Arc::downgrade(&queue)),
            None => inner.others.push(Arc::downgrade(&queue)),
        }
        Subscription { queue, id, hub: Arc::downgrade(&self.0) }
    }

    /// Ends every subscription, after what is waiting in it.
    pub fn end(&self) {
        let mut inner = lock(&self.0);
        let followers = std::mem::take(&mut inner.followers).into_values().flatten();
        let all: Vec<_> = followers.chain(std::mem::take(&mut inner.others)).collect();
        drop(inner);
        for queue in all.iter().filter_map(Weak::upgrade) {
            let mut queue = lock(&queue);
            queue.ended = true;
            queue.wake();
        }
    }
}

impl Inner {
    /// Hashes of the ids of a path's segments, each once.
    fn segments(&self, connection: &Connection) -> BTreeSet<u64> {
        let segments = connection.path.as_ref().map_or(&[][..], |path| &path.path_segments);
        let ids = segments.iter().map(|segment| segment.id.as_str()).filter(|id| !id.is_empty());
        ids.map(|id| self.hashes.hash_one(id)).collect()
    }

    fn insert(&mut self, connection: &Connection, kept: Kept) {
        self.remove(&connection.id);
        let id: Arc<str> = connection.id.as_str().into();
        for segment in self.segments(connection) {
            self.by_segment.insert((segment, id.clone()));
        }
        self.connections.insert(id, kept);
    }

    fn remove(&mut self, id: &str) -> Option<Connection> {
        let (id, kept) = self.connections.remove_entry(id)?;
        let connection = kept.get();
        for segment in self.segments(&connection) {
            self.by_segment.remove(&(segment, id.clone()));
        }
        Some(connection)
    }

    /// The connections that a selector covers, by id.
    fn covered(&self, selector: &MonitorScopeSelector) -> BTreeMap<String, Connection> {
        let matching = |connection: &Connection| matches(selector, connection);
        let with_id = |connection: Connection| (connection.id.clone(), connection);
        match followed(selector).map(|id| self.hashes.hash_one(id)) {
            Some(segment) => {
                let from = self.by_segment.range((segment, Arc::from(""))..);
                let ids = from.take_while(|(found, _)| *found == segment).map(|(_, id)| id);
                ids.filter_map(|id| self.connections.get(id)).map(Kept::get).filter(matching).map(with_id).collect()
            }
            None => self.connections.values().map(Kept::get).filter(matching).map(with_id).collect(),
        }
    }

    fn announce(&self, kind: ConnectionEventType, connection: &Connection) {
        let followers = self.segments(connection).into_iter().filter_map(|id| self.followers.get(&id)).flatten();
        for queue in followers.chain(&self.others).filter_map(Weak::upgrade) {
            let mut queue = lock(&queue);
            if matches(&queue.selector, connection) {
                queue.push(kind, connection);
            }
        }
    }

    /// A subscriber has left.
    fn forget(&mut self, queue: &Weak<Mutex<Queue>>, id: Option<u64>) {
        match id {
            None => self.others.retain(|other| !other.ptr_eq(queue)),
            Some(id) => {
                if let Some(followers) = self.followers.get_mut(&id) {
                    followers.retain(|other| !other.ptr_eq(queue));
                    if followers.is_empty() {
                        self.followers.remove(&id);
                    }
                }
            }
        }
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
pub struct Subscription {
    queue: Arc<Mutex<Queue>>,
    /// What it is listed under.
    id: Option<u64>,
    hub: Weak<Mutex<Inner>>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        if let Some(hub) = self.hub.upgrade() {
            lock(&hub).forget(&Arc::downgrade(&self.queue), self.id);
        }
    }
}

impl Stream for Subscription {
    type Item = ConnectionEvent;

    fn poll_next(self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<Option<ConnectionEvent>> {
        let mut queue = lock(&self.queue);
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
    use crate::{Path, PathSegment, State};
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

    // Conformance 55
    #[test]
    fn a_wish_is_found_by_who_comes_later_until_it_is_granted() {
        let hub = Hub::new();
        let state = |hub: &Hub| {
            let first = hub.subscribe(selector(vec![], &[])).next().now_or_never().unwrap().unwrap();
            first.connections.into_values().map(|connection| connection.state()).collect::<Vec<_>>()
        };
        let mut wish = conn("c", "svc");
        wish.set_state(State::RefreshRequested);
        let mut early = hub.subscribe(selector(vec![], &[]));
        hub.notify(&wish);
        assert!(state(&hub).is_empty(), "what is closed does not come back");
        hub.update(conn("c", "svc"));
        hub.notify(&wish);
        assert_eq!(state(&hub), [State::RefreshRequested]);
        hub.update(conn("c", "svc"));
        assert_eq!(state(&hub), [State::Up]);
        assert_eq!(std::iter::from_fn(|| next(&mut early)).count(), 5, "each was announced");
    }

    /// What is found by ids is what the rules find among all.
    #[test]
    fn followers_see_their_connection_whatever_its_path_becomes() {
        let hub = Hub::new();
        for n in 0..100 {
            hub.update(conn(&format!("c{n}"), "svc"));
        }
        let mut mine = hub.subscribe(selector(vec![segment("nsc", "c7-0")], &[]));
        let mut run = hub.subscribe(selector(vec![segment("nsc", ""), segment("mgr", "c7")], &["svc"]));
        let mut wrong = hub.subscribe(selector(vec![segment("mgr", "c7-0")], &[]));
        let c7 = || vec!["c7".to_owned()];
        assert_eq!(next(&mut mine).unwrap().1, c7());
        assert_eq!(next(&mut run).unwrap().1, c7());
        assert!(next(&mut wrong).unwrap().1.is_empty());
        // Another segment, and an id twice on the path: one event each.
        let mut longer = conn("c7", "svc");
        let path = longer.path.as_mut().unwrap();
        path.path_segments.extend([segment("fwd", "f7"), segment("nse", "c7-0")]);
        hub.update(longer);
        let mut late = hub.subscribe(selector(vec![segment("", "f7")], &[]));
        assert_eq!(next(&mut late).unwrap().1, c7());
        hub.update(conn("c7", "svc"));
        for stream in [&mut mine, &mut run] {
            assert_eq!((next(stream).unwrap().1, next(stream).unwrap().1, next(stream)), (c7(), c7(), None));
        }
        assert_eq!(next(&mut late), None, "the segment is gone from the path");
        hub.delete(&conn("c7", "svc"));
        assert_eq!(next(&mut mine), Some((ConnectionEventType::Delete, c7())));
        assert_eq!(hub.subscribers(), 4);
        drop((mine, run, wrong, late));
        for n in 0..100 {
            hub.delete(&conn(&format!("c{n}"), "svc"));
        }
        let inner = lock(&hub.0);
        assert!(inner.followers.is_empty() && inner.by_segment.is_empty() && inner.connections.is_empty());
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
