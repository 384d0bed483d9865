//! Counters for Prometheus, under the names of Meridio 1.2 and some of our own. Read from the kernel at each scrape.

use std::collections::HashMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use meridio_common::{Backoff, Health, MetricsServer};
use meridio_maglev::{Counters, Live, TargetEntry};
use nsm_kernel::Netns;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, prometheus_text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::settings::Settings;

/// Key of the remark in the health report.
const NOTE: &str = "metrics";

/// Serves metrics until `stop`; a port in use is tried again, and forwarding does not depend on it.
pub(crate) async fn run(settings: Settings, netns: Netns, health: Health, stop: CancellationToken) {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    loop {
        let fault = match MetricsServer::bind(settings.metrics_port).await {
            Ok(server) => {
                health.note(NOTE, Vec::new());
                tracing::info!(address = %server.address(), "metrics");
                let source = Source::new(&settings, netns.clone());
                let render = move || {
                    let source = source.clone();
                    async move { source.text().await }
                };
                server.serve(render, stop.clone()).await.err()
            }
            Err(error) => Some(error),
        };
        if let Some(fault) = fault {
            tracing::error!(%fault, "no metrics");
            health.note(NOTE, vec![fault.to_string()]);
        }
        if stop.run_until_cancelled(backoff.wait()).await.is_none() || stop.is_cancelled() {
            return;
        }
    }
}

/// Where the figures come from.
#[derive(Clone, Debug)]
struct Source {
    bpf_dir: PathBuf,
    prefix: String,
    external: String,
    netns: Netns,
    common: Vec<(&'static str, String)>,
}

/// One interface of the NSM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Interface {
    name: String,
    mac: String,
    ips: Vec<String>,
    /// In the order of [`INTERFACE`].
    statistics: [u64; 8],
}

/// Names, and columns of `/proc/net/dev`.
const INTERFACE: [(&str, &str, usize); 8] = [
    ("meridio_interface_rx_packets", "Packets received by an NSM interface", 1),
    ("meridio_interface_tx_packets", "Packets sent by an NSM interface", 9),
    ("meridio_interface_rx_bytes", "Bytes received by an NSM interface", 0),
    ("meridio_interface_tx_bytes", "Bytes sent by an NSM interface", 8),
    ("meridio_interface_rx_errors", "Errors of an NSM interface on receiving", 2),
    ("meridio_interface_tx_errors", "Errors of an NSM interface on sending", 10),
    ("meridio_interface_rx_dropped", "Packets that an NSM interface dropped on receiving", 3),
    ("meridio_interface_tx_dropped", "Packets that an NSM interface dropped on sending", 11),
];

impl Source {
    fn new(settings: &Settings, netns: Netns) -> Self {
        Source {
            bpf_dir: settings.bpf_dir.clone(),
            prefix: settings.interface_prefix(),
            external: settings.external_interface.clone(),
            netns,
            common: vec![("trench", settings.trench_name.clone()), ("conduit", settings.conduit_name.clone())],
        }
    }

    async fn text(&self) -> Result<String, String> {
        let bpf_dir = self.bpf_dir.clone();
        let read = tokio::task::spawn_blocking(move || counters(&bpf_dir)).await.map_err(|e| e.to_string())?;
        let mut families = families(&read?, &self.common);
        let interfaces = self.interfaces().await.map_err(|e| format!("interfaces: {e}"))?;
        families.extend(interface_families(&interfaces, &self.common));
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Families(families)));
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry).map_err(|e| e.to_string())?;
        Ok(text)
    }

    async fn interfaces(&self) -> Result<Vec<Interface>, String> {
        let netlink = self.netns.netlink().await.map_err(|e| e.to_string())?;
        let links = netlink.links().await.map_err(|e| e.to_string())?;
        let addresses = netlink.addresses(None).await.map_err(|e| e.to_string())?;
        // This process lives in the pod's network namespace, and so does what its /proc shows.
        let table = tokio::fs::read_to_string("/proc/net/dev").await.map_err(|e| e.to_string())?;
        let statistics = statistics(&table);
        let ours = links.into_iter().filter(|l| l.name.starts_with(&self.prefix) && l.name != self.external);
        let interface = |link: nsm_kernel::netlink::Link| Interface {
            mac: link.mac.map(|mac| mac.to_string()).unwrap_or_default(),
            ips: addresses.iter().filter(|a| a.index == link.index && a.global).map(|a| a.net.to_string()).collect(),
            statistics: statistics.get(&link.name).copied().unwrap_or_default(),
            name: link.name,
        };
        Ok(ours.map(interface).collect())
    }
}

