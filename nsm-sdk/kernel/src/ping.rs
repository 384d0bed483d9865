//! Liveness of a neighbour by ICMP echo (RFC 792, RFC 4443), sent from inside a namespace.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::{RcvBufForce, SndBufForce};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use crate::{Error, Netns};

const ECHO_V4: (u8, u8) = (8, 0);
const ECHO_V6: (u8, u8) = (128, 129);
const HEADER: usize = 8;
/// Room in bytes for requests whose next hop is being resolved, which wait in the kernel for seconds, and for answers that come at
/// once: there may be as many as its table of neighbours has entries (1,024).
const ROOM: usize = 1 << 20;
/// Largest answer that is read in bytes; more is cut off.
const BUFFER: usize = 256;

type Waiting = Arc<Mutex<HashMap<(IpAddr, u16), oneshot::Sender<()>>>>;

/// A socket that sends echo requests of one family from one namespace, for any number of destinations at once.
pub struct Pinger {
    socket: Arc<UdpSocket>,
    v6: bool,
    /// Raw sockets see every echo of the namespace; ours carry this identifier. (The kernel chooses the one of ICMP sockets.)
    id: u16,
    sequence: AtomicU16,
    waiting: Waiting,
    reader: AbortHandle,
}

impl Drop for Pinger {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Where requests leave from; by default routing chooses.
#[derive(Clone, Debug, Default)]
pub struct From {
    /// Source address.
    pub source: Option<IpAddr>,
    /// Interface, whatever routing says.
    pub device: Option<String>,
}

fn open_here(v6: bool, from: &From) -> io::Result<(Socket, bool)> {
    let (domain, protocol) = if v6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
    // Raw sockets need a privilege, ICMP sockets a group in ping_group_range: whichever is there.
    let (socket, raw) = match Socket::new(domain, Type::DGRAM, Some(protocol)) {
        Ok(socket) => (socket, false),
        Err(_) => (Socket::new(domain, Type::RAW, Some(protocol))?, true),
    };
    socket.set_nonblocking(true)?;
    // The privilege gives more than everybody may have; without it less is no reason to go without.
    if setsockopt(&socket, SndBufForce, &ROOM).is_err() {
        let _ = socket.set_send_buffer_size(ROOM);
    }
    if setsockopt(&socket, RcvBufForce, &ROOM).is_err() {
        let _ = socket.set_recv_buffer_size(ROOM);
    }
    if let Some(device) = &from.device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if let Some(source) = from.source {
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    Ok((socket, raw))
}

fn checksum(data: &[u8]) -> u16 {
    let words = data.chunks(2).map(|c| u32::from(u16::from_be_bytes([c[0], *c.get(1).unwrap_or(&0)])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn request(v6: bool, id: u16, sequence: u16) -> [u8; HEADER] {
    let mut packet = [0; HEADER];
    packet[0] = if v6 { ECHO_V6.0 } else { ECHO_V4.0 };
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    // The kernel computes ICMPv6 checksums itself, they cover addresses too.
    if !v6 {
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// Sequence number of an echo reply that is ours, if it is one. Raw IPv4 sockets deliver the IP header as well.
fn reply(packet: &[u8], v6: bool, raw_id: Option<u16>) -> Option<u16> {
    let skip = match (v6, raw_id, packet.first()) {
        (false, Some(_), Some(first)) => usize::from(first & 0x0f) * 4,
        _ => 0,
    };
    let icmp = packet.get(skip..)?;
    let word = |at: usize| Some(u16::from_be_bytes([*icmp.get(at)?, *icmp.get(at + 1)?]));
    let kind = if v6 { ECHO_V6.1 } else { ECHO_V4.1 };
    let ours = raw_id.is_none_or(|id| word(4) == Some(id));
    (*icmp.first()? == kind && ours).then(|| word(6)).flatten()
}

async fn read_replies(socket: Arc<UdpSocket>, v6: bool, raw_id: Option<u16>, waiting: Waiting) {
    let mut buffer = [0; BUFFER];
    loop {
        // Errors of single packets (host unreachable ...) are reported here as well: the probe runs into its timeout.
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else {
            tokio::task::yield_now().await;
            continue;
        };
        if let Some(sequence) = reply(&buffer[..length], v6, raw_id) {
            let key = (from.ip(), sequence);
            if let Some(waiter) = waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&key) {
                // A probe that gave up in between does not mind.
                let _ = waiter.send(());
            }
        }
    }
}

impl Pinger {
    /// Opens a socket for one family, sending from `source` or from what routing chooses.
    pub async fn open(netns: &Netns, v6: bool, source: Option<IpAddr>) -> Result<Self, Error> {
        Self::open_from(netns, v6, From { source, device: None }).await
    }

    /// As [`open`](Self::open), also from a fixed interface: ports of a bridge carry addresses of the bridge's own network, and
    /// routing might choose one of them.
    pub async fn open_from(netns: &Netns, v6: bool, from: From) -> Result<Self, Error> {
        let opened = netns.run(move || {
            let (socket, raw) = open_here(v6, &from)?;
            // A socket of packets is a socket of packets: the runtime's UDP type sends and receives on it.
            io::Result::Ok((UdpSocket::from_std(socket.into())?, raw))
        });
        let (socket, raw) = opened.await?.map_err(|e| Error::io("open ICMP socket", e))?;
        let socket = Arc::new(socket);
        let id = rand::random();
        let waiting = Waiting::default();
        let reading = read_replies(socket.clone(), v6, raw.then_some(id), waiting.clone());
        let reader = tokio::spawn(reading).abort_handle();
        Ok(Pinger { socket, v6, id, sequence: AtomicU16::new(rand::random()), waiting, reader })
    }

    /// Sends one echo request; true if the answer arrives in time. A packet that cannot be sent is not answered either.
    pub async fn probe(&self, destination: IpAddr, timeout: Duration) -> bool {
        if destination.is_ipv6() != self.v6 {
            return false;
        }
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        let (tx, rx) = oneshot::channel();
        let key = (destination, sequence);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(key, tx);
        let packet = request(self.v6, self.id, sequence);
        // A socket without room for more makes the sender wait, too.
        let exchange = async {
            let sent = self.socket.send_to(&packet, SocketAddr::new(destination, 0)).await;
            sent.is_ok() && rx.await.is_ok()
        };
        let alive = tokio::time::timeout(timeout, exchange).await.unwrap_or(false);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
        alive
    }
}

/// Asks once whether `destination` answers to `source` (or to whatever address routing chooses).
pub async fn probe(netns: &Netns, source: Option<IpAddr>, destination: IpAddr, timeout: Duration) -> bool {
    match Pinger::open(netns, destination.is_ipv6(), source).await {
        Ok(pinger) => pinger.probe(destination, timeout).await,
        Err(error) => {
            tracing::debug!(?netns, %destination, %error, "liveness cannot be probed");
            false
        }
    }
}

/// NSM's liveness check of a connection: for every pair of addresses of one family four echoes spread over `timeout`; alive if
/// every pair had at least one answer. No pairs: alive.
pub async fn pairs_alive(netns: &Netns, pairs: &[(IpAddr, IpAddr)], timeout: Duration) -> bool {
    const ECHOES: u32 = 4;
    let same_family = pairs.iter().filter(|(s, d)| s.is_ipv6() == d.is_ipv6());
    let checks = same_family.map(|(source, destination)| async move {
        let Ok(pinger) = Pinger::open(netns, source.is_ipv6(), Some(*source)).await else { return false };
        for _ in 0..ECHOES {
            if pinger.probe(*destination, timeout / ECHOES).await {
                return true;
            }
        }
        false
    });
    futures_util::future::join_all(checks).await.into_iter().all(|alive| alive)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysctl;

    #[test]
    fn replies_are_told_from_requests_and_from_others() {
        let mut packet = request(false, 7, 9);
        assert_eq!(checksum(&packet), 0);
        assert_eq!(reply(&packet, false, None), None);
        packet[0] = 0;
        assert_eq!(reply(&packet, false, None), Some(9));
        let mut raw = vec![0x45; 20];
        raw.extend_from_slice(&packet);
        assert_eq!(reply(&raw, false, Some(7)), Some(9));
        assert_eq!(reply(&raw, false, Some(8)), None);
        assert_eq!(reply(&[0x4f], false, Some(8)), None);
        assert_eq!(reply(&[], true, None), None);
    }

    #[tokio::test]
    async fn loopback_answers_with_either_socket() {
        let ns = Netns::anonymous().unwrap();
        let netlink = ns.netlink().await.unwrap();
        let lo = netlink.link_by_name("lo").await.unwrap().unwrap().index;
        let second = Duration::from_secs(1);
        assert!(!probe(&ns, None, "127.0.0.1".parse().unwrap(), Duration::from_millis(100)).await);
        netlink.link_up(lo).await.unwrap();
        for _ in 0..2 {
            let pair = |ip: &str| (ip.parse::<IpAddr>().unwrap(), ip.parse::<IpAddr>().unwrap());
            assert!(probe(&ns, None, "127.0.0.1".parse().unwrap(), second).await);
            assert!(pairs_alive(&ns, &[pair("127.0.0.1"), pair("::1")], second).await);
            sysctl::allow_ping(&ns).await.unwrap();
        }
    }

    #[tokio::test]
    async fn who_is_silent_takes_nothing_from_the_others() {
        let (near, _far) = crate::testing::joined_nodes([172, 31, 0, 1].into(), [172, 31, 0, 2].into()).await;
        let netlink = near.netlink().await.unwrap();
        let index = netlink.link_by_name("eth0").await.unwrap().unwrap().index;
        netlink.address_replace(index, "172.30.0.1/16".parse().unwrap()).await.unwrap();
        // An ICMP socket waits for room where a raw one fails.
        sysctl::allow_ping(&near).await.unwrap();
        let pinger = Pinger::open(&near, false, None).await.unwrap();
        let second = Duration::from_secs(1);
        // What is sent to them waits in the kernel for their link-layer addresses.
        let silent = (0..600u16).map(|n| IpAddr::from([172, 30, 1 + (n >> 8) as u8, n as u8]));
        let silent = futures_util::future::join_all(silent.map(|ip| pinger.probe(ip, second)));
        let other = async {
            tokio::time::sleep(second / 2).await;
            pinger.probe([172, 31, 0, 2].into(), second).await
        };
        let started = std::time::Instant::now();
        let (silent, other) = tokio::join!(silent, other);
        let took = started.elapsed();
        assert!(other && !silent.contains(&true), "{other}");
        assert!(took < 2 * second, "each takes the time that it has: {took:?}");
    }
}
