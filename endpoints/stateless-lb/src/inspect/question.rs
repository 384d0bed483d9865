//! A packet in words, and as bytes.

use std::net::{IpAddr, SocketAddr};

use etherparse::err::packet::BuildWriteError;
use etherparse::{IpHeaders, IpNumber, PacketBuilder, PacketBuilderStep};

/// Length of an SCTP common header with an empty DATA chunk.
const SCTP_LENGTH: usize = 12;

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    kind: Kind,
    src: IpAddr,
    dst: IpAddr,
    ttl: u8,
    size: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Tcp { sport: u16, dport: u16, flags: Vec<TcpFlag> },
    Udp { sport: u16, dport: u16 },
    Sctp { sport: u16, dport: u16 },
    Echo { id: u16 },
    Other(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TcpFlag {
    Syn,
    Ack,
    Fin,
    Rst,
    Psh,
}

/// A packet as bytes from its network header on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Packet {
    /// Ethernet type.
    pub(crate) ethertype: u16,
    /// Network header and what follows.
    pub(crate) bytes: Vec<u8>,
}

impl Question {
    /// Reads e.g. `tcp 10.0.0.1:1234 -> 20.0.0.1:4000 flags syn`, `udp [2001::1]:5 -> [2000::1]:4000 size 1400 ttl 1`,
    /// `icmp 10.0.0.1 -> 20.0.0.1 id 7`, `47 10.0.0.1 -> 20.0.0.1`.
    ///
    /// # Errors
    /// One line that names the word.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let spaced = text.replace("->", " -> ");
        let mut words = spaced.split_whitespace();
        let form = "a packet looks like: tcp 10.0.0.1:1234 -> 20.0.0.1:4000";
        let protocol = words.next().ok_or(form)?.to_ascii_lowercase();
        let from = words.next().ok_or_else(|| format!("the source is missing; {form}"))?;
        match words.next() {
            Some("->" | "to") => {}
            Some(other) => return Err(format!("{other:?} stands where \"->\" is expected; {form}")),
            None => return Err(format!("\"->\" and the destination are missing; {form}")),
        }
        let to = words.next().ok_or_else(|| format!("the destination is missing; {form}"))?;
        let ports = || -> Result<(IpAddr, u16, IpAddr, u16), String> {
            let (a, b) = (socket("source", from)?, socket("destination", to)?);
            Ok((a.ip(), a.port(), b.ip(), b.port()))
        };
        let (src, dst, kind) = match protocol.as_str() {
            "tcp" => ports().map(|(src, sport, dst, dport)| (src, dst, Kind::Tcp { sport, dport, flags: vec![] }))?,
            "udp" => ports().map(|(src, sport, dst, dport)| (src, dst, Kind::Udp { sport, dport }))?,
            "sctp" => ports().map(|(src, sport, dst, dport)| (src, dst, Kind::Sctp { sport, dport }))?,
            "icmp" | "icmp6" | "icmpv6" | "ping" => {
                (address("source", from)?, address("destination", to)?, Kind::Echo { id: 1 })
            }
            number => {
                let number = number.strip_prefix("proto:").unwrap_or(number).parse();
                let number =
                    number.map_err(|_| format!("{protocol:?} is not tcp, udp, sctp, icmp or an IP protocol number"))?;
                if [1, 6, 17, 58, 132].contains(&number) {
                    return Err(format!("protocol {number}: say tcp, udp, sctp or icmp"));
                }
                (address("source", from)?, address("destination", to)?, Kind::Other(number))
            }
        };
        if src.is_ipv4() != dst.is_ipv4() {
            return Err(format!("{src} and {dst} are of different IP versions"));
        }
        let mut question = Question { kind, src, dst, ttl: 64, size: None };
        while let Some(word) = words.next() {
            let value = words.next().ok_or_else(|| format!("{word:?} wants a value"))?;
            question.option(word, value)?;
        }
        Ok(question)
    }

    fn option(&mut self, word: &str, value: &str) -> Result<(), String> {
        let fault = |what: &str| format!("{word} {value:?} is not {what}");
        match (word, &mut self.kind) {
            ("ttl", _) => self.ttl = value.parse().map_err(|_| fault("a number from 0 to 255"))?,
            ("size", _) => self.size = Some(value.parse().map_err(|_| fault("a number of bytes up to 65535"))?),
            ("id", Kind::Echo { id }) => *id = value.parse().map_err(|_| fault("a number from 0 to 65535"))?,
            ("flags", Kind::Tcp { flags, .. }) => {
                for flag in value.split(',') {
                    flags.push(match flag.to_ascii_lowercase().as_str() {
                        "syn" => TcpFlag::Syn,
                        "ack" => TcpFlag::Ack,
                        "fin" => TcpFlag::Fin,
                        "rst" => TcpFlag::Rst,
                        "psh" => TcpFlag::Psh,
                        _ => return Err(fault("a list of syn, ack, fin, rst, psh")),
                    });
                }
            }
            _ => return Err(format!("{word:?} is none of ttl, size, id (icmp), flags (tcp)")),
        }
        Ok(())
    }

    /// The packet, with right checksums.
    ///
    /// # Errors
    /// When the size is too small for the headers.
    pub(crate) fn packet(&self) -> Result<Packet, String> {
        let header = if self.src.is_ipv4() { 20 } else { 40 };
        let l4 = match self.kind {
            Kind::Tcp { .. } => 20,
            Kind::Sctp { .. } => SCTP_LENGTH,
            Kind::Udp { .. } | Kind::Echo { .. } => 8,
            Kind::Other(_) => 0,
        };
        let size = self.size.map_or(header + l4, usize::from);
        let payload = size
            .checked_sub(header + l4)
            .ok_or_else(|| format!("size {size} is less than the {} bytes of its headers", header + l4))?;
        let bytes = self.build(payload).map_err(|error| format!("the packet cannot be made: {error}"))?;
        Ok(Packet { ethertype: if self.src.is_ipv4() { 0x0800 } else { 0x86dd }, bytes })
    }

    fn build(&self, payload: usize) -> Result<Vec<u8>, BuildWriteError> {
        let ip = || match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => PacketBuilder::ipv4(src.octets(), dst.octets(), self.ttl),
            (src, dst) => PacketBuilder::ipv6(v6(src), v6(dst), self.ttl),
        };
        let mut bytes = Vec::new();
        let rest = vec![0; payload];
        match &self.kind {
            Kind::Tcp { sport, dport, flags } => {
                let mut tcp = ip().tcp(*sport, *dport, 1, 65_535);
                for flag in flags {
                    tcp = match flag {
                        TcpFlag::Syn => tcp.syn(),
                        TcpFlag::Ack => tcp.ack(1),
                        TcpFlag::Fin => tcp.fin(),
                        TcpFlag::Rst => tcp.rst(),
                        TcpFlag::Psh => tcp.psh(),
                    };
                }
                tcp.write(&mut bytes, &rest)?;
            }
            Kind::Udp { sport, dport } => ip().udp(*sport, *dport).write(&mut bytes, &rest)?,
            Kind::Echo { id } if self.src.is_ipv4() => ip().icmpv4_echo_request(*id, 1).write(&mut bytes, &rest)?,
            Kind::Echo { id } => ip().icmpv6_echo_request(*id, 1).write(&mut bytes, &rest)?,
            Kind::Sctp { sport, dport } => {
                let mut sctp = [sport.to_be_bytes(), dport.to_be_bytes()].concat();
                sctp.resize(SCTP_LENGTH + payload, 0);
                raw(ip(), 132, &sctp, &mut bytes)?;
            }
            Kind::Other(number) => raw(ip(), *number, &rest, &mut bytes)?,
        }
        Ok(bytes)
    }
}