fn counters(bpf_dir: &Path) -> Result<Counters, String> {
    let live = meridio_maglev::own_directory(bpf_dir).and_then(|directory| Live::open(&directory));
    live.and_then(|live| live.counters()).map_err(|e| e.to_string())
}

/// Statistics of each interface from the text of `/proc/net/dev`, in the order of [`INTERFACE`].
fn statistics(table: &str) -> HashMap<String, [u64; 8]> {
    let line = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let columns: Vec<u64> = rest.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let mut values = [0; 8];
        for (value, (_, _, column)) in values.iter_mut().zip(INTERFACE) {
            *value = *columns.get(column)?;
        }
        Some((name.trim().to_owned(), values))
    };
    table.lines().filter_map(line).collect()
}

type Labels = Vec<(&'static str, String)>;

/// One metric with all its label sets.
#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    samples: Vec<(Labels, u64)>,
}

#[derive(Debug)]
struct Families(Vec<Family>);

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for family in &self.0 {
            let mut metric = encoder.encode_descriptor(family.name, family.help, None, MetricType::Counter)?;
            for (labels, value) in &family.samples {
                ConstCounter::new(*value).encode(metric.encode_family(labels)?)?;
            }
        }
        Ok(())
    }
}

fn with(common: &Labels, own: &[(&'static str, &str)]) -> Labels {
    common.iter().cloned().chain(own.iter().map(|(key, value)| (*key, (*value).to_owned()))).collect()
}

fn target_ips(target: &TargetEntry) -> String {
    let v4 = (target.ifindex4 != 0).then(|| Ipv4Addr::from(target.v4).to_string());
    let v6 = (target.ifindex6 != 0).then(|| Ipv6Addr::from(target.v6).to_string());
    v4.into_iter().chain(v6).collect::<Vec<_>>().join(",")
}

fn families(counters: &Counters, common: &Labels) -> Vec<Family> {
    let flow = |f: &meridio_maglev::Hits| with(common, &[("stream", &f.stream), ("flow", &f.name)]);
    let target = |t: &meridio_maglev::Hits| {
        let (mark, ips) = (t.mark.to_string(), target_ips(&t.target));
        with(common, &[("stream", &t.stream), ("identifier", &mark), ("target_ips", &ips)])
    };
    let stream = |s: &meridio_maglev::StreamHits| with(common, &[("stream", &s.stream)]);
    let reason = |r: meridio_maglev::Reason| with(common, &[("reason", r.name())]);
    let drops = counters.streams.iter().flat_map(|s| {
        let labels = |r: &meridio_maglev::Reason| with(common, &[("stream", &s.stream), ("reason", r.name())]);
        s.dropped.iter().map(move |(r, c)| (labels(r), c.packets)).collect::<Vec<_>>()
    });
    let family = |name, help, samples| Family { name, help, samples };
    vec![
        family(
            "meridio_conduit_stream_flow_matches",
            "Packets that matched a flow",
            counters.flows.iter().map(|f| (flow(f), f.counter.packets)).collect(),
        ),
        family(
            "meridio_conduit_stream_flow_matches_bytes",
            "Bytes of packets that matched a flow",
            counters.flows.iter().map(|f| (flow(f), f.counter.bytes)).collect(),
        ),
        family(
            "meridio_conduit_stream_flow_drops",
            "Packets that matched a flow and were dropped",
            counters.flows.iter().map(|f| (flow(f), f.dropped.packets)).collect(),
        ),
        family(
            "meridio_conduit_stream_target_hit_packets",
            "Packets forwarded to a target",
            counters.targets.iter().map(|t| (target(t), t.counter.packets)).collect(),
        ),
        family(
            "meridio_conduit_stream_target_hit_bytes",
            "Bytes forwarded to a target",
            counters.targets.iter().map(|t| (target(t), t.counter.bytes)).collect(),
        ),
        family(
            "meridio_conduit_stream_packets",
            "Packets forwarded to the targets of a stream",
            counters.streams.iter().map(|s| (stream(s), s.forwarded.packets)).collect(),
        ),
        family(
            "meridio_conduit_stream_bytes",
            "Bytes forwarded to the targets of a stream",
            counters.streams.iter().map(|s| (stream(s), s.forwarded.bytes)).collect(),
        ),
        family("meridio_conduit_stream_drops", "Packets of a stream that were dropped", drops.collect()),
        family(
            "meridio_conduit_packets",
            "Packets to VIPs by what became of them",
            counters.reasons.iter().map(|(r, c)| (reason(*r), c.packets)).collect(),
        ),
        family(
            "meridio_conduit_bytes",
            "Bytes to VIPs by what became of them",
            counters.reasons.iter().map(|(r, c)| (reason(*r), c.bytes)).collect(),
        ),
    ]
}

fn interface_families(interfaces: &[Interface], common: &Labels) -> Vec<Family> {
    let labels = |i: &Interface| {
        let own = [("interface_name", i.name.as_str()), ("mac_address", &i.mac), ("ips", &i.ips.join(","))];
        with(common, &own)
    };
    let family = |(n, (name, help, _)): (usize, (&'static str, &'static str, usize))| Family {
        name,
        help,
        samples: interfaces.iter().map(|i| (labels(i), i.statistics[n])).collect(),
    };
    INTERFACE.into_iter().enumerate().map(family).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use meridio_maglev::{Counter, Hits, Reason, StreamHits};

    const DEV: &str = "Inter-|   Receive                                                |  Transmit\n \
        face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
        lo:     100       2    0    0    0     0          0         0      100       2    0    0    0     0       0          0\n\
        conduit-a-x:  11 12 13 14 0 0 0 0 21 22 23 24 0 0 0 0\n";

    fn text(families: Vec<Family>) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Families(families)));
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry).unwrap();
        text
    }

    #[test]
    fn names_and_labels_are_those_of_the_original() {
        let counter = |packets, bytes| Counter { packets, bytes };
        let target = TargetEntry { v4: [172, 16, 0, 2], ifindex4: 7, ..TargetEntry::default() };
        let hits = |name: &str, mark, target| Hits {
            stream: "s".into(),
            name: name.into(),
            mark,
            target,
            counter: counter(3, 300),
            dropped: counter(1, 100),
        };
        let counters = Counters {
            flows: vec![hits("f \"1\"", 0, TargetEntry::default())],
            streams: vec![StreamHits {
                stream: "s".into(),
                forwarded: counter(2, 200),
                dropped: vec![(Reason::NoTarget, counter(1, 100))],
            }],
            targets: vec![hits("9", 5009, target)],
            reasons: vec![(Reason::Redirected, counter(2, 200))],
            trace_lost: 0,
        };
        let common = vec![("trench", "t".to_owned()), ("conduit", "c".to_owned())];
        let text = text(families(&counters, &common));
        for line in [
            "# TYPE meridio_conduit_stream_flow_matches_total counter",
            "meridio_conduit_stream_flow_matches_total{trench=\"t\",conduit=\"c\",stream=\"s\",flow=\"f \\\"1\\\"\"} 3",
            "meridio_conduit_stream_flow_drops_total{trench=\"t\",conduit=\"c\",stream=\"s\",flow=\"f \\\"1\\\"\"} 1",
            "meridio_conduit_stream_target_hit_packets_total{trench=\"t\",conduit=\"c\",stream=\"s\",identifier=\"5009\",target_ips=\"172.16.0.2\"} 3",
            "meridio_conduit_stream_target_hit_bytes_total{trench=\"t\",conduit=\"c\",stream=\"s\",identifier=\"5009\",target_ips=\"172.16.0.2\"} 300",
            "meridio_conduit_stream_packets_total{trench=\"t\",conduit=\"c\",stream=\"s\"} 2",
            "meridio_conduit_stream_drops_total{trench=\"t\",conduit=\"c\",stream=\"s\",reason=\"no-target\"} 1",
            "meridio_conduit_packets_total{trench=\"t\",conduit=\"c\",reason=\"redirected\"} 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\nis not in\n{text}");
        }
    }

    #[test]
    fn interfaces_have_the_kernels_statistics() {
        let read = statistics(DEV);
        assert_eq!(read.len(), 2);
        assert_eq!(read["conduit-a-x"], [12, 22, 11, 21, 13, 23, 14, 24]);
        assert!(statistics("conduit-a-x: 1 2 3\n").is_empty(), "a line that is cut off");
        let interface = Interface {
            name: "conduit-a-x".into(),
            mac: "02:00:00:00:00:01".into(),
            ips: vec!["172.16.0.1/24".into(), "fd00::1/64".into()],
            statistics: read["conduit-a-x"],
        };
        let text = text(interface_families(&[interface], &vec![("trench", "t".to_owned())]));
        let labels = "{trench=\"t\",interface_name=\"conduit-a-x\",mac_address=\"02:00:00:00:00:01\",ips=\"172.16.0.1/24,fd00::1/64\"}";
        assert!(text.contains(&format!("meridio_interface_tx_dropped_total{labels} 24\n")), "{text}");
        assert!(text.contains(&format!("meridio_interface_rx_bytes_total{labels} 11\n")), "{text}");
    }
}
