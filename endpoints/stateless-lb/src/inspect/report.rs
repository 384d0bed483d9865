//! Answers for a person and as JSON.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use meridio_maglev::{Chosen, Explanation, Headers, Kind, Reason, Standing, TargetEntry, TraceEvent, trace_flag};
use serde_json::{Value, json};

/// Where names come from that are not in the tables.
pub(crate) struct Names {
    /// Interfaces by index; `None`: the targets are made up, they have no next hops.
    pub(crate) interfaces: Option<HashMap<u32, String>>,
}

impl Names {
    fn interface(&self, index: u32) -> String {
        let known = self.interfaces.as_ref().and_then(|names| names.get(&index));
        known.cloned().unwrap_or_else(|| format!("interface {index}"))
    }
}

pub(crate) fn protocol(number: u8) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        132 => "sctp".to_owned(),
        other => format!("proto:{other}"),
    }
}

/// The addresses and ports of a packet in one line.
fn line(kind: Kind, number: u8, (src, sport): (IpAddr, u16), (dst, dport): (IpAddr, u16)) -> String {
    let name = protocol(number);
    let with_port = |ip: IpAddr, port: u16| std::net::SocketAddr::new(ip, port).to_string();
    match kind {
        Kind::Ports => format!("{name} {} -> {}", with_port(src, sport), with_port(dst, dport)),
        Kind::Ping => format!("{name} {src} -> {dst} id {sport}"),
        Kind::LaterFragment => format!("{name} {src} -> {dst}, a later fragment"),
        Kind::Other | Kind::Local => format!("{name} {src} -> {dst}"),
    }
}

fn packet_line(h: &Headers) -> String {
    let Some(quoted) = h.quoted_to else { return line(h.kind, h.protocol, (h.src, h.sport), (h.dst, h.dport)) };
    let about = line(h.kind, h.protocol, (quoted, h.sport), (h.dst, h.dport));
    format!("ICMP error {} -> {}, about the flow {about}", h.src, h.dst)
}

/// What happens to the packet: `pass`, `drop`, `forward`, `hold`.
fn verdict(outcome: Reason) -> &'static str {
    match outcome {
        Reason::None => "pass",
        Reason::FragmentHeld => "hold",
        outcome if outcome.drops() => "drop",
        _ => "forward",
    }
}

fn next_hop(entry: &TargetEntry, v6: bool) -> Option<(IpAddr, u32)> {
    let (ip, index): (IpAddr, u32) = if v6 {
        (Ipv6Addr::from(entry.v6).into(), entry.ifindex6)
    } else {
        (Ipv4Addr::from(entry.v4).into(), entry.ifindex4)
    };
    (index != 0).then_some((ip, index))
}

fn numbers(list: &[u32]) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for number in list {
        match ranges.last_mut() {
            Some(last) if last.1 + 1 == *number => last.1 = *number,
            _ => ranges.push((*number, *number)),
        }
    }
    let texts: Vec<String> =
        ranges.iter().map(|(a, b)| if a == b { a.to_string() } else { format!("{a}-{b}") }).collect();
    if texts.is_empty() { "none".to_owned() } else { texts.join(", ") }
}

fn row(target: &Chosen, rows: u32) -> String {
    match (target.row, target.owner) {
        (None, _) => "a later fragment: it follows the first one".to_owned(),
        (Some(row), Some(owner)) if owner == target.identifier => format!("{row} of {rows}, identifier {owner}'s own"),
        (Some(row), Some(owner)) => {
            format!("{row} of {rows}, identifier {owner}'s, which is not ready: the next one in its sequence")
        }
        (Some(row), None) => format!("{row} of {rows}"),
    }
}

