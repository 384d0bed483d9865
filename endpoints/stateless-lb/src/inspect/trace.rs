//! `meridio trace`: what becomes of the packets that pass a running load balancer.

use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use ipnet::IpNet;
use meridio_maglev::{Filter, NONE, Protocol, TraceEvent, Tracer};
use tokio_util::sync::CancellationToken;

use super::place::Place;
use super::report::{Names, Traced};

/// How soon the end of a trace is noticed.
const LOOK: Duration = Duration::from_millis(100);
/// Prefixes and port ranges of one kind.
const ALTERNATIVES: usize = 4;

/// Prints what becomes of packets for VIPs, until Ctrl-C, --count or --seconds.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Only these protocols: tcp, udp, sctp, icmp. Can be repeated
    #[arg(long, value_delimiter = ',', value_parser = ["tcp", "udp", "sctp", "icmp"])]
    protocol: Vec<String>,
    /// Only from this address or prefix (an ICMP error counts as from the one whom the quoted packet was sent to). Up to four
    #[arg(long, value_delimiter = ',', value_parser = net)]
    from: Vec<IpNet>,
    /// Only to this address or prefix. Up to four
    #[arg(long, value_delimiter = ',', value_parser = net)]
    to: Vec<IpNet>,
    /// Only from this port or range of ports, e.g. 1000-1999. Up to four
    #[arg(long, value_delimiter = ',', value_parser = ports)]
    source_port: Vec<(u16, u16)>,
    /// Only to this port or range of ports. Up to four
    #[arg(long, value_delimiter = ',', value_parser = ports)]
    port: Vec<(u16, u16)>,
    /// Only packets that are dropped
    #[arg(long)]
    dropped: bool,
    /// End after so many packets
    #[arg(long)]
    count: Option<u64>,
    /// End after so many seconds
    #[arg(long)]
    seconds: Option<u64>,
    /// JSON, one object a line
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

fn net(text: &str) -> Result<IpNet, String> {
    let fault = || "is neither an address nor a prefix".to_owned();
    text.parse().or_else(|_| text.parse::<std::net::IpAddr>().map(IpNet::from)).map_err(|_| fault())
}

fn ports(text: &str) -> Result<(u16, u16), String> {
    let (low, high) = text.split_once('-').unwrap_or((text, text));
    let number = |t: &str| t.trim().parse().map_err(|_| "is neither a port nor a range such as 1000-1999".to_owned());
    let (low, high): (u16, u16) = (number(low)?, number(high)?);
    if low > high { Err("is an empty range".to_owned()) } else { Ok((low, high)) }
}

impl Settings {
    /// Every fault, one line each.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = self.place.validate();
        for (name, length) in [
            ("--from", self.from.len()),
            ("--to", self.to.len()),
            ("--source-port", self.source_port.len()),
            ("--port", self.port.len()),
        ] {
            if length > ALTERNATIVES {
                faults.push(format!("{name} is given {length} times, more than {ALTERNATIVES}"));
            }
        }
        if self.count == Some(0) {
            faults.push("--count 0 traces nothing".to_owned());
        }
        faults
    }

    fn filter(&self) -> Filter {
        Filter {
            protocols: self.protocol.iter().filter_map(|name| Protocol::parse(name)).collect(),
            icmp: self.protocol.iter().any(|name| name == "icmp"),
            sources: self.from.clone(),
            destinations: self.to.clone(),
            source_ports: self.source_port.clone(),
            destination_ports: self.port.clone(),
            only_dropped: self.dropped,
        }
    }
}

/// Traces until it is enough or `stop` is given; the trace is off afterwards.
///
/// # Errors
/// No load balancer is there, or another trace is on.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || follow(&settings, &stop)).await.context("the trace died")?
}

fn follow(settings: &Settings, stop: &CancellationToken) -> anyhow::Result<()> {
    let mut tracer = Tracer::start(settings.place.open()?, &settings.filter())?;
    let clock = Clock::now();
    let names = Names { interfaces: Some(settings.place.interfaces()) };
    let end = settings.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    eprintln!("meridio: tracing{}", if end.is_none() && settings.count.is_none() { ", Ctrl-C ends it" } else { "" });
    let mut seen = 0;
    while !stop.is_cancelled()
        && end.is_none_or(|end| Instant::now() < end)
        && settings.count.is_none_or(|count| seen < count)
    {
        let Some(event) = tracer.next(LOOK)? else { continue };
        seen += 1;
        let line = line(&event, &tracer, &clock, &names, settings.json)?;
        if !super::say(&format!("{line}\n")) {
            break;
        }
    }
    let lost = tracer.lost()?;
    let more = if lost > 0 { format!(", {lost} more were too fast to be told") } else { String::new() };
    eprintln!("meridio: {seen} packets traced{more}");
    Ok(())
}

/// Turns the program's clock into time of day.
struct Clock {
    wall: SystemTime,
    monotonic: u64,
}

impl Clock {
    fn now() -> Self {
        Clock { wall: SystemTime::now(), monotonic: meridio_maglev::monotonic() }
    }

    fn wall(&self, time: u64) -> SystemTime {
        match time.checked_sub(self.monotonic) {
            Some(later) => self.wall + Duration::from_nanos(later),
            None => self.wall - Duration::from_nanos(self.monotonic - time),
        }
    }
}

/// One line about a packet. Names are read each time: flows and streams come and go.
fn line(event: &TraceEvent, tracer: &Tracer, clock: &Clock, names: &Names, json: bool) -> anyhow::Result<String> {
    let live = tracer.live();
    let named = |number: u32, name: &dyn Fn(u32) -> Result<String, meridio_maglev::Error>| {
        if number == NONE {
            return Ok(None);
        }
        // What is gone by now is told by its number.
        name(number).map(|name| Some(if name.is_empty() { format!("#{number}") } else { name }))
    };
    let traced = Traced {
        event,
        time: clock.wall(event.time),
        flow: named(event.counter, &|counter| live.flow_name(counter))?,
        stream: named(event.slot, &|slot| live.stream_name(slot))?,
    };
    Ok(if json { traced.json(names).to_string() } else { traced.text(names) })
}