fn raw(
    ip: PacketBuilderStep<IpHeaders>,
    number: u8,
    payload: &[u8],
    bytes: &mut Vec<u8>,
) -> Result<(), BuildWriteError> {
    ip.write(bytes, IpNumber(number), payload)
}

fn v6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(a) => a.to_ipv6_mapped().octets(),
        IpAddr::V6(a) => a.octets(),
    }
}

fn socket(which: &str, text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| {
        let form = if text.matches(':').count() > 1 { "[2000::1]:4000" } else { "20.0.0.1:4000" };
        format!("{which} {text:?} is not an address with a port such as {form}")
    })
}

fn address(which: &str, text: &str) -> Result<IpAddr, String> {
    let bare = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).unwrap_or(text);
    bare.parse().map_err(|_| format!("{which} {text:?} is not an address (without a port)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(text: &str) -> Vec<u8> {
        Question::parse(text).unwrap().packet().unwrap().bytes
    }

    #[test]
    fn words_become_packets() {
        let tcp = bytes("tcp 10.0.0.1:1234 -> 20.0.0.1:4000 flags syn,ack ttl 7");
        assert_eq!((tcp.len(), tcp[8], tcp[9], tcp[33]), (40, 7, 6, 0x12));
        assert_eq!(tcp[12..24], [10, 0, 0, 1, 20, 0, 0, 1, 0x04, 0xd2, 0x0f, 0xa0]);
        let udp = bytes("UDP [2001::1]:5->[2000::1]:4000 size 1400");
        assert_eq!((udp.len(), udp[0] >> 4, udp[6], udp[7]), (1400, 6, 17, 64));
        assert_eq!(bytes("sctp 10.0.0.1:1 to 20.0.0.1:2")[20..24], [0, 1, 0, 2]);
        let ping = bytes("icmp 10.0.0.1 -> 20.0.0.1 id 258");
        assert_eq!((ping[9], ping[20], &ping[24..26]), (1, 8, &[1, 2][..]));
        assert_eq!(bytes("ping [2001::1] -> 2000::1")[40], 128);
        let gre = bytes("47 10.0.0.1 -> 20.0.0.1");
        assert_eq!((gre.len(), gre[9]), (20, 47));
    }

    #[test]
    fn faults_name_the_word() {
        for (text, named) in [
            ("", "looks like"),
            ("tcp", "source is missing"),
            ("tcp 10.0.0.1:1 20.0.0.1:2", "\"->\""),
            ("tcp 10.0.0.1:1 ->", "destination is missing"),
            ("tcp 10.0.0.1 -> 20.0.0.1:2", "source \"10.0.0.1\""),
            ("tcp 10.0.0.1:70000 -> 20.0.0.1:2", "70000"),
            ("tcp 2001::1:5 -> [2000::1]:2", "[2000::1]:4000"),
            ("tcp 10.0.0.1:1 -> [2000::1]:2", "different IP versions"),
            ("icmp 10.0.0.1:1 -> 20.0.0.1", "without a port"),
            ("quic 10.0.0.1:1 -> 20.0.0.1:2", "\"quic\""),
            ("17 10.0.0.1 -> 20.0.0.1", "say tcp, udp"),
            ("udp 10.0.0.1:1 -> 20.0.0.1:2 ttl", "wants a value"),
            ("udp 10.0.0.1:1 -> 20.0.0.1:2 ttl 256", "ttl \"256\""),
            ("udp 10.0.0.1:1 -> 20.0.0.1:2 flags syn", "none of ttl"),
            ("tcp 10.0.0.1:1 -> 20.0.0.1:2 flags urgent", "list of syn"),
        ] {
            let fault = Question::parse(text).unwrap_err();
            assert!(fault.contains(named) && !fault.contains('\n'), "{text:?}: {fault}");
        }
        let small = Question::parse("udp 10.0.0.1:1 -> 20.0.0.1:2 size 27").unwrap();
        assert_eq!(small.packet().unwrap_err(), "size 27 is less than the 28 bytes of its headers");
    }
}
