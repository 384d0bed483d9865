//! What was measured, what of it is a failure, as JSON and as a table.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::traffic::Traffic;
use crate::traffic::path::Agreement;

/// Share of the busiest target over the mean must stay below this.
pub const MAX_OVER_MEAN: f64 = 1.10;

/// Of fewer connections or packets the shares say nothing.
const ENOUGH: u64 = 2000;

/// One event under continuous traffic.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Event {
    /// `lb-kill`, `restart-nsp` ...
    pub name: String,
    /// UDP packets without an answer and TCP connections broken that the event must not cost.
    pub lost: u64,
    /// UDP packets sent and TCP connections open during the event.
    pub attempted: u64,
    /// From the event to the sending of the last packet that was lost, either direction; 0 if none was.
    pub recovered_ms: u64,
    /// The same for requests that did not arrive at a target.
    pub ingress_recovered_ms: u64,
    /// The same for answers that did not arrive at the gateway.
    pub egress_recovered_ms: u64,
    /// TCP connections that went to another target because their own was closed, or a new one opened.
    pub moved: u64,
    /// UDP packets lost that belong to the target which was closed.
    pub own_lost: u64,
    /// TCP connections broken without a reason that the event gives.
    pub broken: u64,
    /// Longest TCP exchange over a second; 0 if there was none.
    pub longest_stall_ms: u64,
    /// From the event until the trench was whole again.
    pub whole_ms: u64,
    /// Each criterion that does not hold, one line.
    pub failures: Vec<String>,
    /// Where packets were lost that should not have been: what the components logged at that time.
    pub log: Vec<String>,
}

/// Durations, milliseconds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Timings {
    /// From the start of the first namespace until every target answers through every load balancer.
    pub setup: u64,
    /// From `Open` to the first packet answered by the target: median of the repeats.
    pub open_to_first_packet_p50: u64,
    /// The longest of them.
    pub open_to_first_packet_max: u64,
    /// Each of them.
    pub open_to_first_packet: Vec<u64>,
    /// Steps of the start, in order.
    pub steps: Vec<(String, u64)>,
}

/// All of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Whether every criterion holds.
    pub passed: bool,
    /// Counted runs.
    pub traffic: Vec<Traffic>,
    /// Events, in order.
    pub events: Vec<Event>,
    /// Durations.
    pub timings_ms: Timings,
    /// Versions of what took part.
    pub versions: BTreeMap<String, String>,
    /// Bulk transfers: VIP, target, megabit per second.
    pub transfers_mbit: BTreeMap<String, BTreeMap<String, u32>>,
    /// Whether both load balancers choose the same target, by VIP.
    pub agreement: BTreeMap<String, Agreement>,
    /// Frames with a VIP on the primary network.
    pub primary_leaks: u64,
    /// Components that ended by themselves.
    pub exits: Vec<String>,
    /// Each criterion that does not hold, one line.
    pub failures: Vec<String>,
}

impl Report {
    /// Collects the failures of every part, and decides.
    pub fn judge(&mut self, targets: usize) {
        let mut failures = std::mem::take(&mut self.failures);
        for run in &self.traffic {
            failures.extend(faults_of_traffic(run, targets));
        }
        for (vip, agreement) in &self.agreement {
            if agreement.same != agreement.tried {
                let what = agreement.differences.join(", ");
                failures.push(format!(
                    "{vip}: the load balancers agree on {} of {} 5-tuples ({what})",
                    agreement.same, agreement.tried
                ));
            }
        }
        for event in &self.events {
            failures.extend(event.failures.iter().map(|failure| format!("{}: {failure}", event.name)));
        }
        if self.primary_leaks > 0 {
            failures.push(format!("{} frames with a VIP on the primary network", self.primary_leaks));
        }
        failures.extend(self.exits.iter().cloned());
        self.passed = failures.is_empty();
        self.failures = failures;
    }

