//! Repeats requests before a token on the path expires.

use crate::{
    CloseCall, Connection, Element, Error, EventFactory, EventOptions, Key, Next, RequestCall, Side, Task, clock,
};
use std::time::{Duration, SystemTime};
use tokio_util::sync::CancellationToken;

/// Requests again after a part of the shortest life on the path. Only the first process of a path has one.
pub struct Refresh {
    key: Key<Option<Timer>>,
}

struct Timer {
    cancel: CancellationToken,
    _task: Task,
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

const NAME: &str = "refresh";
/// Pause between attempts while a refresh fails.
const RETRY: Duration = Duration::from_millis(200);

/// When to refresh, counted from `now`: a third of the shortest life for a path of one, else a part that grows with
/// the position, so that later hops do not refresh before earlier ones. Lies between 1 ns and the shortest life whatever the next
/// hop has written into the path.
pub fn delay(connection: &Connection, now: SystemTime) -> Duration {
    let Some(path) = connection.path.as_ref().filter(|path| !path.path_segments.is_empty()) else {
        return Duration::from_nanos(1);
    };
    let life = |expires: SystemTime| expires.duration_since(now).unwrap_or_default();
    let expires = path.path_segments.iter().map(|segment| segment.expires.as_ref().map_or(now, clock::from_timestamp));
    let shortest = expires.map(life).min().unwrap_or_default();
    let factor = match path.path_segments.len() {
        1 => 1.0 / 3.0,
        len => 0.2 + 0.2 * (path.index as usize).min(len) as f64 / len as f64,
    };
    shortest.mul_f64(factor).max(Duration::from_nanos(1))
}

impl Default for Refresh {
    fn default() -> Self {
        Self::new()
    }
}

impl Refresh {
    /// An element without timers.
    pub fn new() -> Self {
        Self { key: Key::new(Side::Client) }
    }
}

fn arm(factory: EventFactory, delay: Duration) -> Timer {
    let cancel = CancellationToken::new();
    let options = EventOptions::default().unless(cancel.clone());
    let task = Task::spawn(async move {
        tokio::time::sleep(delay).await;
        // A success replaces this timer, and so ends the loop.
        while let Err(error) = factory.request(options.clone()).await {
            tracing::warn!(id = factory.id(), %error, "refresh failed, trying again");
            tokio::time::sleep(RETRY).await;
        }
    });
    Timer { cancel, _task: task }
}

#[async_trait::async_trait]
impl Element for Refresh {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        let factory = call.ctx.factory.clone();
        let connection = next.request(call).await?;
        if let Some(factory) = factory {
            let timer = arm(factory, delay(&connection, clock::now()));
            drop(metadata.insert(&self.key, Some(timer)));
        }
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        drop(call.ctx.metadata(NAME, call.id())?.remove(&self.key));
        next.close(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context, Path, PathSegment,
        core::testing::{Spy, close, request_id},
        elements::{begin::Begin, metadata::MetadataElement},
    };
    use std::sync::Arc;

    const SECOND: Duration = Duration::from_secs(1);

    fn path(lives: &[Duration], now: SystemTime) -> Path {
        let segment =
            |life: &Duration| PathSegment { expires: Some(clock::to_timestamp(now + *life)), ..Default::default() };
        Path { index: 0, path_segments: lives.iter().map(segment).collect() }
    }

    // Conformance 33
    #[test]
    fn delays() {
        let (now, minute, hour) = (SystemTime::now(), 60 * SECOND, 3600 * SECOND);
        let delay_at = |index: u32, lives: &[Duration]| {
            let path = Path { index, ..path(lives, now) };
            delay(&Connection { path: Some(path), ..Default::default() }, now)
        };
        let near = |a: Duration, b: Duration| a.abs_diff(b) < Duration::from_millis(10);
        assert!(near(delay_at(0, &[hour]), 20 * minute));
        assert!(near(delay_at(1, &[hour, 3 * minute]), 54 * SECOND));
        assert!(near(delay_at(2, &[hour, 5 * SECOND, 3 * minute]), SECOND * 5 / 3));
        let ms = Duration::from_millis;
        assert!(near(delay_at(2, &[ms(200), minute, ms(100), hour]), ms(100) / 3));
        assert_eq!(delay_at(0, &[]), Duration::from_nanos(1));
        assert_eq!(
            delay(
                &Connection {
                    path: Some(Path { index: 0, path_segments: vec![PathSegment::default(); 2] }),
                    ..Default::default()
                },
                now
            ),
            Duration::from_nanos(1)
        );
    }

