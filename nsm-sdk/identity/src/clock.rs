//! Wall-clock time that follows tokio's clock, so that the end of tokens and registrations can be tested under paused time.

use std::time::SystemTime;
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
