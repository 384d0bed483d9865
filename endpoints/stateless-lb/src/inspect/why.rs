//! `meridio why`: what becomes of a packet, and why.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use meridio_maglev::{Image, Reason, Target, Targets};
use meridio_model::Configuration;

use super::capture;
use super::place::Place;
use super::question::{Packet, Question};
use super::report::{Names, json, text};
use crate::desired::{Desired, configuration};

/// Asks a running load balancer, or a configuration file, about packets.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// The packet in quotes: 'tcp 10.0.0.1:1234 -> 20.0.0.1:4000 [flags syn,ack]', 'udp [2001::1]:5 -> [2000::1]:4000',
    /// 'icmp 10.0.0.1 -> 20.0.0.1 [id 7]', '47 10.0.0.1 -> 20.0.0.1'; each with [ttl N] [size BYTES]
    #[arg(value_name = "PACKET")]
    packet: Vec<String>,
    /// The packets of a capture (pcap, pcapng) instead
    #[arg(long, value_name = "FILE")]
    pcap: Option<PathBuf>,
    /// At most so many packets of the capture
    #[arg(long, default_value_t = 1000)]
    count: usize,
    /// Ask a trench's configuration (the ConfigMap's YAML) instead of a running load balancer
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Conduit of the configuration; not needed if it has only one
    #[arg(long)]
    conduit: Option<String>,
    /// Identifiers that are ready in a stream of the configuration, e.g. stream-a:1,4,7-9; else all are. Can be repeated
    #[arg(long = "targets", value_name = "STREAM:IDENTIFIERS")]
    targets: Vec<String>,
    /// Streams of the configuration whose SCTP packets are spread by their ports alone, as the load balancer was told
    #[arg(long, env = "NSM_SCTP_PORTS_ONLY", value_delimiter = ',', value_name = "STREAMS")]
    sctp_ports_only: Vec<String>,
    /// Show flows for other destinations too
    #[arg(long)]
    all: bool,
    /// Answer as JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

impl Settings {
    /// Every fault, one line each.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = self.place.validate();
        match (&self.pcap, self.packet.is_empty()) {
            (None, true) => faults.push("say a packet, or a capture with --pcap".to_owned()),
            (Some(_), false) => faults.push("a packet and --pcap exclude each other".to_owned()),
            (None, false) => faults.extend(self.question().err()),
            (Some(_), true) => {}
        }
        if self.config.is_none() && (self.conduit.is_some() || !self.targets.is_empty()) {
            faults.push("--conduit and --targets belong to --config".to_owned());
        }
        faults.extend(self.targets.iter().filter_map(|text| identifiers(text).err()));
        faults
    }

    fn question(&self) -> Result<Packet, String> {
        Question::parse(&self.packet.join(" "))?.packet()
    }
}

/// What a capture cannot tell.
const SUPER_PACKET: &str = "  unless it is a super-packet, put together by GRO or left to segmentation: captures do not say, and of one the segments' size counts\n";

/// Answers on standard output.
///
/// # Errors
/// No load balancer, no configuration, no capture; each with its name.
pub fn run(settings: &Settings) -> anyhow::Result<()> {
    let packets = match &settings.pcap {
        Some(path) => {
            let (packets, more) = capture::packets(path, settings.count)?;
            if more {
                eprintln!("the first {} packets of the capture only (--count)", settings.count);
            }
            packets
        }
        None => vec![(1, settings.question())],
    };
    let (image, names) = match &settings.config {
        Some(path) => (from_file(path, settings)?, Names { interfaces: None }),
        None => {
            let image = Image::of(&settings.place.open()?)?;
            (image, Names { interfaces: Some(settings.place.interfaces()) })
        }
    };
    for (number, packet) in packets {
        match packet {
            Ok(packet) => {
                let answer = image.explain(&packet.bytes, packet.ethertype);
                let mut said = if settings.json {
                    format!("{}\n", json(&answer, &names))
                } else {
                    text(&answer, &names, settings.all)
                };
                if settings.pcap.is_some() && !settings.json && answer.outcome == Reason::SlowMtu {
                    said.push_str(SUPER_PACKET);
                }
                if !super::say(&said) {
                    return Ok(());
                }
            }
            Err(fault) => eprintln!("meridio: packet {number} {fault}"),
        }
    }
    Ok(())
}

fn from_file(path: &Path, settings: &Settings) -> anyhow::Result<Image> {
    let name = path.display();
    let text = std::fs::read_to_string(path).with_context(|| name.to_string())?;
    let parsed = Configuration::parse_with_warnings(&text);
    let (configuration, left_out) = parsed.map_err(|faults| anyhow::anyhow!("{name}: {faults}"))?;
    for warning in left_out {
        eprintln!("meridio: {name}: {warning}");
    }
    let conduit = conduit(&configuration, settings.conduit.as_deref()).with_context(|| name.to_string())?;
    let desired = of_conduit(&configuration, &conduit, &settings.sctp_ports_only);
    if !desired.faults.is_empty() {
        bail!("{name}: {}", desired.faults.join("; "));
    }
    for note in &desired.notes {
        eprintln!("meridio: {name}: {note}");
    }
    let targets = targets(&desired, &settings.targets)?;
    Image::new(&desired.config, &targets).with_context(|| name.to_string())
}

fn conduit(configuration: &Configuration, wanted: Option<&str>) -> anyhow::Result<String> {
    let known: Vec<&str> = configuration.conduits.iter().map(|c| c.name.as_str()).collect();
    match (wanted, known.as_slice()) {
        (Some(name), _) if known.contains(&name) => Ok(name.to_owned()),
        (Some(name), _) => bail!("there is no conduit {name:?}, only {}", known.join(", ")),
        (None, [only]) => Ok((*only).to_owned()),
        (None, []) => bail!("there is no conduit"),
        (None, _) => bail!("say with --conduit which one is meant: {}", known.join(", ")),
    }
}

