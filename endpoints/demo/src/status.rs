//! Is a trench whole? What is not, in words: processes, readiness, BGP, routes, targets, next hops, and then packets through each load balancer.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures_util::StreamExt as _;
use meridio_ambassador::{Ambassador, StreamName, StreamState};
use meridio_common::health::Report;

use tokio_util::sync::CancellationToken;

use crate::bird;
use crate::cluster::{Cluster, Pod};
use crate::process::Process;
use crate::topology::{Kind, Trench};
use crate::traffic::continuous::Continuous;
use crate::traffic::witness::{self, Arrivals};
use crate::traffic::{Generator, path};

/// Packets that a survey sends through one load balancer to one VIP.
const SURVEY: u16 = 48;

/// Looks at one trench of a cluster, and opens and closes its targets' streams.
#[derive(Debug)]
pub struct Observer {
    /// The cluster.
    pub cluster: Arc<Cluster>,
    /// The trench.
    pub trench: Trench,
    /// Traffic from the trench's gateway.
    pub generator: Arc<Generator>,
    runtime: tokio::runtime::Runtime,
    stop: CancellationToken,
}

impl Observer {
    /// An observer of `trench`, whose waiting ends with `stop`.
    ///
    /// # Errors
    /// If its runtime cannot be started.
    pub fn new(
        cluster: Arc<Cluster>,
        trench: Trench,
        generator: Arc<Generator>,
        stop: CancellationToken,
    ) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        Ok(Observer { cluster, trench, generator, runtime, stop })
    }

    /// Both VIPs.
    pub fn vips(&self) -> [IpAddr; 2] {
        [self.trench.vip4.into(), self.trench.vip6.into()]
    }

    /// All targets of the trench.
    pub fn targets_of_trench(&self) -> BTreeSet<String> {
        self.trench.target_pods().into_iter().collect()
    }

    /// Starts the continuous traffic, with a witness at each target.
    ///
    /// # Errors
    /// If a packet socket is refused.
    pub fn traffic(&self) -> Result<Continuous> {
        let arrivals = Arc::new(Arrivals::default());
        for target in self.trench.target_pods() {
            witness::start(&self.cluster.pod(&target)?.namespace, &arrivals)?;
        }
        Continuous::start(&self.generator, self.vips(), arrivals)
    }

    /// Control socket of the gateway's BIRD.
    pub fn gateway_socket(&self) -> PathBuf {
        self.cluster.directory().join("gateways").join(self.trench.letter.to_string()).join("bird.ctl")
    }

    fn stream(&self) -> StreamName {
        StreamName::new(self.trench.name(), self.trench.conduit(), self.trench.stream())
    }

    fn ambassador(&self, target: &str) -> Result<Ambassador> {
        let socket = self.cluster.ambassador_socket(target);
        // Its channel wants a runtime when it is made.
        let _inside = self.runtime.enter();
        Ambassador::new(&socket.to_string_lossy()).with_context(|| format!("ambassador of {target}"))
    }

    /// Opens the trench's stream on `target`, trying until its TAPA listens. Returns when the call that succeeded was made.
    ///
    /// # Errors
    /// If there is no success within `patience`.
    pub fn open(&self, target: &str, patience: Duration) -> Result<Instant> {
        let deadline = Instant::now() + patience;
        loop {
            let called = Instant::now();
            let outcome = self.runtime.block_on(async {
                let ambassador = self.ambassador(target)?;
                tokio::time::timeout(Duration::from_secs(2), ambassador.open(&self.stream()))
                    .await
                    .context("open: no reply")?
                    .context("open")
            });
            match outcome {
                Ok(()) => return Ok(called),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error.context(format!("open {} on {target}", self.trench.stream())));
                }
                Err(_) => {
                    self.go_on()?;
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    /// Closes the trench's stream on `target`.
    ///
    /// # Errors
    /// If the TAPA refuses or does not reply within 5 s.
    pub fn close(&self, target: &str) -> Result<()> {
        let ambassador = self.ambassador(target)?;
        let call = async { tokio::time::timeout(Duration::from_secs(5), ambassador.close(&self.stream())).await };
        self.runtime
            .block_on(call)
            .context("no reply")?
            .with_context(|| format!("close {} on {target}", self.trench.stream()))
    }

    /// State of the trench's stream on `target`; nothing if it is not open there.
    ///
    /// # Errors
    /// If the TAPA does not answer within a second.
    pub fn stream_state(&self, target: &str) -> Result<Option<StreamState>> {
        let ambassador = self.ambassador(target)?;
        let look = async {
            let mut lists = Box::pin(ambassador.watch(&self.stream()).await?);
            lists.next().await.transpose()
        };
        let limited = async { tokio::time::timeout(Duration::from_secs(1), look).await };
        let list = self.runtime.block_on(limited).context("the TAPA does not answer")??.unwrap_or_default();
        Ok(list.iter().find(|entry| entry.name == self.stream()).map(|entry| entry.state))
    }

    /// What is missing for the trench to be whole with exactly `targets` open; empty if nothing is.
    pub fn missing(&self, targets: &BTreeSet<String>) -> Vec<String> {
        let mut missing = self.components();
        missing.extend(self.gateway());
        missing.extend(self.targets(targets));
        missing.extend(self.next_hops());
        if missing.is_empty() {
            missing.extend(self.survey(targets));
        }
        missing
    }

    /// Waits until nothing is missing. `say` is told what is waited for, when that changes, after the first two seconds.
    ///
    /// # Errors
    /// If something is still missing after `patience`; the message says what.
    pub fn wait_whole(
        &self,
        targets: &BTreeSet<String>,
        patience: Duration,
        say: &mut dyn FnMut(&str),
    ) -> Result<Duration> {
        let start = Instant::now();
        let mut said = Vec::new();
        loop {
            let missing = self.missing(targets);
            if missing.is_empty() {
                return Ok(start.elapsed());
            }
            self.go_on()?;
            if start.elapsed() >= patience {
                bail!("the trench is not whole after {patience:?}: {}", missing.join("; "));
            }
            if start.elapsed() > Duration::from_secs(2) && missing != said {
                say(&format!("waiting for: {}", brief(&missing)));
                said = missing;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Whether there is reason to wait any longer.
    fn go_on(&self) -> Result<()> {
        let refused = self.cluster.refused();
        if self.stop.is_cancelled() {
            bail!("interrupted");
        }
        if !refused.is_empty() {
            bail!("{}", refused.join("; "));
        }
        Ok(())
    }

    fn mine(&self, kind: Kind) -> Vec<Arc<Pod>> {
        let mut pods = self.cluster.pods(kind);
        pods.retain(|pod| pod.plan.trench.is_none_or(|letter| letter == self.trench.letter));
        pods
    }

    fn components(&self) -> Vec<String> {
        let kinds = [Kind::Node, Kind::Service, Kind::LoadBalancer, Kind::Proxy, Kind::Target];
        let pods: Vec<_> = kinds.into_iter().flat_map(|kind| self.mine(kind)).collect();
        pods.iter().flat_map(|pod| &pod.processes).filter_map(|process| unready(process)).collect()
    }

    fn gateway(&self) -> Vec<String> {
        let socket = self.gateway_socket();
        let sessions = match bird::sessions(&socket) {
            Ok(sessions) => sessions,
            Err(error) => return vec![format!("gateway: {error:#}")],
        };
        let down = sessions.iter().filter(|session| !session.established);
        let mut missing: Vec<String> =
            down.map(|session| format!("BGP session {} ({})", session.name, session.info)).collect();
        let up = bird::bfd(&socket).map(|sessions| sessions.iter().filter(|session| session.1).count()).unwrap_or(0);
        if up != sessions.len() {
            missing.push(format!("BFD: {up} of {} sessions up", sessions.len()));
        }
        for vip in self.vips() {
            let count = self.route_next_hops(&self.trench.pod("gateway"), &["show", &vip.to_string()], vip.is_ipv6());
            if count != 2 {
                missing.push(format!("gateway's route to {vip}: {count} of 2 next hops"));
            }
        }
        missing
    }

    /// Number of next hops of the first route that `ip route <args>` shows in `pod`.
    fn route_next_hops(&self, pod: &str, args: &[&str], v6: bool) -> usize {
        let family = if v6 { "-6" } else { "-4" };
        let all: Vec<&str> = ["-j", family, "route"].iter().chain(args).copied().collect();
        let text = self.cluster.pod(pod).and_then(|pod| pod.namespace.output("ip", &all)).unwrap_or_default();
        count_next_hops(&text)
    }

    fn targets(&self, wanted: &BTreeSet<String>) -> Vec<String> {
        let mut missing = Vec::new();
        for target in self.trench.target_pods() {
            let state = match self.stream_state(&target) {
                Ok(state) => state,
                Err(error) => {
                    missing.push(format!("{target}: {error:#}"));
                    continue;
                }
            };
            match (wanted.contains(&target), state) {
                (true, Some(StreamState::Open)) | (false, None) => {}
                (true, state) => missing.push(format!(
                    "{target}'s stream ({})",
                    state.map_or("not asked for", |state| state.as_str_name())
                )),
                (false, Some(_)) => missing.push(format!("{target}'s stream to be closed")),
            }
        }
        missing
    }

    /// Proxies must have both load balancers as next hops of replies.
    fn next_hops(&self) -> Vec<String> {
        let mut missing = Vec::new();
        for pod in self.mine(Kind::Proxy) {
            for v6 in [false, true] {
                let count = self.route_next_hops(&pod.plan.name, &["show", "default", "table", "1"], v6);
                if count != 2 {
                    missing.push(format!(
                        "{}'s {} next hops: {count} of 2",
                        pod.plan.name,
                        if v6 { "IPv6" } else { "IPv4" }
                    ));
                }
            }
        }
        missing
    }

    /// Every target must answer through each load balancer, by both VIPs, without a loss.
    fn survey(&self, targets: &BTreeSet<String>) -> Vec<String> {
        let mut missing = Vec::new();
        for (number, lb) in [(1, "lb-1"), (2, "lb-2")] {
            for vip in self.vips() {
                match self.generator.run(path::survey(vip, number, SURVEY)) {
                    Ok((hosts, 0)) if hosts == *targets => {}
                    Ok((hosts, lost)) => {
                        let silent: Vec<_> = targets.difference(&hosts).cloned().collect();
                        let odd: Vec<_> = hosts.difference(targets).cloned().collect();
                        missing.push(format!(
                            "{vip} through {lb}: {lost} of {SURVEY} lost, silent: {silent:?}, unexpected: {odd:?}"
                        ));
                    }
                    Err(error) => missing.push(format!("{vip} through {lb}: {error:#}")),
                }
            }
        }
        missing
    }
}

/// Why a component is not ready, in words.
fn unready(process: &Process) -> Option<String> {
    let label = process.label();
    let Some(pid) = process.pid() else { return Some(format!("{label} to run")) };
    let path = health_file(process, pid)?;
    let Ok(text) = std::fs::read(&path) else { return Some(format!("{label} to report its health")) };
    let Ok(report) = serde_json::from_slice::<Report>(&text) else {
        return Some(format!("{label}'s health to be readable"));
    };
    if report.pid != pid {
        return Some(format!("{label} to report its health"));
    }
    (!report.ready()).then(|| format!("{label} ({})", report.lines().join(", ")))
}

/// The health report of a component, as seen through its process; components without one have no `HEALTH_SOCKET` that they serve.
fn health_file(process: &Process, pid: u32) -> Option<PathBuf> {
    let served = !matches!(process.plan.name.as_str(), "bird" | "target-app");
    served.then(|| PathBuf::from(format!("/proc/{pid}/root/tmp/health-{}.json", process.plan.name)))
}

/// Next hops of the first non-blackhole route in the output of `ip -j route`.
fn count_next_hops(json: &str) -> usize {
    let routes: Vec<serde_json::Value> = serde_json::from_str(json).unwrap_or_default();
    let usable = routes
        .iter()
        .filter(|route| route.get("type").and_then(|kind| kind.as_str()).is_none_or(|kind| kind == "unicast"));
    let count = |route: &serde_json::Value| match route.get("nexthops").and_then(|hops| hops.as_array()) {
        Some(hops) => hops.len(),
        None => usize::from(route.get("gateway").is_some() || route.get("via").is_some()),
    };
    usable.map(count).max().unwrap_or(0)
}

/// The first few of many, on one line.
fn brief(missing: &[String]) -> String {
    let shown: Vec<&str> = missing.iter().take(4).map(String::as_str).collect();
    let more = missing.len().saturating_sub(shown.len());
    if more == 0 { shown.join("; ") } else { format!("{}; and {more} more", shown.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::count_next_hops;

    #[test]
    fn next_hops_are_counted_without_blackholes() {
        let multipath = r#"[{"dst":"20.0.0.1","nexthops":[{"gateway":"1.1.1.1"},{"gateway":"1.1.1.2"}]},{"type":"blackhole","dst":"default"}]"#;
        assert_eq!(count_next_hops(multipath), 2);
        assert_eq!(count_next_hops(r#"[{"dst":"20.0.0.1","gateway":"1.1.1.1"}]"#), 1);
        assert_eq!(count_next_hops(r#"[{"type":"blackhole","dst":"default"}]"#), 0);
        assert_eq!(count_next_hops(""), 0);
    }
}
