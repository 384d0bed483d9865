//! Tries again.

use crate::{CloseCall, Connection, Element, Error, Next, RequestCall};
use std::time::Duration;
use tokio::time::Instant;

/// Repeats a failing operation until the caller's deadline. Stands first in a client chain.
#[derive(Clone, Copy, Debug)]
pub struct Retry {
    /// Pause between tries.
    pub interval: Duration,
    /// Time given to each try.
    pub try_timeout: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self { interval: Duration::from_millis(200), try_timeout: Duration::from_secs(15) }
    }
}

const NAME: &str = "retry";

impl Retry {
    /// Whether to stop: `deadline` comes before the next try.
    async fn pause(&self, deadline: Option<Instant>, error: &Error) -> bool {
        tracing::debug!(%error, "trying again");
        if deadline.is_some_and(|deadline| Instant::now() + self.interval >= deadline) {
            return true;
        }
        tokio::time::sleep(self.interval).await;
        false
    }
}

#[async_trait::async_trait]
impl Element for Retry {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        loop {
            let mut one = call.clone();
            *one.ctx = call.ctx.clone().with_timeout(self.try_timeout);
            match next.request(one).await {
                Ok(connection) => return Ok(connection),
                Err(error) if self.pause(call.ctx.deadline, &error).await => return Err(error),
                Err(_) => {}
            }
        }
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        loop {
            let mut one = call.clone();
            *one.ctx = call.ctx.clone().with_timeout(self.try_timeout);
            match next.close(one).await {
                Ok(()) => return Ok(()),
                Err(error) if self.pause(call.ctx.deadline, &error).await => return Err(error),
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context,
        core::testing::{Spy, request_id},
    };
    use std::sync::{Arc, Mutex};

    /// Succeeds at the third try; remembers the time each try was given.
    #[derive(Default)]
    struct Third(Mutex<Vec<Duration>>);

    impl Third {
        fn attempt(&self, ctx: &Context) -> Result<(), Error> {
            let mut tries = self.0.lock().unwrap();
            tries.push(ctx.time_left().unwrap());
            if tries.len().is_multiple_of(3) { Ok(()) } else { Err(Error::new("third", "", "not yet")) }
        }
    }

    #[async_trait::async_trait]
    impl Element for Third {
        fn name(&self) -> &'static str {
            "third"
        }

        async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
            self.attempt(&call.ctx)?;
            next.request(call).await
        }

        async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
            self.attempt(&call.ctx)?;
            next.close(call).await
        }
    }

    // Conformance 103
    #[tokio::test(start_paused = true)]
    async fn until_success_with_a_deadline_for_each_try() {
        let third = Arc::new(Third::default());
        let chain = Chain::builder().element(Retry::default()).element(third.clone()).build();
        chain.request(request_id("c", Context::new())).await.unwrap();
        crate::core::testing::close(&chain, "c").await.unwrap();
        assert_eq!(*third.0.lock().unwrap(), [Duration::from_secs(15); 6]);
    }

    // Conformance 103
    #[tokio::test(start_paused = true)]
    async fn until_the_callers_deadline() {
        let spy = Arc::new(Spy::default());
        spy.fail_requests(true);
        let chain = Chain::builder().element(Retry::default()).element(spy.clone()).build();
        let ctx = Context::new().with_timeout(Duration::from_secs(1));
        assert!(chain.request(request_id("c", ctx)).await.is_err());
        assert_eq!(spy.requests(), 5);
    }
}