    /// Writes the JSON.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        }
        let text = serde_json::to_string_pretty(self).context("encode the report")?;
        std::fs::write(path, text + "\n").with_context(|| format!("write {}", path.display()))
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "\n{:<12} {:<6} {:>9} {:>7} {:>9} {:>8} {:>8}  per target",
            "VIP", "proto", "attempted", "failed", "max/mean", "p50 us", "p99 us"
        );
        for run in &self.traffic {
            let shares: Vec<String> = run.per_target.iter().map(|(host, count)| format!("{host} {count}")).collect();
            let _ = writeln!(
                text,
                "{:<12} {:<6} {:>9} {:>7} {:>9.3} {:>8} {:>8}  {}",
                run.vip,
                run.protocol,
                run.attempted,
                run.failed,
                run.max_over_mean,
                run.p50_us,
                run.p99_us,
                shares.join(", ")
            );
        }
        for (vip, speeds) in &self.transfers_mbit {
            let shares: Vec<String> = speeds.iter().map(|(host, speed)| format!("{host} {speed}")).collect();
            let _ = writeln!(text, "1 MB to each target by {vip}, Mbit/s: {}", shares.join(", "));
        }
        for (vip, agreement) in &self.agreement {
            let _ = writeln!(
                text,
                "same target by both load balancers, {vip}: {} of {} 5-tuples",
                agreement.same, agreement.tried
            );
        }
        if !self.events.is_empty() {
            let _ = writeln!(
                text,
                "\n{:<22} {:>6} {:>9} {:>12} {:>11} {:>10} {:>6} {:>8} {:>9}",
                "event",
                "lost",
                "attempted",
                "recovered ms",
                "ingress ms",
                "egress ms",
                "moved",
                "stall ms",
                "whole ms"
            );
        }
        for event in &self.events {
            let _ = writeln!(
                text,
                "{:<22} {:>6} {:>9} {:>12} {:>11} {:>10} {:>6} {:>8} {:>9}  {}",
                event.name,
                event.lost,
                event.attempted,
                event.recovered_ms,
                event.ingress_recovered_ms,
                event.egress_recovered_ms,
                event.moved,
                event.longest_stall_ms,
                event.whole_ms,
                if event.failures.is_empty() { "ok" } else { "FAILED" }
            );
        }
        let timings = &self.timings_ms;
        let _ = writeln!(
            text,
            "\nsetup {} ms; open to first packet: p50 {} ms, max {} ms; frames with a VIP on the primary network: {}",
            timings.setup, timings.open_to_first_packet_p50, timings.open_to_first_packet_max, self.primary_leaks
        );
        text
    }
}

fn faults_of_traffic(run: &Traffic, targets: usize) -> Vec<String> {
    let name = format!("{} to {}", run.protocol, run.vip);
    let mut faults = Vec::new();
    if run.failed > 0 {
        faults.push(format!("{name}: {} of {} failed ({})", run.failed, run.attempted, run.failures.join(", ")));
    }
    if run.per_target.len() != targets {
        faults.push(format!("{name}: {} of {targets} targets answered", run.per_target.len()));
    }
    if run.attempted >= ENOUGH && run.max_over_mean >= MAX_OVER_MEAN {
        faults.push(format!(
            "{name}: the busiest target has {:.3} of the mean, {MAX_OVER_MEAN} is the limit",
            run.max_over_mean
        ));
    }
    if run.split_flows > 0 {
        faults.push(format!("{name}: {} 5-tuples went to more than one target", run.split_flows));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_passes_only_without_any_fault() {
        let good = Traffic {
            vip: "20.0.0.1".into(),
            protocol: "tcp".into(),
            attempted: 2,
            per_target: [("one".into(), 1), ("two".into(), 1)].into(),
            max_over_mean: 1.0,
            ..Traffic::default()
        };
        let mut report = Report { traffic: vec![good.clone()], ..Report::default() };
        report.judge(2);
        assert!(report.passed, "{:?}", report.failures);
        let bad = Traffic { attempted: 5000, failed: 1, max_over_mean: 1.2, split_flows: 3, ..good };
        let event = Event { name: "lb-kill".into(), failures: vec!["2500 ms".into()], ..Event::default() };
        let mut report = Report { traffic: vec![bad], events: vec![event], primary_leaks: 1, ..Report::default() };
        report.judge(3);
        assert_eq!(report.failures.len(), 6, "{:?}", report.failures);
        assert!(report.failures.contains(&"lb-kill: 2500 ms".to_owned()));
    }
}
