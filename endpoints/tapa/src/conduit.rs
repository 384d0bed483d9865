//! One conduit: its connection, VIPs and streams.

use crate::{
    Shared,
    context::{local_ips, parse_net, with_vips},
    names::{ConduitKey, StreamKey},
    stream::Stream,
    view::{self, View},
    wire::{self, Wire},
};
use ipnet::IpNet;
use meridio_common::{Backoff, watch_loop};
use meridio_proto::nsp::v1 as nsp;
use meridio_proto::nsp::v1::{
    configuration_manager_client::ConfigurationManagerClient, target_registry_client::TargetRegistryClient,
};
use nsm_chain::{Connection, NetworkServiceRequest, elements::heal::ConnectionStatus};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// First pause after a failed attempt to connect or to change the connection.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Pause before each question to the wire of a connection that NSM has lost. So many in a row without an answer mean that it is dead:
/// what is healed before changes nothing for the target.
const DOWN_PAUSE: Duration = Duration::from_millis(500);
const DOWN_MISSES: u32 = 2;
/// Longest pause while the first connection is made; a proxy that has just come up should not be waited for.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

type Vips = Option<BTreeSet<IpNet>>;

/// Serves a conduit whenever it has an open stream, until `stop`. `stop` takes registrations back and closes the connection.
pub(crate) async fn run(shared: Arc<Shared>, key: ConduitKey, stop: CancellationToken) {
    let mut board = shared.board.subscribe();
    loop {
        while shared.board.streams(&key).is_empty() {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = board.changed() => if changed.is_err() { return },
            }
        }
        if stop.is_cancelled() {
            return;
        }
        session(&shared, &key, &stop).await;
    }
}

/// From the first stream to the last.
async fn session(shared: &Arc<Shared>, key: &ConduitKey, stop: &CancellationToken) {
    let channel = match shared.nsp(&key.trench) {
        Ok(channel) => channel,
        Err(error) => {
            tracing::error!(conduit = %key, %error, "the NSP's address cannot be used");
            return stop.cancelled().await;
        }
    };
    tracing::info!(conduit = %key, "conduit wanted");
    let (view, vips) = (Arc::new(watch::Sender::new(View::default())), watch::Sender::new(Vips::None));
    let (watching, connecting) = (CancellationToken::new(), CancellationToken::new());
    let mut watches = JoinSet::new();
    watches.spawn(watch_streams(channel.clone(), key.clone(), view.clone(), watching.clone()));
    let seen = vips.subscribe();
    watches.spawn(watch_vips(channel.clone(), key.clone(), vips, watching.clone()));
    let wire = shared.wire(key);
    let link = Link { shared: shared.clone(), key: key.clone(), wire: wire.clone(), view: view.clone(), vips: seen };
    let linking = tokio::spawn(link.run(connecting.clone()));
    loop {
        serve_streams(shared, key, &channel, &view, stop).await;
        // Streams that were opened while the last ones were given up keep the conduit.
        if stop.is_cancelled() || shared.board.streams(key).is_empty() {
            break;
        }
    }
    connecting.cancel();
    watching.cancel();
    let _ = linking.await;
    close(shared, key, &wire).await;
    while watches.join_next().await.is_some() {}
}

/// Ends the connection; the interface goes with it. Nobody waits for it longer than the settings say.
async fn close(shared: &Shared, key: &ConduitKey, wire: &Arc<dyn Wire>) {
    let current = wire.watch().borrow().connection().cloned();
    // A request that is still under way has to be closed too: the id is enough for that.
    let connection = current.or_else(|| shared.store.connection(key));
    let connection = connection.or_else(|| wire::fresh(&shared.settings, key).connection).unwrap_or_default();
    match timeout(shared.settings.timeout.get(), wire.close(connection)).await {
        Ok(Ok(())) => tracing::info!(conduit = %key, "connection closed"),
        Ok(Err(error)) => {
            tracing::warn!(conduit = %key, %error, "connection not closed in order, it is left to expire")
        }
        Err(_) => tracing::warn!(conduit = %key, "connection not closed in time, it is left to expire"),
    }
    shared.store.forget_conduit(key);
}

