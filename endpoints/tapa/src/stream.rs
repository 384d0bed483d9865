//! One open stream: its registration in the NSP.

use crate::{
    board::Board,
    identifier::{self, IDENTIFIER, Step, same_ips},
    names::StreamKey,
    store::Store,
    view::{Gate, Traffic, View},
};
use meridio_common::watch_loop;
use meridio_proto::{
    ambassador::v1::stream_status::Status as Shown,
    nsp::v1::{Target, target, target::Status, target_registry_client::TargetRegistryClient},
};
use std::time::Duration;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

/// Pause after an attempt that failed.
const RETRY: Duration = Duration::from_secs(1);
/// How long a list may take to show what was written before it is believed anyway.
const ECHO: Duration = Duration::from_secs(1);
/// A stream that the configuration does not name keeps its registration that long: an NSP that starts may list nothing at first.
const UNDEFINED_GRACE: Duration = Duration::from_secs(10);
/// One attempt to take back a registration; if it fails the NSP forgets the target by itself.
const UNREGISTER_TIMEOUT: Duration = Duration::from_secs(5);

/// What a stream's loop works with.
pub(crate) struct Stream {
    pub(crate) key: StreamKey,
    pub(crate) registry: TargetRegistryClient<Channel>,
    pub(crate) board: Board,
    pub(crate) store: Store,
    pub(crate) view: watch::Receiver<View>,
    /// Time for one call.
    pub(crate) timeout: Duration,
    /// Time between renewals.
    pub(crate) renewal: Duration,
}

/// What was last written, and is to be seen in a list before the next step.
struct Written {
    step: Option<(u32, Status)>,
    until: Instant,
}

struct State {
    targets: Option<Vec<Target>>,
    /// Addresses that are, or may be, registered.
    ips: Vec<String>,
    identifier: Option<u32>,
    written: Option<Written>,
    renew: Instant,
    undefined_since: Option<Instant>,
    retry: Option<Instant>,
}

