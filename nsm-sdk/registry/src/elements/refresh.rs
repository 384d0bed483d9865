//! Registers an endpoint again before its registration ends.

use crate::{
    Call, Element, Error, Factory, Next, Object,
    chain::{Table, Task},
};
use nsm_identity::clock;
use std::time::{Duration, SystemTime};

/// A refresh that failed is tried again after this time.
const AGAIN: Duration = Duration::from_secs(1);

/// The element.
#[derive(Default)]
pub struct Refresh {
    timers: Table<Task>,
}

/// At two thirds of the time that is left.
fn delay(end: SystemTime, now: SystemTime) -> Duration {
    end.duration_since(now).unwrap_or_default() * 2 / 3
}

async fn refresh(wait: Duration, name: String, factory: Factory) {
    tokio::time::sleep(wait).await;
    // Success arms the next timer and ends this task.
    while let Err(cause) = factory.register().await {
        tracing::warn!(object = name, %cause, "cannot refresh the registration");
        tokio::time::sleep(AGAIN).await;
    }
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for Refresh {
    fn name(&self) -> &'static str {
        "refresh"
    }

    async fn register(&self, call: Call<T>, next: Next<T>) -> Result<T, Error> {
        let factory = call.ctx.factory.clone();
        let answer = next.register(call).await?;
        if let (Some(factory), Some(end)) = (factory, answer.expiration()) {
            let name = answer.name().to_owned();
            let wait = delay(end, clock::now());
            self.timers.insert(&name, Task::spawn(refresh(wait, name.clone(), factory)));
        }
        Ok(answer)
    }

    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        self.timers.remove(call.message.name());
        next.unregister(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Context, elements::begin::Begin};
    use nsm_proto::registry::NetworkServiceEndpoint;
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    };

    struct Lives(Duration, Arc<AtomicUsize>);

    #[async_trait::async_trait]
    impl Element<NetworkServiceEndpoint> for Lives {
        fn name(&self) -> &'static str {
            "lives"
        }
        async fn register(
            &self,
            mut call: Call<NetworkServiceEndpoint>,
            _: Next<NetworkServiceEndpoint>,
        ) -> Result<NetworkServiceEndpoint, Error> {
            assert_eq!(call.message.expiration_time, None, "each registration computes it anew");
            self.1.fetch_add(1, Ordering::SeqCst);
            call.message.set_expiration(Some(clock::now() + self.0));
            Ok(call.message)
        }
    }

    // Conformance 114
    #[tokio::test(start_paused = true)]
    async fn it_registers_again_before_the_end_until_it_is_unregistered() {
        let count = Arc::new(AtomicUsize::new(0));
        let chain = Next::new(vec![
            Arc::new(Begin::new()) as Arc<dyn Element<_>>,
            Arc::new(Refresh::default()),
            Arc::new(Lives(Duration::from_secs(60), count.clone())),
        ]);
        let call = || Call::new(NetworkServiceEndpoint { name: "e".into(), ..Default::default() }, Context::new());
        chain.register(call()).await.unwrap();
        chain.register(call()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(130)).await;
        assert_eq!(count.load(Ordering::SeqCst), 5);
        chain.unregister(call()).await.unwrap();
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert_eq!(count.load(Ordering::SeqCst), 5);
    }
}