/// Keeps one task for each open stream; returns when there is none left, each of them unregistered.
async fn serve_streams(
    shared: &Arc<Shared>,
    key: &ConduitKey,
    channel: &Channel,
    view: &watch::Sender<View>,
    stop: &CancellationToken,
) {
    let mut board = shared.board.subscribe();
    let mut tasks = BTreeMap::<StreamKey, (CancellationToken, JoinHandle<()>)>::new();
    loop {
        let wanted = if stop.is_cancelled() { BTreeSet::new() } else { shared.board.streams(key) };
        for (stream, (stop, _)) in &tasks {
            if !wanted.contains(stream) {
                stop.cancel();
            }
        }
        tasks.retain(|_, (_, task)| !task.is_finished());
        for stream in &wanted {
            // One that is given up and wanted again waits for its own end.
            if !tasks.contains_key(stream) {
                let stop = CancellationToken::new();
                let task = tokio::spawn(shared.stream(stream, channel, view.subscribe()).run(stop.clone()));
                tasks.insert(stream.clone(), (stop, task));
            }
        }
        if tasks.is_empty() {
            return;
        }
        let ending = tasks.values_mut().filter(|(stop, _)| stop.is_cancelled()).map(|(_, task)| task);
        let ending: Vec<_> = ending.collect();
        let some_end = async {
            match ending.is_empty() {
                true => std::future::pending().await,
                false => _ = futures_util::future::select_all(ending).await,
            }
        };
        tokio::select! {
            () = stop.cancelled(), if !wanted.is_empty() => {}
            () = some_end => {}
            _ = board.changed() => {}
        }
    }
}

impl Shared {
    fn stream(&self, key: &StreamKey, channel: &Channel, view: watch::Receiver<View>) -> Stream {
        Stream {
            key: key.clone(),
            registry: TargetRegistryClient::new(channel.clone()),
            board: self.board.clone(),
            store: self.store.clone(),
            view,
            timeout: self.settings.timeout.get(),
            renewal: self.settings.nsp_entry_timeout.get(),
        }
    }
}

/// The connection's loop: establish it, then keep its VIPs as the NSP says.
struct Link {
    shared: Arc<Shared>,
    key: ConduitKey,
    wire: Arc<dyn Wire>,
    view: Arc<watch::Sender<View>>,
    vips: watch::Receiver<Vips>,
}

impl Link {
    async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.keep() => {}
            () = self.doubt() => {}
        }
    }

    async fn keep(&self) {
        let (mut status, mut wanted) = (self.wire.watch(), self.vips.clone());
        let mut current = self.establish().await;
        let (mut backoff, mut up) = (self.backoff(), true);
        loop {
            self.publish(&current);
            let vips = wanted.borrow_and_update().clone();
            let mut failed = false;
            if let Some(request) = vips.as_ref().and_then(|vips| change(&current, vips)) {
                match self.wire.request(request).await {
                    Ok(connection) => {
                        tracing::info!(conduit = %self.key, vips = vips.as_ref().map_or(0, BTreeSet::len), "VIPs set");
                        current = connection;
                        self.publish(&current);
                    }
                    Err(error) => {
                        tracing::warn!(conduit = %self.key, %error, "VIPs cannot be set, trying again");
                        failed = true;
                    }
                }
            }
            // What the answer says is compared again: only a context that has everything accepts traffic.
            let settled = !failed && vips.as_ref().is_some_and(|vips| change(&current, vips).is_none());
            if settled {
                backoff.reset();
                self.modify(|view| {
                    view.ready = true;
                    view.dead &= !up;
                });
            }
            tokio::select! {
                () = backoff.wait(), if !settled && vips.is_some() => {}
                _ = wanted.changed() => {}
                _ = status.changed() => {}
            }
            let news = status.borrow_and_update();
            up = news.is_up();
            if let ConnectionStatus::Up(connection) = &*news {
                current = (**connection).clone();
            }
        }
    }

    /// Of a connection that NSM has lost the wire may work all the same: it is asked until the connection is up again.
    async fn doubt(&self) {
        let mut status = self.wire.watch();
        let (mut lost, mut misses) = (None, 0);
        loop {
            match &*status.borrow_and_update() {
                ConnectionStatus::Up(_) => (lost, misses) = (None, 0),
                ConnectionStatus::Down(connection) => lost = Some(connection.clone()),
                // The old branch, on the way to another one: what was lost is not back yet.
                ConnectionStatus::Closed | ConnectionStatus::New => {}
            }
            tokio::select! {
                // News first: once it is up nothing may call it dead any more.
                biased;
                changed = status.changed() => if changed.is_err() { return std::future::pending().await },
                () = self.ask(lost.as_deref(), &mut misses) => {}
            }
        }
    }

    /// Asks the wire again and again, and tells the streams what it says.
    async fn ask(&self, lost: Option<&Connection>, misses: &mut u32) {
        let Some(lost) = lost else { return std::future::pending().await };
        loop {
            sleep(DOWN_PAUSE).await;
            *misses = if self.wire.alive(lost).await { 0 } else { misses.saturating_add(1) };
            if *misses == DOWN_MISSES {
                tracing::warn!(conduit = %self.key, "the connection is lost, and its wire does not work");
            }
            match *misses {
                0 => self.modify(|view| view.dead = false),
                DOWN_MISSES.. => self.modify(|view| view.dead = true),
                _ => {}
            }
        }
    }

    /// Changes the view; streams are told only if it is another one then.
    fn modify(&self, change: impl FnOnce(&mut View)) {
        self.view.send_if_modified(|view| {
            let before = view.clone();
            change(view);
            *view != before
        });
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(FIRST_PAUSE, LONGEST_PAUSE.min(self.shared.settings.grpc_max_backoff.get()))
    }

    /// Gets the connection of an earlier run back or makes a new one, however long it takes.
    async fn establish(&self) -> Connection {
        let (mut backoff, mut attempt) = (self.backoff(), 0);
        let saved = self.shared.store.connection(&self.key);
        loop {
            let found = self.wire.find().await;
            let known = found.as_ref().ok().and_then(Option::as_ref).or(saved.as_ref());
            let alive = self.left(known).await;
            // Without an answer of the manager there is nobody to request from either.
            if let Err(error) = &found {
                tracing::warn!(conduit = %self.key, %error, "the NSM manager does not answer, trying again");
                backoff.wait().await;
                continue;
            }
            let request = wire::recover(&self.shared.settings, &self.key, known, attempt, alive);
            match self.wire.request(request).await {
                Ok(connection) => {
                    tracing::info!(conduit = %self.key, recovered = known.is_some(), "connected");
                    return connection;
                }
                Err(error) => tracing::warn!(conduit = %self.key, %error, attempt, "cannot connect, trying again"),
            }
            attempt += 1;
            backoff.wait().await;
        }
    }

    /// Whether the wire of an earlier run's connection works; while it does, streams keep what is registered.
    async fn left(&self, known: Option<&Connection>) -> bool {
        let working = match known {
            Some(known) if self.wire.alive(known).await => Some(known),
            _ => None,
        };
        let ips = working.map(ips_of).unwrap_or_default();
        self.modify(|view| view.left = ips);
        working.is_some()
    }

    fn publish(&self, connection: &Connection) {
        self.shared.store.set_connection(&self.key, connection);
        let ips = ips_of(connection);
        self.modify(|view| {
            if view.ips != ips {
                tracing::info!(conduit = %self.key, ?ips, "addresses");
                view.ips = ips;
            }
            view.left.clear();
        });
    }
}

