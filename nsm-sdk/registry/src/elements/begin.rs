//! One operation at a time per object, in the order of arrival, each in a task of its own; and their replay.

use crate::{
    Call, Context, Element, Error, Factory, Next, Object,
    chain::{Replay, Table},
};
use std::{sync::Arc, time::Duration};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio_util::sync::CancellationToken;

const NAME: &str = "begin";
/// An unregister without a deadline ends after this time.
const UNREGISTER_TIMEOUT: Duration = Duration::from_secs(15);

/// The element.
pub struct Begin<T> {
    shared: Arc<Shared<T>>,
    /// Whether an unregister of something unknown goes down all the same.
    forward_unknown: bool,
}

struct Shared<T> {
    entries: Table<Arc<Entry<T>>>,
}

struct Entry<T> {
    state: Arc<Mutex<State<T>>>,
    /// Cancelled by an unregister, for every registration that is under way or in the line by then.
    hurry: std::sync::Mutex<CancellationToken>,
}

impl<T> Entry<T> {
    /// What cancels a registration that arrives now.
    fn hurry(&self) -> CancellationToken {
        lock(&self.hurry).clone()
    }

    /// Registrations that are still trying, or have not begun yet, have lost their sense; later ones have not.
    fn leave(&self) {
        std::mem::take(&mut *lock(&self.hurry)).cancel();
    }
}

/// It is this operation's turn.
struct Held<T> {
    entry: Arc<Entry<T>>,
    state: OwnedMutexGuard<State<T>>,
    hurry: CancellationToken,
}

struct State<T> {
    /// The last registration; stays when an unregister has failed, for who tries again.
    registered: Option<Registered<T>>,
    /// The entry left the table: whoever waited for it starts anew.
    replaced: bool,
}

#[derive(Clone)]
struct Registered<T> {
    object: T,
    ctx: Context,
    timeout: Option<Duration>,
    next: Next<T>,
}

impl<T: Object> Begin<T> {
    /// The element for a server, or for endpoints: an unknown object's unregister is passed on.
    pub fn new() -> Self {
        Self { shared: Arc::new(Shared { entries: Table::default() }), forward_unknown: true }
    }

    /// The element for clients of network services: an unknown object's unregister succeeds at once.
    pub fn known_only() -> Self {
        Self { forward_unknown: false, ..Self::new() }
    }
}

impl<T: Object> Default for Begin<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Object> Shared<T> {
    fn entry(&self, name: &str) -> Arc<Entry<T>> {
        self.entries.with(|map| {
            map.entry(name.to_owned())
                .or_insert_with(|| {
                    Arc::new(Entry {
                        state: Arc::new(Mutex::new(State { registered: None, replaced: false })),
                        hurry: Default::default(),
                    })
                })
                .clone()
        })
    }

    /// The object's entry, the sole right to work on it, and what cancels this operation. Waits no longer than `ctx` allows.
    async fn lock(&self, name: &str, ctx: &Context, leaving: bool) -> Result<Held<T>, Error> {
        loop {
            let entry = self.entry(name);
            if leaving {
                entry.leave();
            }
            let hurry = entry.hurry();
            let state = tokio::select! {
                biased;
                state = entry.state.clone().lock_owned() => state,
                () = ctx.ended() => return Err(Error::deadline(NAME, name, "an earlier operation on it")),
            };
            if !state.replaced {
                return Ok(Held { entry, state, hurry });
            }
        }
    }

    /// Takes the entry out of the table, unless a newer one of that name is there already. The caller holds it.
    fn replace(&self, name: &str, entry: &Arc<Entry<T>>, state: &mut State<T>) {
        state.replaced = true;
        self.entries.with(|map| {
            if map.get(name).is_some_and(|current| Arc::ptr_eq(current, entry)) {
                map.remove(name);
            }
        });
    }

    fn forget(&self, name: &str, entry: &Arc<Entry<T>>, state: &mut State<T>) {
        state.registered = None;
        self.replace(name, entry, state);
    }

    /// Runs a registration; the caller holds the entry.
    async fn run_register(self: Arc<Self>, mut call: Call<T>, next: Next<T>, held: Held<T>) -> Result<T, Error> {
        let Held { entry, mut state, hurry } = held;
        let name = call.message.name().to_owned();
        call.ctx.cancel = Some(hurry);
        call.ctx.factory = Some(self.factory(&name, &entry));
        // A replay starts with the index of now, but with the tokens that the way down added.
        let index = call.ctx.path.as_ref().map(|path| path.get().index);
        let ctx = call.ctx.clone();
        let timeout = ctx.time_left();
        match next.register(call).await {
            Ok(answer) => {
                let mut object = answer.clone();
                object.set_name(name);
                object.set_expiration(None);
                let path = ctx.path.as_ref().map(|path| {
                    let path = path.detached();
                    path.update(|path| path.index = index.unwrap_or(path.index));
                    path
                });
                // The factory would keep itself alive, and descriptors belong to the connection that is going.
                let ctx = Context { path, factory: None, cancel: None, link: None, ..ctx };
                state.registered = Some(Registered { object, ctx, timeout, next });
                Ok(answer)
            }
            Err(error) => {
                if state.registered.is_none() {
                    self.forget(&name, &entry, &mut state);
                }
                Err(error)
            }
        }
    }