/// What the load balancers of a conduit are told.
fn of_conduit(all: &Configuration, conduit: &str, sctp_ports_only: &[String]) -> Desired {
    let mut lists = all.to_nsp();
    let ours = |name: Option<&String>| name.is_some_and(|name| name == conduit);
    lists.conduits.retain(|c| c.name == conduit);
    lists.streams.retain(|s| ours(s.conduit.as_ref().map(|c| &c.name)));
    lists.flows.retain(|f| ours(f.stream.as_ref().and_then(|s| s.conduit.as_ref()).map(|c| &c.name)));
    configuration(&lists.vips, &lists.conduits, &lists.streams, &lists.flows, sctp_ports_only)
}

/// Ready targets as told, else all.
fn targets(desired: &Desired, told: &[String]) -> anyhow::Result<BTreeMap<String, Targets>> {
    let mut chosen = BTreeMap::new();
    for text in told {
        let (stream, ids) = identifiers(text).map_err(anyhow::Error::msg)?;
        let Some(known) = desired.config.streams.iter().find(|s| s.name == stream) else {
            bail!("--targets {text}: the conduit has no stream {stream:?}");
        };
        if let Some(id) = ids.iter().find(|id| **id > known.max_targets) {
            bail!("--targets {text}: identifier {id} is not in 1..{}", known.max_targets);
        }
        chosen.entry(stream).or_insert_with(Vec::new).extend(ids);
    }
    // Next hops are not known here; that there is one of each family is what "ready" stands for.
    let hop =
        Target { v4: Some((Ipv4Addr::UNSPECIFIED, 1)), v6: Some((Ipv6Addr::UNSPECIFIED, 1)), mtu: 0, direct: false };
    let streams = desired.config.streams.iter().map(|stream| {
        let ids = chosen.remove(&stream.name).unwrap_or_else(|| (1..=stream.max_targets).collect());
        (stream.name.clone(), ids.into_iter().map(|id| (id, hop)).collect())
    });
    Ok(streams.collect())
}

/// Reads `stream:1,4,7-9`; `stream:` is a stream without a ready target.
fn identifiers(text: &str) -> Result<(String, Vec<u32>), String> {
    const MOST: u32 = meridio_model::MAX_TARGETS_LIMIT;
    let fault = || format!("--targets {text:?} is not of the form stream-a:1,4,7-9 (identifiers from 1 to {MOST})");
    let (stream, list) = text.split_once(':').filter(|(stream, _)| !stream.is_empty()).ok_or_else(fault)?;
    let number = |t: &str| t.trim().parse::<u32>().ok().filter(|n| (1..=MOST).contains(n)).ok_or_else(fault);
    let mut ids = Vec::new();
    for item in list.split(',').filter(|item| !item.trim().is_empty()) {
        match item.split_once('-') {
            Some((first, last)) if number(first)? <= number(last)? => ids.extend(number(first)?..=number(last)?),
            Some(_) => return Err(fault()),
            None => ids.push(number(item)?),
        }
    }
    Ok((stream.to_owned(), ids))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::cli;
    use crate::namespaces::nat::{NATS, trench};

    #[test]
    fn sctp_streams_are_spread_as_the_load_balancer_was_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let sample = include_str!("../../../../deploy/samples/configuration.yaml");
        std::fs::write(file.path(), sample.replace("- tcp", "- sctp")).unwrap();
        let path = file.path().to_str().unwrap();
        let chosen = |told: &[&str]| -> BTreeSet<u32> {
            let args = [&["--config", path], told].concat();
            let image = from_file(file.path(), &cli::parse(&args)).unwrap();
            let paths = (1..=20).map(|n| format!("sctp 10.0.0.{n}:1234 -> 20.0.0.1:4000"));
            let target = |question: String| {
                let packet = Question::parse(&question).unwrap().packet().unwrap();
                image.explain(&packet.bytes, packet.ethertype).decision.identifier
            };
            paths.map(target).collect()
        };
        assert!(chosen(&[]).len() > 5);
        assert!(chosen(&["--sctp-ports-only", "another"]).len() > 5);
        assert_eq!(chosen(&["--sctp-ports-only", "another,stream-a-i"]).len(), 1, "all paths of an association");
    }

    #[test]
    fn a_configuration_that_translates_ports_says_to_which() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let args = ["--config", file.path().to_str().unwrap()];
        let settings: Settings = cli::parse(&args);
        let names = Names { interfaces: None };
        let asked = |image: &Image, question: &str| {
            let packet = Question::parse(question).unwrap().packet().unwrap();
            let answer = image.explain(&packet.bytes, packet.ethertype);
            let said = text(&answer, &names, false);
            let port = said.lines().find(|line| line.trim_start().starts_with("port")).map(|l| l.trim().to_owned());
            (port, json(&answer, &names)["translated_port"].clone())
        };
        for translated in [true, false] {
            std::fs::write(file.path(), trench(if translated { &NATS } else { &[] })).unwrap();
            let image = from_file(file.path(), &settings).unwrap();
            for ends in ["10.0.0.1:1234 -> 20.0.0.1", "[2001::1]:1234 -> [2000::1]"] {
                for (protocol, port, target_port) in NATS {
                    let question = format!("{protocol} {ends}:{port}");
                    let told = translated.then(|| format!("port     translated to {target_port}"));
                    let value = if translated { target_port.into() } else { serde_json::Value::Null };
                    assert_eq!(asked(&image, &question), (told, value), "{question}");
                }
            }
        }
    }
}
