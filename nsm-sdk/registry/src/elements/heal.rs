//! Registers again what a registry or manager has lost.

use crate::{
    Call, Context, Element, Error, Factory, Next, Object, Query,
    chain::{Table, Task},
};
use futures_util::StreamExt;
use rand::Rng;
use std::time::Duration;
use tokio::time::Instant;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A watch that lived this long shows that all is well again.
const WELL: Duration = Duration::from_secs(10);

/// The element: watches the own name; when the watch ends, or tells that the object is gone, it registers again.
#[derive(Default)]
pub struct Heal {
    watches: Table<Task>,
}

/// Ends when the registry can no longer be trusted to know the object.
async fn watch<T: Object>(template: T, next: &Next<T>) -> Result<(), Error> {
    let name = template.name().to_owned();
    let mut events = next.find(Call::new(Query::watch(template), Context::new())).await?;
    while let Some(event) = events.next().await {
        let event = event?;
        if event.deleted && event.object.name() == name {
            tracing::warn!(object = name, "the registry has forgotten it");
            return Ok(());
        }
    }
    Ok(())
}

async fn keep<T: Object>(template: T, next: Next<T>, factory: Factory) {
    let mut pause = FIRST_PAUSE;
    loop {
        let opened = Instant::now();
        if let Err(cause) = watch(template.clone(), &next).await {
            tracing::info!(object = template.name(), %cause, "lost sight of the registration");
        }
        if opened.elapsed() > WELL {
            pause = FIRST_PAUSE;
        }
        loop {
            // Not all endpoints of a node at the same instant.
            let wait = pause.mul_f64(rand::rng().random_range(0.75..1.25));
            tokio::time::sleep(wait).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            match factory.register().await {
                Ok(()) => break,
                Err(cause) => tracing::warn!(object = template.name(), %cause, "cannot register again"),
            }
        }
        tracing::info!(object = template.name(), "registered again");
    }
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for Heal {
    fn name(&self) -> &'static str {
        "heal"
    }

    async fn register(&self, call: Call<T>, next: Next<T>) -> Result<T, Error> {
        let factory = call.ctx.factory.clone();
        let below = next.clone();
        let answer = next.register(call).await?;
        if let Some(factory) = factory {
            let mut template = T::default();
            template.set_name(answer.name().to_owned());
            self.watches.with(|map| {
                // A watch that runs goes on: it may be what has called.
                if map.get(answer.name()).is_none_or(Task::is_finished) {
                    map.insert(answer.name().to_owned(), Task::spawn(keep(template, below, factory)));
                }
            });
        }
        Ok(answer)
    }

    async fn unregister(&self, call: Call<T>, next: Next<T>) -> Result<(), Error> {
        self.watches.remove(call.message.name());
        next.unregister(call).await
    }
}
