//! Traffic from the gateway to the VIPs: counted runs ([`tcp`], [`udp`]), paths through one load balancer ([`path`]), and what flows while
//! events happen ([`continuous`]). Sockets live in the gateway's namespace because the runtime's threads do.

pub mod continuous;
pub mod path;
pub mod sniffer;
pub mod tcp;
pub mod udp;
pub mod witness;

use std::collections::BTreeMap;
use std::future::Future;
use std::net::IpAddr;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::namespace::Namespace;

/// TCP port of the demo's flow.
pub const TCP_PORT: u16 = 4000;

/// UDP port of the demo's flow.
pub const UDP_PORT: u16 = 4003;

/// A tokio runtime whose threads live in the gateway.
#[derive(Debug)]
pub struct Generator {
    runtime: Option<tokio::runtime::Runtime>,
}

impl Generator {
    /// Starts the runtime's threads inside `gateway`.
    ///
    /// # Errors
    /// If threads cannot be started.
    pub fn new(gateway: &Namespace) -> Result<Self> {
        let build = || {
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name("traffic").enable_all().build()
        };
        Ok(Generator { runtime: Some(gateway.run(build)?.context("start the traffic generator")?) })
    }

    /// Runs `work` on a thread of the gateway and waits for it.
    ///
    /// # Errors
    /// If the runtime is shutting down or `work` panicked.
    pub fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T> {
        let runtime = self.runtime.as_ref().context("the traffic generator has ended")?;
        let task = runtime.spawn(work);
        let (result, answer) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            let _ = result.send(task.await);
        });
        answer.recv().context("the traffic generator ended")?.context("a traffic task died")
    }

    /// Handle to start tasks that go on.
    ///
    /// # Errors
    /// If the runtime is shutting down.
    pub fn handle(&self) -> Result<tokio::runtime::Handle> {
        Ok(self.runtime.as_ref().context("the traffic generator has ended")?.handle().clone())
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Outcome of one counted run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Traffic {
    /// VIP that was addressed.
    pub vip: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Connections or packets.
    pub attempted: u64,
    /// Those without a right answer in time.
    pub failed: u64,
    /// Answers by host name.
    pub per_target: BTreeMap<String, u64>,
    /// Share of the busiest target over the mean.
    pub max_over_mean: f64,
    /// Median time to the answer, microseconds.
    pub p50_us: u32,
    /// 99th percentile of it.
    pub p99_us: u32,
    /// 5-tuples whose packets were answered by more than one target.
    pub split_flows: u64,
    /// The first few failures, in words.
    pub failures: Vec<String>,
}

/// What the tasks of a run collect.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) per_target: BTreeMap<String, u64>,
    pub(crate) latencies: Vec<u32>,
    pub(crate) failed: u64,
    pub(crate) split_flows: u64,
    pub(crate) failures: Vec<String>,
}

impl Tally {
    pub(crate) fn success(&mut self, host: String, micros: u128) {
        *self.per_target.entry(host).or_default() += 1;
        self.latencies.push(u32::try_from(micros).unwrap_or(u32::MAX));
    }

    pub(crate) fn failure(&mut self, what: String) {
        self.failed += 1;
        if self.failures.len() < 5 {
            self.failures.push(what);
        }
    }

    pub(crate) fn merge(&mut self, other: Tally) {
        for (host, count) in other.per_target {
            *self.per_target.entry(host).or_default() += count;
        }
        self.latencies.extend(other.latencies);
        self.failed += other.failed;
        self.split_flows += other.split_flows;
        self.failures.extend(other.failures);
        self.failures.truncate(5);
    }

    /// Turns the tally into a result; `targets` is the number of targets that should share the traffic.
    pub(crate) fn finish(mut self, vip: IpAddr, protocol: &str, attempted: u64, targets: usize) -> Traffic {
        self.latencies.sort_unstable();
        let answered: u64 = self.per_target.values().sum();
        let most = self.per_target.values().copied().max().unwrap_or(0);
        let mean = answered as f64 / targets.max(1) as f64;
        Traffic {
            vip: vip.to_string(),
            protocol: protocol.to_owned(),
            attempted,
            failed: self.failed,
            max_over_mean: if mean > 0.0 { (most as f64 / mean * 1000.0).round() / 1000.0 } else { 0.0 },
            p50_us: percentile(&self.latencies, 50),
            p99_us: percentile(&self.latencies, 99),
            per_target: self.per_target,
            split_flows: self.split_flows,
            failures: self.failures,
        }
    }
}

/// The `percent`-th percentile of sorted values; 0 of none.
pub fn percentile(sorted: &[u32], percent: usize) -> u32 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted.get(rank).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let values: Vec<u32> = (1..=200).collect();
        assert_eq!(
            (percentile(&values, 50), percentile(&values, 99), percentile(&[7], 99), percentile(&[], 50)),
            (100, 198, 7, 0)
        );
    }

    #[test]
    fn a_target_without_traffic_counts_in_the_mean() {
        let mut tally = Tally::default();
        (0..30).for_each(|_| tally.success("one".into(), 10));
        (0..30).for_each(|_| tally.success("two".into(), 20));
        let result = tally.finish(IpAddr::from([20, 0, 0, 1]), "tcp", 60, 4);
        assert_eq!((result.max_over_mean, result.p50_us), (2.0, 10));
    }
}
