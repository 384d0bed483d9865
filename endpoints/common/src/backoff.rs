//! Waiting longer after each failure.

use std::time::Duration;

/// Delays that double from `first` to `max`, each with up to a quarter of jitter on top, so that many clients
/// that lost the same server do not come back at the same instant.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    /// Starts at `first`; never waits longer than `max` plus jitter.
    pub fn new(first: Duration, max: Duration) -> Self {
        Self { first, max: max.max(first), next: first }
    }

    /// The same delay each time, with jitter.
    pub fn constant(delay: Duration) -> Self {
        Self::new(delay, delay)
    }

    /// The delay before the next attempt.
    pub fn delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = (delay * 2).min(self.max);
        jitter(delay)
    }

    /// Waits for [`Backoff::delay`].
    pub async fn wait(&mut self) {
        tokio::time::sleep(self.delay()).await;
    }

    /// After a success: the next failure waits for `first` again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// `delay` plus a random part of up to a quarter of it.
fn jitter(delay: Duration) -> Duration {
    delay + delay.mul_f64(rand::random_range(0.0..0.25))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_limit() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(300));
        let delays: Vec<_> = (0..4).map(|_| backoff.delay().as_millis()).collect();
        for (delay, base) in delays.iter().zip([100, 200, 300, 300]) {
            assert!((base..=base * 5 / 4).contains(delay), "{delays:?}");
        }
        backoff.reset();
        assert!(backoff.delay() <= Duration::from_millis(125));
    }
}