    proptest::proptest! {
        #[test]
        fn no_path_makes_it_fail(
            index: u32,
            ends in proptest::collection::vec(proptest::option::of((proptest::prelude::any::<i64>(), proptest::prelude::any::<i32>())), 0..6),
        ) {
            let segment = |end: Option<(i64, i32)>| PathSegment {
                expires: end.map(|(seconds, nanos)| prost_types::Timestamp { seconds, nanos }),
                ..Default::default()
            };
            let now = SystemTime::now();
            let lives = ends.iter().map(|end| match end {
                Some((seconds, nanos)) => {
                    let end = clock::from_timestamp(&prost_types::Timestamp { seconds: *seconds, nanos: *nanos });
                    end.duration_since(now).unwrap_or_default()
                }
                None => Duration::ZERO,
            });
            let shortest = lives.min().unwrap_or_default();
            let path = Path { index, path_segments: ends.iter().copied().map(segment).collect() };
            let delay = delay(&Connection { path: Some(path), ..Default::default() }, now);
            assert!(delay >= Duration::from_nanos(1) && delay <= shortest.max(Duration::from_nanos(1)), "{delay:?}");
        }
    }

    /// What the property above does not try by chance.
    #[test]
    fn the_latest_end_of_all_makes_no_trouble() {
        let end = prost_types::Timestamp { seconds: i64::MAX, nanos: 999_999_999 };
        for len in 1..4 {
            let path_segments = vec![PathSegment { expires: Some(end), ..Default::default() }; len];
            let path = Path { index: u32::MAX, path_segments };
            delay(&Connection { path: Some(path), ..Default::default() }, SystemTime::now());
        }
    }

    /// Gives the connection a life of three seconds: refreshed every second.
    struct Life;

    #[async_trait::async_trait]
    impl Element for Life {
        fn name(&self) -> &'static str {
            "life"
        }

        async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
            call.connection_mut().path = Some(path(&[3 * SECOND], clock::now()));
            next.request(call).await
        }
    }

    fn chain() -> (Chain, Arc<Spy>) {
        let spy = Arc::new(Spy::default());
        let chain = Chain::builder()
            .element(Begin::new(Side::Client))
            .element(MetadataElement::new())
            .element(Refresh::new())
            .element(Life)
            .element(spy.clone())
            .build();
        (chain, spy)
    }

    // Conformance 32, 34
    #[tokio::test(start_paused = true)]
    async fn repeats_until_closed_and_again_after_a_new_request() {
        let (chain, spy) = chain();
        for round in 0..2 {
            let before = spy.requests();
            chain.request(request_id("c", Context::new())).await.unwrap();
            tokio::time::sleep(SECOND * 11 / 2).await;
            assert_eq!(spy.requests() - before, 6, "round {round}");
            close(&chain, "c").await.unwrap();
            tokio::time::sleep(10 * SECOND).await;
            assert_eq!(spy.requests() - before, 6, "round {round}");
        }
    }

    // Conformance 34
    #[tokio::test(start_paused = true)]
    async fn a_failed_first_request_is_not_repeated() {
        let (chain, spy) = chain();
        spy.fail_requests(true);
        chain.request(request_id("c", Context::new())).await.unwrap_err();
        tokio::time::sleep(10 * SECOND).await;
        assert_eq!(spy.requests(), 1);
    }

    // Conformance 35
    #[tokio::test(start_paused = true)]
    async fn a_failed_refresh_is_tried_every_200_ms() {
        let (chain, spy) = chain();
        chain.request(request_id("c", Context::new())).await.unwrap();
        spy.fail_requests(true);
        tokio::time::sleep(SECOND * 2 - Duration::from_millis(10)).await;
        assert_eq!(spy.requests(), 6); // at 0, 1.0, 1.2, 1.4, 1.6, 1.8
        spy.fail_requests(false);
        tokio::time::sleep(Duration::from_millis(900)).await;
        assert_eq!(spy.requests(), 7);
    }
}
