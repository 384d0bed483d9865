//! Memory that bursts leave behind.
#![allow(unsafe_code)] // SAFETY: one call below, without pointers.

use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Between two looks. One takes some milliseconds, in which other threads wait for memory.
const PERIOD: Duration = Duration::from_secs(10);

/// Gives memory that is free back to the system from time to time, until `stop`. The GNU C library by itself keeps what lies between
/// pieces in use: after a thousand refreshes at a time that was more than was in use.
pub async fn give_back(stop: CancellationToken) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let _ = tokio::task::spawn_blocking(trim).await;
    }
}

/// Whether something was given back.
fn trim() -> bool {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number, and locks what it looks at.
    let given = unsafe { libc::malloc_trim(0) } != 0;
    #[cfg(not(target_env = "gnu"))]
    let given = false;
    given
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
    }

    /// Pieces so small that the library does not map each by itself, every hundredth of them in use.
    #[cfg(target_env = "gnu")]
    #[test]
    fn what_is_free_goes_back() {
        const SIZE: usize = 64 << 20;
        let mut pieces: Vec<Vec<u8>> = (0..SIZE / 4096).map(|_| vec![1; 4096]).collect();
        let mut number = 0;
        pieces.retain(|_| {
            number += 1;
            number % 100 == 0
        });
        let kept = resident();
        assert!(trim());
        let left = resident();
        assert!(left + SIZE as u64 / 2 < kept, "{kept} bytes before, {left} after");
        drop(pieces);
    }
}
