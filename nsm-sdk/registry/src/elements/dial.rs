//! The connection to the next registry: one for all calls, made anew when it broke or when the own SVID was rotated.

use crate::{Call, Context, Element, Error, Events, Next, Object, Query};
use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use nsm_transport::{Address, Link, Transport};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tonic::Code;

const NAME: &str = "dial";

/// An attempt to connect, and what comes of it: the same for everybody who waits.
type Dialling = Shared<BoxFuture<'static, Result<Arc<Link>, Error>>>;

/// A dialled connection that several chains share (services and endpoints of one registry).
pub struct Dialer {
    transport: Transport,
    address: Address,
    timeout: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    link: Option<Arc<Link>>,
    dialling: Option<Dialling>,
}

impl Dialer {
    /// Connects to `address` when it is first needed, within `timeout`.
    pub fn new(transport: Transport, address: Address, timeout: Duration) -> Arc<Self> {
        Arc::new(Self { transport, address, timeout, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection there is, or a new one: one attempt at a time, whose result is everybody's who waits for it. Nobody waits
    /// longer than `ctx` allows.
    pub async fn link(self: &Arc<Self>, ctx: &Context) -> Result<Arc<Link>, Error> {
        let dialling = {
            let mut state = self.state();
            if let Some(link) = state.link.as_ref().filter(|link| link.is_current()) {
                return Ok(link.clone());
            }
            // One that broke off has a result, but has not taken itself away.
            state.dialling.take_if(|dialling| dialling.peek().is_some());
            state.dialling.get_or_insert_with(|| self.dial()).clone()
        };
        tokio::select! {
            biased;
            result = dialling => result,
            () = ctx.ended() => Err(Error::deadline(NAME, self.address.to_string(), "the connection")),
        }
    }

    /// In a task of its own: callers that leave do not take the attempt from the others. The caller holds the state.
    fn dial(self: &Arc<Self>) -> Dialling {
        let dialer = self.clone();
        let failed = |address: &Address, cause: String| {
            Error::new(NAME, address.to_string(), cause).with_code(Code::Unavailable)
        };
        let task = tokio::spawn(async move {
            let result = dialer.transport.dial(&dialer.address, dialer.timeout).await;
            let result = result.map(Arc::new).map_err(|cause| failed(&dialer.address, cause.to_string()));
            let mut state = dialer.state();
            state.dialling = None;
            if let Ok(link) = &result {
                state.link = Some(link.clone());
            }
            result
        });
        let address = self.address.clone();
        async move { task.await.unwrap_or_else(|cause| Err(failed(&address, cause.to_string()))) }.boxed().shared()
    }

    /// Gives up a connection that has failed, unless somebody already did.
    pub fn drop_link(&self, broken: &Arc<Link>) {
        self.state().link.take_if(|link| Arc::ptr_eq(link, broken));
    }

    /// Failures after which the connection itself is in doubt. A refusal is among them: one of the two identities may have been
    /// rotated since the handshake.
    pub fn in_doubt(code: Code) -> bool {
        matches!(
            code,
            Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Internal | Code::PermissionDenied
        )
    }
}

/// The element.
pub struct Dial(Arc<Dialer>);

impl Dial {
    /// Uses the connection of `dialer`.
    pub fn new(dialer: Arc<Dialer>) -> Self {
        Self(dialer)
    }

    async fn connected(&self, ctx: &mut Context) -> Result<Arc<Link>, Error> {
        let link = self.0.link(ctx).await?;
        ctx.link = Some(link.clone());
        Ok(link)
    }

    fn judge<R>(&self, link: &Arc<Link>, result: Result<R, Error>) -> Result<R, Error> {
        if let Err(error) = &result
            && Dialer::in_doubt(error.code())
        {
            self.0.drop_link(link);
        }
        result
    }
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for Dial {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(&self, mut call: Call<T>, next: Next<T>) -> Result<T, Error> {
        let link = self.connected(&mut call.ctx).await?;
        let result = next.register(call).await;
        self.judge(&link, result)
    }

    async fn find(&self, mut call: Call<Query<T>>, next: Next<T>) -> Result<Events<T>, Error> {
        let link = self.connected(&mut call.ctx).await?;
        let result = next.find(call).await;
        let events = self.judge(&link, result)?;
        let dialer = self.0.clone();
        Ok(Box::pin(futures_util::StreamExt::inspect(events, move |event| {
            if let Err(error) = event
                && Dialer::in_doubt(error.code())
            {
                dialer.drop_link(&link);
            }
        })))
    }

    async fn unregister(&self, mut call: Call<T>, next: Next<T>) -> Result<(), Error> {
        let link = self.connected(&mut call.ctx).await?;
        let result = next.unregister(call).await;
        self.judge(&link, result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_identity::Authority;
    use tokio::{net, time::Instant};

    const SECOND: Duration = Duration::from_secs(1);

    /// Somebody who accepts and says nothing: the handshake does not end.
    async fn silent() -> (net::TcpListener, Arc<Dialer>) {
        let listener = net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = Address::parse(&format!("tcp://{}", listener.local_addr().unwrap())).unwrap();
        let source = Authority::generate("example.org").unwrap().source("/client", 3600 * SECOND).unwrap();
        (listener, Dialer::new(Transport::new(source).unwrap(), address, 3 * SECOND))
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_to_connect_is_everybodys_who_waits_and_nobody_waits_longer_than_its_call() {
        let (listener, dialer) = silent().await;
        let start = Instant::now();
        let call = |timeout| {
            let dialer = dialer.clone();
            async move { (dialer.link(&Context::new().with_timeout(timeout)).await.err().unwrap(), start.elapsed()) }
        };
        let patient = futures_util::future::join_all((0..100).map(|_| call(60 * SECOND)));
        let (patient, (error, after)) = tokio::join!(patient, call(SECOND));
        assert_eq!((error.code(), after), (Code::DeadlineExceeded, SECOND), "{error}");
        for (error, after) in patient {
            assert_eq!(error.code(), Code::Unavailable, "{error}");
            assert!(after < 4 * SECOND, "{after:?}");
        }
        let mut connections = 0;
        while tokio::time::timeout(SECOND, listener.accept()).await.is_ok() {
            connections += 1;
        }
        assert_eq!(connections, 1);
        // The next call tries again.
        let again = start.elapsed();
        let (error, after) = call(60 * SECOND).await;
        assert_eq!(error.code(), Code::Unavailable, "{error}");
        assert!(after - again >= 2 * SECOND, "{:?}", after - again);
    }

    #[tokio::test]
    async fn a_connection_is_shared_until_it_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::parse(&format!("unix://{}", folder.path().join("s").display())).unwrap();
        let listener = nsm_transport::Listener::bind(&address).await.unwrap();
        let stop = tokio_util::sync::CancellationToken::new();
        let routes = tonic::service::Routes::default();
        let ended = stop.clone();
        tokio::spawn(async move { Transport::insecure().serve(vec![listener], routes, ended).await });
        let dialer = Dialer::new(Transport::insecure(), address, 3 * SECOND);
        let links =
            futures_util::future::join_all((0..10).map(|_| async { dialer.link(&Context::new()).await.unwrap() }));
        let links = links.await;
        assert!(links.iter().all(|link| Arc::ptr_eq(link, &links[0])));
        dialer.drop_link(&links[0]);
        let newer = dialer.link(&Context::new()).await.unwrap();
        assert!(!Arc::ptr_eq(&newer, &links[0]));
        // Somebody who notices late takes the new one from nobody.
        dialer.drop_link(&links[0]);
        assert!(Arc::ptr_eq(&newer, &dialer.link(&Context::new()).await.unwrap()));
        stop.cancel();
    }
}
