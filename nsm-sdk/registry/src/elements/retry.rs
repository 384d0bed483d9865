//! Tries again until it works, the caller's time is over, or the object is unregistered.

use crate::{Call, Context, Element, Error, Events, Next, Object, Query};
use std::time::Duration;
use tonic::Code;

const NAME: &str = "retry";

/// The element.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Pause between tries.
    pub interval: Duration,
    /// What one try may take.
    pub try_timeout: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self { interval: Duration::from_millis(200), try_timeout: Duration::from_secs(15) }
    }
}

impl Retry {
    async fn run<R, F: Future<Output = Result<R, Error>>>(
        &self,
        what: &str,
        ctx: &Context,
        attempt: impl Fn(Context) -> F,
    ) -> Result<R, Error> {
        let (mut said, mut cause) = (String::new(), None);
        loop {
            let error = match attempt(ctx.clone().with_timeout(self.try_timeout)).await {
                Ok(result) => return Ok(result),
                Err(error) => error,
            };
            // One line per change, not per try.
            let text = error.to_string();
            if text != said {
                tracing::warn!(object = what, cause = text, "the registry did not take it; trying again");
                said = text;
            }
            tokio::select! {
                biased;
                // A try that the end has cut short says nothing about why the others have failed.
                () = ctx.ended() => return Err(cause.filter(|_| error.code() == Code::DeadlineExceeded).unwrap_or(error)),
                () = tokio::time::sleep(self.interval) => {}
            }
            if error.code() != Code::DeadlineExceeded {
                cause = Some(error);
            }
        }
    }
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for Retry {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(&self, call: Call<T>, next: Next<T>) -> Result<T, Error> {
        let what = call.message.name().to_owned();
        self.run(&what, &call.ctx, |ctx| next.register(Call::new(call.message.clone(), ctx))).await
    }

    async fn find(&self, call: Call<Query<T>>, next: Next<T>) -> Result<Events<T>, Error> {
        let what = call.message.template.name().to_owned();
        self.run(&what, &call.ctx, |ctx| next.find(Call::new(call.message.clone(), ctx))).await
    }

    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        let what = call.message.name().to_owned();
        self.run(&what, &call.ctx, |ctx| next.unregister(Call::new(call.message.clone(), ctx))).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_proto::registry::NetworkService;
    use std::sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    };

    struct Fail(u32, AtomicU32);

    impl Fail {
        fn attempt(&self, ctx: &Context) -> Result<(), Error> {
            assert_eq!(ctx.time_left(), Some(Duration::from_secs(15)));
            match self.1.fetch_add(1, Ordering::SeqCst) {
                tries if tries < self.0 => Err(Error::new("fail", "s", "not yet")),
                _ => Ok(()),
            }
        }
    }

    #[async_trait::async_trait]
    impl Element<NetworkService> for Fail {
        fn name(&self) -> &'static str {
            "fail"
        }
        async fn register(&self, call: Call<NetworkService>, _: Next<NetworkService>) -> Result<NetworkService, Error> {
            self.attempt(&call.ctx)?;
            Ok(call.message)
        }
        async fn find(
            &self,
            call: Call<Query<NetworkService>>,
            next: Next<NetworkService>,
        ) -> Result<Events<NetworkService>, Error> {
            self.attempt(&call.ctx)?;
            next.find(call).await
        }
        async fn unregister(&self, call: Call<NetworkService>, _: Next<NetworkService>) -> Result<(), Error> {
            self.attempt(&call.ctx)
        }
    }

    /// Denied at once, but for the last try, which is cut short.
    struct Denied;

    #[async_trait::async_trait]
    impl Element<NetworkService> for Denied {
        fn name(&self) -> &'static str {
            "denied"
        }
        async fn unregister(&self, call: Call<NetworkService>, _: Next<NetworkService>) -> Result<(), Error> {
            if call.ctx.time_left() < Some(Duration::from_secs(1)) {
                call.ctx.ended().await;
                return Err(Error::deadline("denied", "s", "an answer"));
            }
            Err(Error::new("denied", "s", "no").with_code(Code::PermissionDenied))
        }
    }

    // Conformance 116
    #[tokio::test(start_paused = true)]
    async fn the_cause_is_that_of_a_try_which_had_its_time() {
        let chain = Next::new(vec![Arc::new(Retry::default()) as Arc<dyn Element<_>>, Arc::new(Denied)]);
        let ctx = Context::new().with_timeout(Duration::from_secs(10));
        let error = chain.unregister(Call::new(NetworkService::default(), ctx)).await.unwrap_err();
        assert_eq!(error.code(), Code::PermissionDenied, "{error}");
    }

    // Conformance 116
    #[tokio::test(start_paused = true)]
    async fn it_tries_until_it_works_or_time_is_over() {
        let chain = |tries| {
            Next::new(vec![Arc::new(Retry::default()) as Arc<dyn Element<_>>, Arc::new(Fail(tries, AtomicU32::new(0)))])
        };
        let call = || Call::new(NetworkService::default(), Context::new());
        chain(5).register(call()).await.unwrap();
        chain(5).unregister(call()).await.unwrap();
        assert!(chain(5).list(NetworkService::default(), Context::new()).await.unwrap().is_empty());
        let cancel = tokio_util::sync::CancellationToken::new();
        let ctx = Context { cancel: Some(cancel.clone()), ..Context::new() };
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(60)).await;
            cancel.cancel();
        });
        let endless = chain(u32::MAX);
        assert!(endless.register(Call::new(NetworkService::default(), ctx)).await.is_err());
    }
}
