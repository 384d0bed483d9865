//! Which packets are traced, and what is told about them.

use crate::decide::Scratch;
use crate::layout::{Masked, Ports, Trace, trace_flag, trace_protocol};
use crate::packet::{Kind, protocol};

/// Whether a decided packet is one of those that the trace asks for. An ICMP error is judged by the packet that it quotes,
/// turned round, as its flow is. Packets without ports (pings, later fragments) match if every port does.
#[inline(always)]
pub fn wanted(trace: &Trace, s: &Scratch, dropped: bool) -> bool {
    if trace.only_dropped != 0 && !dropped {
        return false;
    }
    let t = &s.transport;
    let bit = match t.protocol {
        protocol::TCP => trace_protocol::TCP,
        protocol::UDP => trace_protocol::UDP,
        protocol::SCTP => trace_protocol::SCTP,
        protocol::ICMP | protocol::ICMPV6 => trace_protocol::ICMP,
        _ => trace_protocol::OTHER,
    };
    if trace.protocols & bit == 0 {
        return false;
    }
    let source = if t.quote != 0 { &s.quoted.dst } else { &s.network.src };
    if !within(&trace.sources, source) || !within(&trace.destinations, &s.network.dst) {
        return false;
    }
    let (sport, dport) = if matches!(t.kind, Kind::Ports) { (Some(t.sport), Some(t.dport)) } else { (None, None) };
    among(&trace.source_ports, sport) && among(&trace.destination_ports, dport)
}

#[inline(always)]
fn words(address: &[u8; 16]) -> [u64; 2] {
    let a = address;
    [
        u64::from_ne_bytes([a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]]),
        u64::from_ne_bytes([a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]]),
    ]
}

#[inline(always)]
fn within(prefixes: &[Masked], address: &[u8; 16]) -> bool {
    let [high, low] = words(address);
    let mut differs = u64::MAX;
    for p in prefixes {
        let d = ((high ^ p.net[0]) & p.mask[0]) | ((low ^ p.net[1]) & p.mask[1]);
        if d < differs {
            differs = d;
        }
    }
    differs == 0
}

#[inline(always)]
fn among(ranges: &[Ports], port: Option<u16>) -> bool {
    ranges.iter().any(|r| match port {
        Some(port) => (r.low..=r.high).contains(&port),
        None => *r == Ports::ANY,
    })
}

/// The flags of an event.
#[inline(always)]
pub fn flags(s: &Scratch) -> u32 {
    let t = &s.transport;
    let kind = match t.kind {
        Kind::Ports => trace_flag::PORTS,
        Kind::Ping => trace_flag::PING,
        Kind::LaterFragment => trace_flag::LATER_FRAGMENT,
        _ => 0,
    };
    kind | if s.network.v6 { trace_flag::V6 } else { 0 }
        | if t.quote != 0 { trace_flag::QUOTE } else { 0 }
        | if t.first_fragment { trace_flag::FIRST_FRAGMENT } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(protocol: u8, kind: Kind, sport: u16, dport: u16) -> Scratch {
        let mut s = Scratch::default();
        s.network.src = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 1];
        s.network.dst = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 20, 0, 0, 1];
        (s.transport.protocol, s.transport.kind, s.transport.sport, s.transport.dport) = (protocol, kind, sport, dport);
        s
    }

    fn net(address: [u8; 16], length: u32) -> Masked {
        let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0).to_be_bytes();
        Masked { net: words(&address), mask: words(&mask) }
    }

    #[test]
    fn each_criterion_can_keep_a_packet_out() {
        let tcp = scratch(6, Kind::Ports, 1234, 4000);
        assert!(wanted(&Trace::default(), &tcp, false) && wanted(&Trace::default(), &tcp, true));
        let dropped = Trace { only_dropped: 1, ..Trace::default() };
        assert!(!wanted(&dropped, &tcp, false) && wanted(&dropped, &tcp, true));
        let udp = Trace { protocols: trace_protocol::UDP, ..Trace::default() };
        assert!(!wanted(&udp, &tcp, false) && wanted(&udp, &scratch(17, Kind::Ports, 1, 2), false));
        let inside = net(tcp.network.src, 104);
        let mut outside = inside;
        outside.net[1] ^= u64::from_ne_bytes([0, 0, 0, 0, 1, 0, 0, 0]);
        for (first, second, expected) in [(inside, outside, true), (outside, inside, true), (outside, outside, false)] {
            let trace = Trace { sources: [first, second, first, first], ..Trace::default() };
            assert_eq!(wanted(&trace, &tcp, false), expected);
        }
        let elsewhere = Trace { destinations: [net(tcp.network.src, 128); 4], ..Trace::default() };
        assert!(!wanted(&elsewhere, &tcp, false));
        for (low, high, expected) in [(4000, 4000, true), (1, 3999, false), (4001, 65_535, false)] {
            let trace = Trace { destination_ports: [Ports { low, high }; 4], ..Trace::default() };
            assert_eq!(wanted(&trace, &tcp, false), expected, "{low}-{high}");
            assert!(!wanted(&trace, &scratch(1, Kind::Ping, 7, 0), false), "a ping has no port");
        }
        assert!(wanted(&Trace::default(), &scratch(1, Kind::Ping, 7, 0), false));
    }

    #[test]
    fn an_error_is_judged_by_the_client_of_the_quoted_packet() {
        let mut error = scratch(6, Kind::Ports, 1234, 4000);
        error.transport.quote = 28;
        error.quoted.dst = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 9];
        let router = Trace { sources: [net(error.network.src, 128); 4], ..Trace::default() };
        let client = Trace { sources: [net(error.quoted.dst, 128); 4], ..Trace::default() };
        assert!(!wanted(&router, &error, false) && wanted(&client, &error, false));
        assert_eq!(flags(&error), trace_flag::PORTS | trace_flag::QUOTE);
    }
}
