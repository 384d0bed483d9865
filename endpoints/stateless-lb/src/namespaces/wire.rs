//! Whole packets: made by hand, sent by raw sockets, and seen on their way.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use etherparse::{IpHeaders, IpNumber, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder};
use socket2::{Domain, Protocol, Socket, Type};

use super::Scene;

/// Every Ethernet type (`ETH_P_ALL`), as the kernel wants it: in network byte order.
const EVERYTHING: u16 = 3u16.to_be();
/// A raw socket of it is given whole packets, with their network headers (`IPPROTO_RAW`).
const WHOLE: i32 = 255;

/// A UDP datagram that is not like all others.
#[derive(Clone, Copy)]
pub(super) struct Datagram<'a> {
    /// Its port is the identification of an IPv4 packet as well.
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    /// TTL or hop limit.
    pub(super) ttl: u8,
    /// Of the whole packet.
    pub(super) size: usize,
    /// May not be fragmented (IPv6 never may).
    pub(super) whole: bool,
    /// Of IPv4, a multiple of 4 bytes.
    pub(super) options: &'a [u8],
}

impl Datagram<'_> {
    pub(super) fn new(from: SocketAddr, to: SocketAddr) -> Self {
        Datagram { from, to, ttl: 64, size: 100, whole: true, options: &[] }
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let (headers, length) = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header = Ipv4Header::new(0, self.ttl, IpNumber::UDP, from.octets(), to.octets()).unwrap();
                header.dont_fragment = self.whole;
                header.identification = self.from.port();
                header.options = self.options.try_into().unwrap();
                let length = header.header_len();
                (IpHeaders::Ipv4(header, Default::default()), length)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let header = Ipv6Header {
                    traffic_class: 0,
                    flow_label: Ipv6FlowLabel::ZERO,
                    payload_length: 0,
                    next_header: IpNumber::UDP,
                    hop_limit: self.ttl,
                    source: from.octets(),
                    destination: to.octets(),
                };
                (IpHeaders::Ipv6(header, Default::default()), Ipv6Header::LEN)
            }
            _ => panic!("{} and {} are of different IP versions", self.from, self.to),
        };
        let mut bytes = Vec::new();
        let udp = PacketBuilder::ip(headers).udp(self.from.port(), self.to.port());
        udp.write(&mut bytes, &vec![7; self.size - length - 8]).unwrap();
        bytes
    }
}

/// A packet that somebody has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    pub(super) ttl: u8,
    /// Identification of an IPv4 packet.
    pub(super) id: u16,
    /// IPv4 options.
    pub(super) options: Vec<u8>,
    /// Offset of a fragment, and whether more of them follow.
    pub(super) fragment: (u16, bool),
    /// Bytes behind the network header.
    pub(super) length: usize,
    pub(super) what: What,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// A UDP datagram, or its first fragment.
    Udp {
        from: u16,
        to: u16,
    },
    /// An ICMP error: type and code, the MTU of those that tell one, and the packet that it is about.
    Error {
        kind: [u8; 2],
        mtu: u16,
        about: Box<Seen>,
    },
    Else,
}

impl Seen {
    /// The UDP datagram has this port at one of its ends; so has the one that an error is about.
    pub(super) fn has(&self, port: u16) -> bool {
        match &self.what {
            What::Udp { from, to } => [*from, *to].contains(&port),
            What::Error { about, .. } => about.has(port),
            What::Else => false,
        }
    }

    /// It tells of the UDP datagram with this port.
    pub(super) fn tells_of(&self, port: u16) -> bool {
        matches!(self.what, What::Error { .. }) && self.has(port)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]))
}

/// Reads a packet from its network header on (without extension headers); one that is quoted is cut off somewhere.
fn read(bytes: &[u8]) -> Option<Seen> {
    let address = |at: usize, length: usize| match bytes.get(at..at + length)? {
        v4 if length == 4 => <[u8; 4]>::try_from(v4).ok().map(IpAddr::from),
        v6 => <[u8; 16]>::try_from(v6).ok().map(IpAddr::from),
    };
    let (header, protocol, ttl, total, offset, ends) = match bytes.first()? >> 4 {
        4 => {
            let header = (bytes[0] & 15) as usize * 4;
            let ends = (address(12, 4)?, address(16, 4)?);
            (header, *bytes.get(9)?, *bytes.get(8)?, word(bytes, 2)? as usize, word(bytes, 6)?, ends)
        }
        6 => {
            let ends = (address(8, 16)?, address(24, 16)?);
            (40, *bytes.get(6)?, *bytes.get(7)?, word(bytes, 4)? as usize + 40, 0, ends)
        }
        _ => return None,
    };
    let rest = bytes.get(header..)?;
    let fragment = ((offset & 0x1fff) * 8, offset & 0x2000 != 0);
    let what = match (protocol, fragment.0) {
        (17, 0) => What::Udp { from: word(rest, 0)?, to: word(rest, 2)? },
        // Below 128 all of ICMPv6 are errors.
        (1, 0) if matches!(rest.first()?, 3 | 11 | 12) => error(rest)?,
        (58, 0) if *rest.first()? < 128 => error(rest)?,
        _ => What::Else,
    };
    let (id, options) = if ends.0.is_ipv6() { (0, &[][..]) } else { (word(bytes, 4)?, bytes.get(20..header)?) };
    let (options, length) = (options.to_vec(), total.checked_sub(header)?);
    Some(Seen { from: ends.0, to: ends.1, ttl, id, options, fragment, length, what })
}

fn error(icmp: &[u8]) -> Option<What> {
    let about = Box::new(read(icmp.get(8..)?)?);
    Some(What::Error { kind: [icmp[0], icmp[1]], mtu: word(icmp, 6)?, about })
}

/// All packets that a pod has sent or received.
pub(super) struct Eyes(Arc<Mutex<Vec<Seen>>>);

impl Eyes {
    pub(super) fn see(&self, which: impl Fn(&Seen) -> bool) -> Vec<Seen> {
        self.0.lock().unwrap().iter().filter(|seen| which(seen)).cloned().collect()
    }

    /// Waits for so many of them.
    pub(super) fn wait(&self, count: usize, which: impl Fn(&Seen) -> bool) -> Vec<Seen> {
        super::eventually(|| self.see(&which).len() >= count, || format!("not seen, but {:?}", self.0.lock().unwrap()));
        self.see(which)
    }
}

impl Scene {
    pub(super) fn eyes(&mut self, pod: &str) -> Eyes {
        let open = || Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(EVERYTHING as i32)));
        let mut socket = self.netns(pod).run_blocking(open).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let (into, ended) = (seen.clone(), self.ended.clone());
        self.threads.push(std::thread::spawn(move || {
            let mut bytes = vec![0; 70_000];
            while !ended.load(Ordering::Relaxed) {
                if let Ok(length) = socket.read(&mut bytes) {
                    into.lock().unwrap().extend(read(&bytes[..length]));
                }
            }
        }));
        Eyes(seen)
    }

    pub(super) fn send(&self, pod: &str, datagram: &Datagram<'_>) {
        let domain = if datagram.to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let open = || Socket::new(domain, Type::RAW, Some(Protocol::from(WHOLE)));
        let socket = self.netns(pod).run_blocking(open).unwrap().unwrap();
        let (bytes, to) = (datagram.bytes(), SocketAddr::new(datagram.to.ip(), 0));
        assert_eq!(socket.send_to(&bytes, &to.into()).unwrap(), bytes.len());
    }
}