/// The answer for a person; `all`: flows of other destinations too.
pub(crate) fn text(e: &Explanation, names: &Names, all: bool) -> String {
    let mut out = String::new();
    let mut say = |label: &str, what: &str| _ = writeln!(out, "  {label:<9}{what}");
    let title = match &e.headers {
        Some(h) => {
            let vip = e.vip.map_or_else(|| "none: the destination is no VIP".to_owned(), |vip| vip.to_string());
            say("VIP", &vip);
            format!("{} ({} bytes, TTL {})", packet_line(h), h.bytes, h.ttl)
        }
        None => "a packet whose network header cannot be read".to_owned(),
    };
    let mut elsewhere = 0;
    let chosen = e.flows.iter().position(|f| f.standing == Standing::Chosen);
    for (place, flow) in e.flows.iter().enumerate() {
        let named = match flow.stream.as_str() {
            "" => format!("{} (its stream is not known)", flow.name),
            stream => format!("{} of stream {stream}", flow.name),
        };
        match flow.standing {
            Standing::Chosen => say("flow", &format!("{named}: it matches")),
            Standing::Shadowed => say("", &format!("{named}: matches too, but comes later in order of priority")),
            Standing::Missed if all || flow.same_destination => {
                let later = if chosen.is_some_and(|c| c < place) { "would not match" } else { "does not match" };
                say("", &format!("{named}: {later}: {}", flow.misses.join("; ")));
            }
            Standing::Missed => elsewhere += 1,
        }
    }
    if elsewhere > 0 {
        say("", &format!("{elsewhere} more for other destinations (--all shows them)"));
    }
    if e.flows.is_empty() && e.outcome == Reason::NoFlow {
        say("flow", "there is none");
    }
    if let Some(stream) = &e.stream {
        let ready = numbers(&stream.ready);
        let assumed = if names.interfaces.is_none() { " (assumed)" } else { "" };
        say("stream", &format!("{}, ready{assumed}: {ready} of 1-{}", stream.name, stream.max_targets));
    }
    if let (Some(target), Some(stream)) = (&e.target, &e.stream) {
        say("row", &row(target, stream.rows));
        let v6 = e.headers.is_some_and(|h| h.dst.is_ipv6());
        let hop = match (&names.interfaces, next_hop(&target.entry, v6)) {
            (None, _) => String::new(),
            (Some(_), Some((ip, index))) => format!(", {ip} by {}", names.interface(index)),
            (Some(_), None) => ", which has no address of this IP version".to_owned(),
        };
        say("target", &format!("identifier {}{hop}", target.identifier));
    }
    if e.decision.nat_port != 0 {
        say("port", &format!("translated to {}", e.decision.nat_port));
    }
    let said = match e.outcome {
        Reason::None => "passes: left to this machine's own stack".to_owned(),
        Reason::FragmentHeld => format!(
            "held, {}: {}; dropped then as {} if that has not come",
            Reason::FragmentHeld.name(),
            Reason::FragmentHeld.meaning(),
            Reason::FragmentUnknown.name()
        ),
        outcome if outcome.drops() => format!("dropped, {}: {}", outcome.name(), outcome.meaning()),
        outcome => format!("forwarded, {}: {}", outcome.name(), outcome.meaning()),
    };
    say("verdict", &said);
    if e.outcome.advice() != "nothing" {
        say("to do", e.outcome.advice());
    }
    format!("{title}\n{out}")
}

/// The answer for a program: one object.
pub(crate) fn json(e: &Explanation, names: &Names) -> Value {
    let v6 = e.headers.is_some_and(|h| h.dst.is_ipv6());
    let live = names.interfaces.is_some();
    let packet = e.headers.map(|h| {
        let ports = matches!(h.kind, Kind::Ports);
        json!({
            "source": h.src.to_string(),
            "destination": h.dst.to_string(),
            "protocol": protocol(h.protocol),
            "source_port": ports.then_some(h.sport),
            "destination_port": ports.then_some(h.dport),
            "echo_id": matches!(h.kind, Kind::Ping).then_some(h.sport),
            "about_packet_to": h.quoted_to.map(|ip| ip.to_string()),
            "bytes": h.bytes,
            "ttl": h.ttl,
        })
    });
    let flows: Vec<Value> = e
        .flows
        .iter()
        .map(|flow| {
            let standing = match flow.standing {
                Standing::Chosen => "chosen",
                Standing::Shadowed => "shadowed",
                Standing::Missed => "missed",
            };
            json!({"name": flow.name, "stream": flow.stream, "standing": standing, "misses": flow.misses})
        })
        .collect();
    let target = e.target.map(|target| {
        let hop = next_hop(&target.entry, v6).filter(|_| live);
        json!({
            "identifier": target.identifier,
            "row": target.row,
            "row_owner": target.owner,
            "next_hop": hop.map(|(ip, _)| ip.to_string()),
            "interface": hop.map(|(_, index)| names.interface(index)),
        })
    });
    json!({
        "packet": packet,
        "vip": e.vip.map(|vip| vip.to_string()),
        "flows": flows,
        "flow": e.flows.iter().find(|f| f.standing == Standing::Chosen).map(|f| f.name.clone()),
        "stream": e.stream.as_ref().map(|s| json!({
            "name": s.name, "ready": s.ready, "max_targets": s.max_targets, "rows": s.rows, "assumed": !live,
        })),
        "target": target,
        "translated_port": (e.decision.nat_port != 0).then_some(e.decision.nat_port),
        "verdict": verdict(e.outcome),
        "reason": e.outcome.name(),
        "meaning": e.outcome.meaning(),
        "advice": e.outcome.advice(),
    })
}

