//! Wall-clock time that follows tokio's clock, so that token expiry can be tested under paused time.

use prost_types::Timestamp;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// The wall-clock time now. In a runtime with paused time it advances with that time, not with the machine's.
pub fn now() -> SystemTime {
    let (tokio, machine) = (Instant::now().into_std(), std::time::Instant::now());
    let now = SystemTime::now();
    match tokio.checked_duration_since(machine) {
        Some(ahead) => now + ahead,
        None => now - machine.duration_since(tokio),
    }
}

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