impl Stream {
    /// Keeps the stream registered until `stop`, then takes the registration back.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let (lists, mut news) = watch::channel(None);
        let watching = CancellationToken::new();
        let task = tokio::spawn(watch_targets(self.registry.clone(), self.key.clone(), lists, watching.clone()));
        let saved = self.store.stream(&self.key);
        let now = Instant::now();
        let mut state = State {
            targets: None,
            // Nobody knows how long ago an earlier run has renewed what it left.
            renew: if saved.ips.is_empty() { now + self.renewal } else { now },
            ips: saved.ips,
            identifier: saved.identifier,
            written: None,
            undefined_since: None,
            retry: None,
        };
        loop {
            let wake = self.act(&mut state).await;
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep_until(wake) => {}
                changed = self.view.changed() => if changed.is_err() { break },
                changed = news.changed() => {
                    if changed.is_err() { break }
                    state.targets.clone_from(&news.borrow_and_update());
                    self.note_echo(&mut state);
                }
            }
        }
        watching.cancel();
        self.unregister(&mut state).await;
        let _ = task.await;
    }

    /// Once a list shows what was written, the next step may build on it.
    fn note_echo(&self, state: &mut State) {
        let Some(Written { step, .. }) = &state.written else { return };
        let own = state.targets.iter().flatten().find(|target| same_ips(&target.ips, &state.ips));
        let seen = own.and_then(|own| Some((identifier::identifier_of(own)?, own.status())));
        // A target that the NSP did not know is stored DISABLED whatever was asked.
        if seen == *step || matches!((seen, *step), (Some((a, Status::Disabled)), Some((b, _))) if a == b) {
            state.written = None;
        }
    }

    /// One step; returns when to look again if nothing happens before.
    async fn act(&mut self, state: &mut State) -> Instant {
        let now = Instant::now();
        let far = now + self.renewal;
        let gate = self.view.borrow_and_update().gate(&self.key.stream);
        let (ips, max, traffic) = match gate {
            Gate::Wait(status) => return self.wait(state, status, now).await,
            Gate::Go(ips, max, traffic) => (ips, max, traffic),
        };
        state.undefined_since = None;
        if let Some(retry) = state.retry.filter(|retry| *retry > now) {
            return retry;
        }
        state.retry = None;
        if !state.ips.is_empty() && !same_ips(&state.ips, &ips) {
            // A new proxy gave new addresses; the old ones lead nowhere.
            self.unregister(state).await;
        }
        state.ips = ips;
        if let Some(written) = state.written.as_ref().filter(|written| written.until > now) {
            return written.until;
        }
        let Some(targets) = &state.targets else {
            self.board.set(&self.key, traffic.shown());
            return far;
        };
        let pick = |count: usize| rand::random_range(0..count.max(1));
        let step = identifier::decide(&state.ips, targets, max, state.identifier, traffic, pick);
        match self.take(state, step, traffic, now).await {
            Ok(wake) => wake,
            Err(cause) => self.failed(state, &cause),
        }
    }

    /// Returns when to try again.
    fn failed(&self, state: &mut State, cause: &str) -> Instant {
        tracing::warn!(stream = %self.key, cause, "the stream cannot be registered, trying again");
        self.board.set(&self.key, Shown::Unavailable);
        let retry = Instant::now() + RETRY;
        state.retry = Some(retry);
        retry
    }

    async fn take(&mut self, state: &mut State, step: Step, traffic: Traffic, now: Instant) -> Result<Instant, String> {
        match step {
            Step::Full => {
                if state.targets.iter().flatten().any(|target| same_ips(&target.ips, &state.ips)) {
                    self.unregister(state).await;
                }
                Err("no identifier available to register the target".to_owned())
            }
            Step::Register(id, status) => {
                self.board.set(&self.key, traffic.shown());
                self.register(state, id, status).await
            }
            Step::Change(id) => {
                self.board.set(&self.key, traffic.shown());
                let ips = state.ips.clone();
                self.unregister(state).await;
                state.ips = ips;
                self.register(state, id, Status::Disabled).await
            }
            Step::Hold(id) => {
                self.board.set(&self.key, traffic.shown());
                self.renew(state, id, Status::Disabled, now).await
            }
            Step::Done(id) => {
                state.identifier = Some(id);
                self.board.set(&self.key, Shown::Open);
                self.renew(state, id, Status::Enabled, now).await
            }
        }
    }

    async fn renew(&mut self, state: &mut State, id: u32, status: Status, now: Instant) -> Result<Instant, String> {
        if state.renew > now {
            return Ok(state.renew);
        }
        // Whether the stored status is still the one asked for is seen in the list that follows.
        self.register(state, id, status).await
    }

    async fn register(&mut self, state: &mut State, id: u32, status: Status) -> Result<Instant, String> {
        let target = self.target(&state.ips, id, status);
        match timeout(self.timeout, self.registry.register(target)).await {
            Ok(Ok(_)) => {}
            Ok(Err(failed)) => return Err(format!("NSP: {}", failed.message())),
            Err(_) => return Err(format!("NSP: no answer within {:?}", self.timeout)),
        }
        let now = Instant::now();
        if state.identifier != Some(id) {
            tracing::info!(stream = %self.key, identifier = id, "identifier");
        }
        state.identifier = Some(id);
        state.renew = now + self.renewal;
        state.written = Some(Written { step: Some((id, status)), until: now + ECHO });
        self.store.set_registration(&self.key, id, &state.ips);
        // The echo may have come before the answer.
        self.note_echo(state);
        Ok(if state.written.is_some() { now + ECHO } else { now })
    }

    async fn wait(&mut self, state: &mut State, status: Shown, now: Instant) -> Instant {
        self.board.set(&self.key, status);
        if status != Shown::Undefined || state.ips.is_empty() {
            state.undefined_since = None;
            return self.keep(state, now).await;
        }
        let since = *state.undefined_since.get_or_insert(now);
        if now.duration_since(since) >= UNDEFINED_GRACE {
            self.unregister(state).await;
        }
        since + UNDEFINED_GRACE
    }

    /// What an earlier run has left ENABLED is renewed as it is while its wire works: neither that nor the load balancers need the NSM
    /// manager that is waited for.
    async fn keep(&mut self, state: &mut State, now: Instant) -> Instant {
        let works = same_ips(self.view.borrow().working(), &state.ips);
        let listed = state.targets.as_deref().unwrap_or_default();
        let Some(id) = identifier::renewable(&state.ips, listed, state.identifier).filter(|_| works) else {
            return now + self.renewal;
        };
        if let Some(retry) = state.retry.filter(|retry| *retry > now) {
            return retry;
        }
        state.retry = None;
        match self.renew(state, id, Status::Enabled, now).await {
            Ok(_) => state.renew,
            Err(cause) => self.failed(state, &cause),
        }
    }

    async fn unregister(&mut self, state: &mut State) {
        if state.ips.is_empty() {
            return;
        }
        let target = self.target(&state.ips, state.identifier.unwrap_or_default(), Status::Disabled);
        match timeout(UNREGISTER_TIMEOUT.min(self.timeout), self.registry.unregister(target)).await {
            Ok(Ok(_)) => tracing::info!(stream = %self.key, "registration taken back"),
            Ok(Err(failed)) => {
                tracing::warn!(stream = %self.key, cause = failed.message(), "registration left to expire")
            }
            Err(_) => tracing::warn!(stream = %self.key, "registration left to expire: the NSP does not answer"),
        }
        // Until the next list comes: the identifier of what was taken back is free.
        let gone = std::mem::take(&mut state.ips);
        state.targets.iter_mut().for_each(|targets| targets.retain(|target| !same_ips(&target.ips, &gone)));
        state.written = None;
    }

    fn target(&self, ips: &[String], id: u32, status: Status) -> Target {
        Target {
            ips: ips.to_vec(),
            context: [(IDENTIFIER.to_owned(), id.to_string())].into(),
            status: status.into(),
            r#type: target::Type::Default.into(),
            stream: Some(self.key.to_nsp()),
        }
    }
}

async fn watch_targets(
    registry: TargetRegistryClient<Channel>,
    key: StreamKey,
    lists: watch::Sender<Option<Vec<Target>>>,
    stop: CancellationToken,
) {
    let filter = Target {
        status: Status::Any.into(),
        r#type: target::Type::Default.into(),
        stream: Some(key.to_nsp()),
        ..Target::default()
    };
    let open = || {
        let (mut registry, filter) = (registry.clone(), filter.clone());
        async move { registry.watch(filter).await }
    };
    watch_loop(format!("targets of {key}"), &stop, open, |response| {
        lists.send_replace(Some(response.targets));
        std::future::ready(())
    })
    .await;
}
