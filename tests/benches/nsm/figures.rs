//! What the bench computes from its measurements.

use serde_json::{Value, json};
use std::time::Duration;

/// Distribution of some times.
#[derive(Clone, Copy)]
pub(crate) struct Latency {
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    pub(crate) longest: Duration,
}

impl Latency {
    pub(crate) fn of(mut times: Vec<Duration>) -> Self {
        times.sort();
        let at = |part: usize| {
            times.get((times.len() * part / 100).min(times.len().saturating_sub(1))).copied().unwrap_or_default()
        };
        Self { p50: at(50), p99: at(99), longest: at(100) }
    }

    pub(crate) fn json(self) -> Value {
        json!({ "p50_ms": ms(self.p50), "p99_ms": ms(self.p99), "max_ms": ms(self.longest) })
    }
}

/// Milliseconds, for people.
pub(crate) fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 100_000.0).round() / 100.0
}

/// MiB, for people.
pub(crate) fn mib(bytes: u64) -> f64 {
    (bytes as f64 / 1024.0 / 1024.0 * 100.0).round() / 100.0
}

/// The aims, as far as this run can say: text, value, whether it holds.
pub(crate) fn aims(result: &Value) -> Vec<(String, bool)> {
    let number = |path: &str| result.pointer(path).and_then(Value::as_f64);
    let mut aims = Vec::new();
    if let Some(p99) = number("/live/ours/request_latency/p99_ms") {
        aims.push((
            format!("p99 of a local Request with kernel work, many live: {p99:.1} ms (at most 50)"),
            p99 <= 50.0,
        ));
    }
    if let (Some(ours), Some(theirs)) =
        (number("/rate/ours/nothing/new_per_s"), number("/rate/other/nothing/new_per_s"))
    {
        let ratio = ours / theirs;
        aims.push((format!("requests/s: {ratio:.1} times the other manager's (at least 5)"), ratio >= 5.0));
    }
    if let (Some(ours), Some(theirs)) =
        (number("/live/ours/resident_mib/live"), number("/live/other/resident_mib/live"))
    {
        // Where the other manager was too slow it has fewer connections to hold: in its favour.
        let ratio = ours / theirs;
        let text = format!(
            "resident memory: {ours:.1} MiB of {theirs:.1} MiB, {ratio:.3} of the other manager's (at most 0.1)"
        );
        aims.push((text, ratio <= 0.1));
    }
    if let Some(left) = result.pointer("/leaks/left").and_then(Value::as_array) {
        aims.push((format!("left after all cycles: {left:?} (nothing)"), left.is_empty()));
    }
    aims
}
