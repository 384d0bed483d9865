//! What the load balancer is meant to reach, and whether this run shows it.

use serde_json::{Map, Value};

/// An aim with the figure of this run, and whether it holds.
pub(crate) struct Aim {
    pub(crate) text: String,
    pub(crate) holds: bool,
}

/// The rows of a part.
fn rows<'a>(parts: &'a Map<String, Value>, part: &str) -> &'a [Value] {
    parts.get(part).and_then(|p| p["rows"].as_array()).map_or(&[], Vec::as_slice)
}

/// A number of the row with a name.
fn figure(rows: &[Value], key: &str, name: &str, number: &str) -> Option<f64> {
    rows.iter().find(|row| row[key] == name)?[number].as_f64()
}

/// The aims, as far as this run can say.
pub(crate) fn aims(parts: &Map<String, Value>) -> Vec<Aim> {
    let mut aims = Vec::new();
    let mut at_least = |what: String, value: Option<f64>, bound: f64| {
        if let Some(value) = value {
            aims.push(Aim { text: format!("{what}: {value:.2} (at least {bound})"), holds: value >= bound });
        }
    };
    const ENDS: [&str; 2] = ["1 flow, 4 targets", "1000 flows, 1000 targets"];
    for (part, version) in [("packets", "IPv4"), ("packets_ipv6", "IPv6")] {
        let rows = rows(parts, part);
        for name in ENDS {
            let ratio = figure(rows, "way", name, "ratio");
            at_least(format!("small packets, {version}, {name}, to kernel forwarding"), ratio, 1.4);
        }
        // The same number of targets: their entries and the table are memory too.
        for targets in [4, 100, 1_000] {
            let of = |flows: &str| figure(rows, "way", &format!("{flows}, {targets} targets"), "ratio");
            for many in [1_000, 2_000] {
                let ratio = of(&format!("{many} flows")).zip(of("1 flow")).map(|(many, one)| many / one);
                at_least(format!("small packets, {version}, {targets} targets, {many} flows to 1"), ratio, 0.9);
            }
        }
    }
    for (part, version) in [("throughput", "IPv4"), ("throughput_ipv6", "IPv6")] {
        for name in ENDS {
            let ratio = figure(rows(parts, part), "way", name, "ratio");
            at_least(format!("TCP throughput, {version}, {name}, to kernel forwarding"), ratio, 0.97);
        }
    }
    let mut at_most = |what: String, value: Option<f64>, unit: &str, bound: f64| {
        if let Some(value) = value {
            aims.push(Aim { text: format!("{what}: {value:.2}{unit} (at most {bound}{unit})"), holds: value <= bound });
        }
    };
    for (part, version) in [("latency", "IPv4"), ("latency_ipv6", "IPv6")] {
        for name in ENDS {
            let ratio = figure(rows(parts, part), "way", name, "p50_ratio");
            at_most(format!("UDP echo at idle, p50, {version}, {name}, to kernel forwarding"), ratio, "", 1.15);
        }
    }
    let program = rows(parts, "program");
    for row in program.iter().filter(|row| row["aim"] == true) {
        let name = row["program"].as_str().unwrap_or_default();
        at_most(format!("program, {name}, to parsing alone"), row["ratio"].as_f64(), "", 4.0);
    }
    for targets in [4, 100, 1_000] {
        let of = |flows| figure(program, "program", &format!("{flows} flows, {targets} targets"), "ratio");
        let ratio = of(2_000).zip(of(10)).map(|(many, few)| many / few);
        at_most(format!("program, {targets} targets, 2000 flows to 10"), ratio, "", 1.1);
    }
    for row in rows(parts, "change") {
        let name = row["change"].as_str().unwrap_or_default();
        let bound = if name.starts_with("1000 ") { 30.0 } else { 20.0 };
        at_most(format!("{name}, median"), row["median_ms"].as_f64(), " ms", bound);
        at_most(format!("{name}, worst"), row["worst_ms"].as_f64(), " ms", bound);
    }
    for row in rows(parts, "tables").iter().filter(|row| row["targets"] == 1_000) {
        let name = row["change"].as_str().unwrap_or_default();
        at_most(format!("table of 1000 targets, {name}"), row["median_ms"].as_f64(), " ms", 10.0);
    }
    aims
}
