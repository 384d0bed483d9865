//! Wall-clock time that follows tokio's clock, so that token expiry can be tested under paused time.

use prost_types::Timestamp;
use std::time::{Duration, SystemTime};

pub use nsm_identity::clock::now;

/// How long until `time`; zero if it has passed.
pub fn until(time: SystemTime) -> Duration {
    time.duration_since(now()).unwrap_or_default()
}

/// A protobuf timestamp as a point in time; before 1970 counts as 1970.
pub fn from_timestamp(timestamp: &Timestamp) -> SystemTime {
    let seconds = u64::try_from(timestamp.seconds).unwrap_or(0);
    let nanos = u32::try_from(timestamp.nanos).unwrap_or(0).min(999_999_999);
    SystemTime::UNIX_EPOCH.checked_add(Duration::new(seconds, nanos)).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// The inverse of [`from_timestamp`].
pub fn to_timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    // Conformance 107
    #[tokio::test(start_paused = true)]
    async fn wall_clock_time_follows_paused_time() {
        let (start, second) = (now(), Duration::from_secs(1));
        let near = |a: SystemTime, b: SystemTime| {
            a.duration_since(b).unwrap_or_else(|before| before.duration()) < Duration::from_millis(500)
        };
        assert!(near(start, SystemTime::now()));
        tokio::time::advance(3600 * second).await;
        assert!(near(now(), start + 3600 * second));
        // Timers due in the past, now and later.
        assert_eq!(until(start), Duration::ZERO);
        let before = Instant::now();
        tokio::time::sleep(until(now())).await;
        tokio::time::sleep(until(now() + 60 * second)).await;
        // Timers have a resolution of a millisecond.
        assert!(before.elapsed() < 61 * second && before.elapsed() > 59 * second);
    }

    // Conformance 107
    #[test]
    fn any_timestamp_is_a_time() {
        let at = |seconds, nanos| from_timestamp(&Timestamp { seconds, nanos });
        assert_eq!(at(5, 7), SystemTime::UNIX_EPOCH + Duration::new(5, 7));
        assert_eq!(at(-1, -1), SystemTime::UNIX_EPOCH);
        for seconds in [i64::MIN, 0, i64::MAX] {
            for nanos in [i32::MIN, 0, i32::MAX] {
                assert!(at(seconds, nanos) >= SystemTime::UNIX_EPOCH);
            }
        }
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 5);
        assert_eq!(from_timestamp(&to_timestamp(time)), time);
    }
}