/// What the trace tells about one packet, with the names that the tables have.
pub(crate) struct Traced<'a> {
    pub(crate) event: &'a TraceEvent,
    pub(crate) time: std::time::SystemTime,
    pub(crate) flow: Option<String>,
    pub(crate) stream: Option<String>,
}

impl Traced<'_> {
    fn reason(&self) -> Reason {
        Reason::from_number(self.event.reason).unwrap_or(Reason::Internal)
    }

    fn kind(&self) -> Kind {
        match self.event.flags {
            f if f & trace_flag::PORTS != 0 => Kind::Ports,
            f if f & trace_flag::PING != 0 => Kind::Ping,
            f if f & trace_flag::LATER_FRAGMENT != 0 => Kind::LaterFragment,
            _ => Kind::Other,
        }
    }

    fn addresses(&self) -> (IpAddr, IpAddr) {
        let event = self.event;
        (Ipv6Addr::from(event.src).to_canonical(), Ipv6Addr::from(event.dst).to_canonical())
    }

    fn next_hop(&self) -> Option<IpAddr> {
        (self.event.ifindex_out != 0).then(|| Ipv6Addr::from(self.event.next_hop).to_canonical())
    }

    fn row(&self) -> Option<u32> {
        (self.event.row != meridio_maglev::NONE).then_some(self.event.row)
    }

    /// One line.
    pub(crate) fn text(&self, names: &Names) -> String {
        let event = self.event;
        let (src, dst) = self.addresses();
        let (sport, dport) = ((event.ports >> 16) as u16, event.ports as u16);
        let mut out = humantime::format_rfc3339_micros(self.time).to_string();
        let packet = line(self.kind(), event.protocol as u8, (src, sport), (dst, dport));
        let error = if event.flags & trace_flag::QUOTE != 0 { "ICMP error about " } else { "" };
        let fragment = if event.flags & trace_flag::FIRST_FRAGMENT != 0 { ", first fragment" } else { "" };
        let _ = write!(out, " {} {error}{packet}{fragment}", names.interface(event.ifindex_in));
        let _ = write!(out, ", {} bytes", event.bytes);
        if event.segments > 1 {
            let _ = write!(out, " in {} segments", event.segments);
        }
        let _ = write!(out, ", TTL {}:", event.ttl);
        if let Some(flow) = &self.flow {
            let _ = write!(out, " flow {flow},");
        }
        if let Some(stream) = &self.stream {
            let _ = write!(out, " stream {stream},");
        }
        if let Some(row) = self.row() {
            let _ = write!(out, " row {row},");
        }
        if event.identifier != 0 {
            let _ = write!(out, " identifier {},", event.identifier);
        }
        if let Some(ip) = self.next_hop() {
            let _ = write!(out, " to {ip} by {},", names.interface(event.ifindex_out));
        }
        if event.nat_port != 0 {
            let _ = write!(out, " port {},", event.nat_port);
        }
        let reason = self.reason();
        let became = match verdict(reason) {
            "drop" => "dropped",
            "hold" => "held",
            _ => "forwarded",
        };
        let _ = write!(out, " {became} ({})", reason.name());
        out
    }

    /// One object.
    pub(crate) fn json(&self, names: &Names) -> Value {
        let event = self.event;
        let (src, dst) = self.addresses();
        let ports = matches!(self.kind(), Kind::Ports);
        let reason = self.reason();
        json!({
            "time": humantime::format_rfc3339_micros(self.time).to_string(),
            "interface": names.interface(event.ifindex_in),
            "source": src.to_string(),
            "destination": dst.to_string(),
            "protocol": protocol(event.protocol as u8),
            "source_port": ports.then_some(event.ports >> 16),
            "destination_port": ports.then_some(event.ports & 0xffff),
            "echo_id": matches!(self.kind(), Kind::Ping).then_some(event.ports >> 16),
            "icmp_error": event.flags & trace_flag::QUOTE != 0,
            "first_fragment": event.flags & trace_flag::FIRST_FRAGMENT != 0,
            "later_fragment": event.flags & trace_flag::LATER_FRAGMENT != 0,
            "bytes": event.bytes,
            "segments": event.segments,
            "ttl": event.ttl,
            "flow": self.flow,
            "stream": self.stream,
            "row": self.row(),
            "identifier": (event.identifier != 0).then_some(event.identifier),
            "next_hop": self.next_hop().map(|ip| ip.to_string()),
            "out_interface": (event.ifindex_out != 0).then(|| names.interface(event.ifindex_out)),
            "translated_port": (event.nat_port != 0).then_some(event.nat_port),
            "verdict": verdict(reason),
            "reason": reason.name(),
        })
    }
}
