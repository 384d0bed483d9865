//! The connection to the next registry: one for all calls, made anew when it broke or when the own SVID was rotated.

use crate::{Call, Context, Element, Error, Events, Next, Object, Query};
use nsm_transport::{Address, Link, Transport};
use std::{sync::Arc, time::Duration};
use tokio::sync::Mutex;
use tonic::Code;

const NAME: &str = "dial";

/// A dialled connection that several chains share (services and endpoints of one registry).
pub struct Dialer {
    transport: Transport,
    address: Address,
    timeout: Duration,
    link: Mutex<Option<Arc<Link>>>,
}

impl Dialer {
    /// Connects to `address` when it is first needed, within `timeout`.
    pub fn new(transport: Transport, address: Address, timeout: Duration) -> Arc<Self> {
        Arc::new(Self { transport, address, timeout, link: Mutex::new(None) })
    }

    /// The connection there is, or a new one.
    pub async fn link(&self) -> Result<Arc<Link>, Error> {
        let mut held = self.link.lock().await;
        if let Some(link) = held.as_ref().filter(|link| link.is_current()) {
            return Ok(link.clone());
        }
        let link = self
            .transport
            .dial(&self.address, self.timeout)
            .await
            .map_err(|cause| Error::new(NAME, self.address.to_string(), cause).with_code(Code::Unavailable))?;
        Ok(held.insert(Arc::new(link)).clone())
    }

    /// Gives up a connection that has failed, unless somebody already did.
    pub async fn drop_link(&self, broken: &Arc<Link>) {
        let mut held = self.link.lock().await;
        if held.as_ref().is_some_and(|link| Arc::ptr_eq(link, broken)) {
            *held = None;
        }
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
        let link = self.0.link().await?;
        ctx.link = Some(link.clone());
        Ok(link)
    }

    async fn judge<R>(&self, link: &Arc<Link>, result: Result<R, Error>) -> Result<R, Error> {
        if let Err(error) = &result
            && Dialer::in_doubt(error.code())
        {
            self.0.drop_link(link).await;
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
        self.judge(&link, result).await
    }

    async fn find(&self, mut call: Call<Query<T>>, next: Next<T>) -> Result<Events<T>, Error> {
        let link = self.connected(&mut call.ctx).await?;
        let result = next.find(call).await;
        let events = self.judge(&link, result).await?;
        let dialer = self.0.clone();
        Ok(Box::pin(futures_util::StreamExt::then(events, move |event| {
            let (dialer, link) = (dialer.clone(), link.clone());
            async move {
                if let Err(error) = &event
                    && Dialer::in_doubt(error.code())
                {
                    dialer.drop_link(&link).await;
                }
                event
            }
        })))
    }

    async fn unregister(&self, mut call: Call<T>, next: Next<T>) -> Result<(), Error> {
        let link = self.connected(&mut call.ctx).await?;
        let result = next.unregister(call).await;
        self.judge(&link, result).await
    }
}
