//! Removes an endpoint that nobody refreshes any more.

use crate::{
    Call, Context, Element, Error, Factory, Next, Object,
    chain::{Table, Task},
    elements::authorize::Owners,
};
use nsm_identity::clock;
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

const NAME: &str = "expire";
/// An unregister at expiry that failed is tried again after this time, then less and less often.
const AGAIN: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// So long after expiry it is given up: no token of the registration lives longer, and whoever is above has expired the entry itself.
const GIVE_UP: Duration = Duration::from_secs(600);

/// What an element below holds for an object, and lets go when nobody can unregister the object any more.
pub trait Forget: Send + Sync + 'static {
    /// Lets go what is held under that name.
    fn forget(&self, name: &str);
}

/// The element. An object lives until the earliest of: its own wish, the caller's token, the own token, the default.
pub struct Expire<T> {
    default: Option<Duration>,
    owners: Arc<Owners<T>>,
    timers: Arc<Table<Task>>,
    /// Who holds something.
    holders: Vec<Arc<dyn Forget>>,
}

impl<T: Object> Expire<T> {
    /// `default` bounds the life of every object; a name that has expired is free in `owners`.
    pub fn new(default: Option<Duration>, owners: Arc<Owners<T>>) -> Self {
        Self { default, owners, timers: Arc::default(), holders: Vec::new() }
    }

    /// An object that could not be unregistered for long is forgotten by `holder`, which stands below.
    #[must_use]
    pub fn holder(mut self, holder: Arc<dyn Forget>) -> Self {
        self.holders.push(holder);
        self
    }

    fn arm(&self, name: &str, at: SystemTime, ctx: &Context) {
        let Some(factory) = ctx.factory.clone() else { return };
        let wait = at.duration_since(clock::now()).unwrap_or_default();
        let (owners, timers, name_) = (self.owners.clone(), Arc::downgrade(&self.timers), name.to_owned());
        let holders = self.holders.clone();
        let timer = Task::spawn(async move {
            tokio::time::sleep(wait).await;
            tracing::info!(object = name_, "nobody has refreshed it: it expires");
            owners.forget(&name_);
            if !unregister(&name_, &factory).await {
                tracing::warn!(object = name_, "given up: what has expired is forgotten here");
                holders.iter().for_each(|holder| holder.forget(&name_));
            }
            if let Some(timers) = timers.upgrade() {
                timers.remove(&name_);
            }
        });
        self.timers.insert(name, timer);
    }
}