fn ips_of(connection: &Connection) -> Vec<String> {
    let ip_context = connection.context.as_ref().and_then(|context| context.ip_context.as_ref());
    ip_context.map(local_ips).unwrap_or_default()
}

/// The request that gives the connection these VIPs; `None` if it has them.
fn change(connection: &Connection, vips: &BTreeSet<IpNet>) -> Option<NetworkServiceRequest> {
    let current = connection.context.as_ref()?.ip_context.as_ref()?;
    let wanted = with_vips(current, vips);
    if wanted == *current {
        return None;
    }
    let mut connection = connection.clone();
    connection.context.get_or_insert_default().ip_context = Some(wanted);
    Some(NetworkServiceRequest { connection: Some(connection), mechanism_preferences: Vec::new() })
}

async fn watch_streams(channel: Channel, key: ConduitKey, view: Arc<watch::Sender<View>>, stop: CancellationToken) {
    let filter = nsp::Stream { conduit: Some(key.to_nsp()), ..nsp::Stream::default() };
    let open = || {
        let (mut client, filter) = (ConfigurationManagerClient::new(channel.clone()), filter.clone());
        async move { client.watch_stream(filter).await }
    };
    watch_loop(format!("streams of {key}"), &stop, open, |response| {
        let streams = Some(view::streams(&response.streams));
        view.send_if_modified(|view| {
            let changed = view.streams != streams;
            view.streams = streams;
            changed
        });
        std::future::ready(())
    })
    .await;
}

/// VIPs of all flows of all streams of the conduit, whether this pod opened them or not.
async fn watch_vips(channel: Channel, key: ConduitKey, vips: watch::Sender<Vips>, stop: CancellationToken) {
    let stream = nsp::Stream { conduit: Some(key.to_nsp()), ..nsp::Stream::default() };
    let filter = nsp::Flow { stream: Some(stream), ..nsp::Flow::default() };
    let open = || {
        let (mut client, filter) = (ConfigurationManagerClient::new(channel.clone()), filter.clone());
        async move { client.watch_flow(filter).await }
    };
    watch_loop(format!("flows of {key}"), &stop, open, |response| {
        let addresses = response.flows.iter().flat_map(|flow| &flow.vips).filter_map(|vip| parse_net(&vip.address));
        let set = Some(addresses.collect());
        vips.send_if_modified(|vips| {
            let changed = *vips != set;
            *vips = set;
            changed
        });
        std::future::ready(())
    })
    .await;
}