    async fn run_unregister(self: Arc<Self>, call: Call<T>, next: Next<T>, held: Held<T>) -> Result<(), Error> {
        let Held { entry, mut state, .. } = held;
        let name = call.message.name().to_owned();
        let call = match &state.registered {
            Some(registered) => Call::new(registered.object.clone(), call.ctx),
            None => call,
        };
        let result = next.unregister(call).await;
        match &result {
            Ok(()) => self.forget(&name, &entry, &mut state),
            Err(_) => self.replace(&name, &entry, &mut state),
        }
        result
    }

    fn factory(self: &Arc<Self>, name: &str, entry: &Arc<Entry<T>>) -> Factory {
        Factory::new(EventFactory { shared: self.clone(), name: name.to_owned(), entry: entry.clone() })
    }
}

fn lock<V>(mutex: &std::sync::Mutex<V>) -> std::sync::MutexGuard<'_, V> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Awaits a task of its own: a caller who leaves does not cut an element between effect and undo.
async fn apart<R: Send + 'static>(
    name: &str,
    work: impl Future<Output = Result<R, Error>> + Send + 'static,
) -> Result<R, Error> {
    let broken = |cause| {
        let text = format_args!("the operation broke off: {cause}").to_string();
        Error::new(NAME, name, text).with_code(tonic::Code::Internal)
    };
    tokio::spawn(work).await.unwrap_or_else(|cause| Err(broken(cause)))
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for Begin<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(&self, call: Call<T>, next: Next<T>) -> Result<T, Error> {
        if call.message.name().is_empty() {
            return Err(Error::new(NAME, "", format_args!("cannot register {} without a name", T::KIND))
                .with_code(tonic::Code::InvalidArgument));
        }
        if call.ctx.factory.is_some() {
            return next.register(call).await;
        }
        let name = call.message.name().to_owned();
        let held = self.shared.lock(&name, &call.ctx, false).await?;
        apart(&name, self.shared.clone().run_register(call, next, held)).await
    }

    async fn unregister(&self, mut call: Call<T>, next: Next<T>) -> Result<(), Error> {
        if call.ctx.factory.is_some() {
            return next.unregister(call).await;
        }
        let name = call.message.name().to_owned();
        if call.ctx.deadline.is_none() {
            call.ctx = call.ctx.with_timeout(UNREGISTER_TIMEOUT);
        }
        let mut held = self.shared.lock(&name, &call.ctx, true).await?;
        if held.state.registered.is_none() && !self.forward_unknown {
            self.shared.forget(&name, &held.entry, &mut held.state);
            return Ok(());
        }
        call.ctx.factory = Some(self.shared.factory(&name, &held.entry));
        apart(&name, self.shared.clone().run_unregister(call, next, held)).await
    }
}

/// Replays what was registered last under one entry: not what somebody registers under the same name after its end.
struct EventFactory<T> {
    shared: Arc<Shared<T>>,
    name: String,
    entry: Arc<Entry<T>>,
}

impl<T: Object> EventFactory<T> {
    /// The last registration as a call, with a deadline counted from now.
    fn call(registered: Registered<T>) -> (Call<T>, Next<T>) {
        let mut ctx = registered.ctx;
        ctx.deadline = registered.timeout.map(|timeout| tokio::time::Instant::now() + timeout);
        ctx.path = ctx.path.map(|path| path.detached());
        (Call::new(registered.object, ctx), registered.next)
    }
}

#[async_trait::async_trait]
impl<T: Object> Replay for EventFactory<T> {
    async fn register(&self) -> Result<(), Error> {
        let (entry, hurry) = (self.entry.clone(), self.entry.hurry());
        let state = tokio::select! {
            biased;
            () = hurry.cancelled() => {
                let text = "given up because it is being unregistered";
                return Err(Error::new(NAME, &self.name, text).with_code(tonic::Code::Cancelled));
            }
            state = entry.state.clone().lock_owned() => state,
        };
        let Some(registered) = state.registered.clone().filter(|_| !state.replaced) else { return Ok(()) };
        let (call, next) = Self::call(registered);
        let held = Held { entry, state, hurry };
        apart(&self.name, self.shared.clone().run_register(call, next, held)).await.map(|_| ())
    }

    async fn unregister(&self) -> Result<(), Error> {
        let (entry, hurry) = (self.entry.clone(), self.entry.hurry());
        let mut state = entry.state.clone().lock_owned().await;
        // An unregister that failed is tried again, unless the name has come back to life since.
        if state.replaced && self.shared.entries.get(&self.name).is_some() {
            state.registered = None;
        }
        let Some(registered) = state.registered.clone() else { return Ok(()) };
        let (mut call, next) = Self::call(registered);
        call.ctx.factory = Some(self.shared.factory(&self.name, &entry));
        let held = Held { entry, state, hurry };
        apart(&self.name, self.shared.clone().run_unregister(call, next, held)).await
    }
}

#[cfg(test)]
mod tests;