/// Tries until it works; `false` if it has not for long.
async fn unregister(name: &str, factory: &Factory) -> bool {
    let (end, mut pause, mut said) = (Instant::now() + GIVE_UP, AGAIN, String::new());
    while let Err(cause) = factory.unregister().await {
        // One line per cause, not per try.
        let text = cause.to_string();
        if text != said {
            tracing::warn!(object = name, cause = text, "cannot unregister what has expired; trying again");
            said = text;
        }
        if Instant::now() >= end {
            return false;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    true
}

/// When an object ends and when its timer fires: before the tokens do, so that the removal is still authorised, by the
/// time an operation may take.
fn schedule(
    wish: Option<SystemTime>,
    tokens: Option<SystemTime>,
    default: Option<SystemTime>,
    margin: Duration,
) -> (Option<SystemTime>, Option<SystemTime>) {
    let earliest = |a: Option<SystemTime>, b: Option<SystemTime>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    };
    let end = earliest(wish, earliest(tokens, default));
    let fire = earliest(end, tokens.and_then(|tokens| tokens.checked_sub(margin)));
    (end, fire)
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for Expire<T> {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(&self, mut call: Call<T>, next: Next<T>) -> Result<T, Error> {
        let ctx = call.ctx.clone();
        let margin = ctx.time_left().unwrap_or_default();
        let now = clock::now();
        let tokens = match (ctx.own_expires, ctx.token.as_ref().map(|token| token.expires)) {
            (Some(own), Some(theirs)) => Some(own.min(theirs)),
            (own, theirs) => own.or(theirs),
        };
        let default = self.default.map(|life| now + life);
        let (end, _) = schedule(call.message.expiration(), tokens, default, margin);
        call.message.set_expiration(end);
        let answer = next.register(call).await?;
        let (_, fire) = schedule(answer.expiration().or(end), tokens, default, margin);
        if let Some(at) = fire {
            self.arm(answer.name(), at, &ctx);
        }
        Ok(answer)
    }

    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        let name = call.message.name().to_owned();
        next.unregister(call).await?;
        // A failed unregister leaves the timer: expiry tries again.
        let timer = self.timers.remove(&name);
        drop(timer);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elements::begin::Begin;
    use nsm_proto::registry::NetworkServiceEndpoint;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Count(Arc<AtomicUsize>);

    #[async_trait::async_trait]
    impl Element<NetworkServiceEndpoint> for Count {
        fn name(&self) -> &'static str {
            "count"
        }
        async fn unregister(
            &self,
            call: Call<NetworkServiceEndpoint>,
            next: Next<NetworkServiceEndpoint>,
        ) -> Result<(), Error> {
            self.0.fetch_add(1, Ordering::SeqCst);
            next.unregister(call).await
        }
    }

    fn endpoint() -> NetworkServiceEndpoint {
        NetworkServiceEndpoint { name: "e".into(), ..Default::default() }
    }

    fn chain(life: Duration) -> (crate::Chain<NetworkServiceEndpoint>, Arc<AtomicUsize>) {
        let count = Arc::new(AtomicUsize::new(0));
        let expire = Expire::new(Some(life), Arc::default());
        (Next::new(vec![Arc::new(Begin::new()), Arc::new(expire), Arc::new(Count(count.clone()))]), count)
    }

    // Conformance 113
    #[test]
    fn the_earliest_of_wish_tokens_and_default_is_the_end() {
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let margin = Duration::from_secs(15);
        assert_eq!(schedule(at(100), at(600), at(60), margin), (at(60), at(60)));
        assert_eq!(schedule(at(30), at(600), at(60), margin), (at(30), at(30)));
        assert_eq!(schedule(None, at(50), at(60), margin), (at(50), at(35)));
        assert_eq!(schedule(None, None, None, margin), (None, None));
    }

    // Conformance 113
    #[tokio::test(start_paused = true)]
    async fn an_object_expires_unless_it_is_refreshed() {
        let (chain, count) = chain(Duration::from_secs(60));
        for _ in 0..200 {
            chain.register(Call::new(endpoint(), Context::new())).await.unwrap();
        }
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_secs(40)).await;
            chain.register(Call::new(endpoint(), Context::new())).await.unwrap();
            assert_eq!(count.load(Ordering::SeqCst), 0);
        }
        tokio::time::sleep(Duration::from_secs(61)).await;
        assert_eq!(count.load(Ordering::SeqCst), 1);
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    // Conformance 113
    #[tokio::test(start_paused = true)]
    async fn an_unregister_stops_the_timer() {
        let (chain, count) = chain(Duration::from_secs(60));
        chain.register(Call::new(endpoint(), Context::new())).await.unwrap();
        chain.unregister(Call::new(endpoint(), Context::new())).await.unwrap();
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    /// Registrations or unregistrations fail on demand.
    #[derive(Default)]
    struct Fails {
        registrations: std::sync::atomic::AtomicBool,
        removals: AtomicUsize,
    }

    #[async_trait::async_trait]
    impl Element<NetworkServiceEndpoint> for Arc<Fails> {
        fn name(&self) -> &'static str {
            "fails"
        }
        async fn register(
            &self,
            call: Call<NetworkServiceEndpoint>,
            next: Next<NetworkServiceEndpoint>,
        ) -> Result<NetworkServiceEndpoint, Error> {
            match self.registrations.load(Ordering::SeqCst) {
                true => Err(Error::new("fails", "e", "told to fail")),
                false => next.register(call).await,
            }
        }
        async fn unregister(
            &self,
            call: Call<NetworkServiceEndpoint>,
            next: Next<NetworkServiceEndpoint>,
        ) -> Result<(), Error> {
            match self.removals.load(Ordering::SeqCst) {
                0 => next.unregister(call).await,
                left => {
                    self.removals.store(left - 1, Ordering::SeqCst);
                    Err(Error::new("fails", "e", "told to fail"))
                }
            }
        }
    }

    fn failing(life: Duration) -> (crate::Chain<NetworkServiceEndpoint>, Arc<Fails>, Arc<AtomicUsize>) {
        let (fails, count) = (Arc::<Fails>::default(), Arc::new(AtomicUsize::new(0)));
        let elements: Vec<Arc<dyn Element<_>>> = vec![
            Arc::new(Begin::new()),
            Arc::new(Expire::new(Some(life), Arc::default())),
            Arc::new(fails.clone()),
            Arc::new(Count(count.clone())),
        ];
        (Next::new(elements), fails, count)
    }

    // Conformance 113
    #[tokio::test(start_paused = true)]
    async fn a_failing_refresh_does_not_prolong_its_life() {
        let (chain, fails, count) = failing(Duration::from_secs(60));
        chain.register(Call::new(endpoint(), Context::new())).await.unwrap();
        fails.registrations.store(true, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_secs(40)).await;
        chain.register(Call::new(endpoint(), Context::new())).await.unwrap_err();
        tokio::time::sleep(Duration::from_secs(21)).await;
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    // Conformance 113
    #[tokio::test(start_paused = true)]
    async fn a_removal_that_fails_is_tried_again() {
        let (chain, fails, count) = failing(Duration::from_secs(60));
        // By hand: it still expires.
        fails.removals.store(1, Ordering::SeqCst);
        chain.register(Call::new(endpoint(), Context::new())).await.unwrap();
        chain.unregister(Call::new(endpoint(), Context::new())).await.unwrap_err();
        assert_eq!(count.load(Ordering::SeqCst), 0);
        tokio::time::sleep(Duration::from_secs(61)).await;
        assert_eq!(count.load(Ordering::SeqCst), 1);
        // By expiry: until it works, however often it has to be tried.
        chain.register(Call::new(endpoint(), Context::new())).await.unwrap();
        fails.removals.store(15, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_secs(60 + 300)).await;
        assert_eq!(count.load(Ordering::SeqCst), 1);
        tokio::time::sleep(Duration::from_secs(100)).await;
        assert_eq!(count.load(Ordering::SeqCst), 2);
        // A name that is registered again in the meantime stays.
        chain.register(Call::new(endpoint(), Context::new())).await.unwrap();
        fails.removals.store(1, Ordering::SeqCst);
        chain.unregister(Call::new(endpoint(), Context::new())).await.unwrap_err();
        chain.register(Call::new(endpoint(), Context::new())).await.unwrap();
        tokio::time::sleep(Duration::from_secs(59)).await;
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }

    #[derive(Default)]
    struct Held(std::sync::Mutex<Vec<String>>);

    impl Forget for Held {
        fn forget(&self, name: &str) {
            self.0.lock().unwrap().push(name.to_owned());
        }
    }

    // Conformance 113
    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_removed_for_long_is_forgotten_unless_it_comes_back() {
        let (fails, held) = (Arc::<Fails>::default(), Arc::<Held>::default());
        let expire = Expire::new(Some(Duration::from_secs(60)), Arc::default()).holder(held.clone());
        let chain =
            Next::new(vec![Arc::new(Begin::new()) as Arc<dyn Element<_>>, Arc::new(expire), Arc::new(fails.clone())]);
        let forgotten = || std::mem::take(&mut *held.0.lock().unwrap());
        let register = || chain.register(Call::new(endpoint(), Context::new()));
        fails.removals.store(usize::MAX, Ordering::SeqCst);
        register().await.unwrap();
        tokio::time::sleep(Duration::from_secs(60 + 590)).await;
        assert!(forgotten().is_empty());
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(forgotten(), ["e"]);
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(forgotten().is_empty());
        // The owner was only cut off: what it registers now is not touched by the end of what was.
        register().await.unwrap();
        tokio::time::sleep(Duration::from_secs(120)).await;
        for _ in 0..100 {
            register().await.unwrap();
            tokio::time::sleep(Duration::from_secs(30)).await;
        }
        assert!(forgotten().is_empty());
    }

    // Conformance 113
    #[tokio::test]
    async fn a_shorter_wish_and_a_shorter_answer_count() {
        let at = |seconds: u64| clock::now() + Duration::from_secs(seconds);
        let (chain, _) = chain(Duration::from_secs(60));
        let mut wish = endpoint();
        wish.set_expiration(Some(at(20)));
        let answer = chain.register(Call::new(wish, Context::new())).await.unwrap().expiration().unwrap();
        assert!(answer <= at(20) && answer > at(15));
        let token = Some(crate::ClientToken { jwt: String::new(), expires: at(10) });
        let ctx = Context { token, own_expires: Some(at(600)), ..Context::new() };
        let answer = chain.register(Call::new(endpoint(), ctx)).await.unwrap().expiration().unwrap();
        assert!(answer <= at(10) && answer > at(5));
    }
}
