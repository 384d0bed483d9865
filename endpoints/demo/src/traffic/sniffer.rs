//! Watches the primary network for packets that carry a VIP: there must be none, ever.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::namespace::Namespace;

/// `ETH_P_ALL` in network byte order, as socket(2) wants it.
const ALL: i32 = (libc::ETH_P_ALL as u16).to_be() as i32;

const LOAD_HALF: u16 = 0x28;
const LOAD_WORD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// Counts frames with a VIP as source or destination in one namespace.
#[derive(Debug)]
pub struct Sniffer {
    shared: Arc<Shared>,
    baseline: u64,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    count: AtomicU64,
    ended: AtomicBool,
    samples: Mutex<Vec<String>>,
}

impl Sniffer {
    /// Starts counting in `network`.
    ///
    /// # Errors
    /// If a packet socket or its filter is refused.
    pub fn start(network: &Namespace, vip4: Ipv4Addr, vip6: Ipv6Addr) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let counter = Arc::clone(&shared);
        let thread = network.run(move || -> Result<_> {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(ALL))).context("packet socket")?;
            socket.attach_filter(&filter(vip4, vip6)).context("packet filter")?;
            socket.set_read_timeout(Some(Duration::from_millis(100))).context("read timeout")?;
            let thread = std::thread::Builder::new().name("sniffer".to_owned());
            thread.spawn(move || count(&socket, &counter)).context("start the sniffer")
        })??;
        Ok(Sniffer { shared, baseline: 0, thread: Some(thread) })
    }

    /// Proves that it counts: `pod` sends packets with the VIPs as sources over the primary network. What was counted up to the end of
    /// this is not counted as a leak.
    ///
    /// # Errors
    /// If they are not seen.
    pub fn prove(&mut self, pod: &Namespace, vips: [IpAddr; 2], neighbours: [IpAddr; 2]) -> Result<()> {
        for (vip, neighbour) in vips.into_iter().zip(neighbours) {
            let before = self.shared.count.load(Ordering::Relaxed);
            let (length, flag) = if vip.is_ipv4() { (32, "") } else { (128, " nodad") };
            pod.ip(&format!("addr add {vip}/{length} dev lo{flag}\n"))?;
            let sent = pod.run(move || send_from(vip, neighbour))?;
            pod.ip(&format!("addr del {vip}/{length} dev lo\n"))?;
            sent.with_context(|| format!("send from {vip}"))?;
            std::thread::sleep(Duration::from_millis(50));
            if self.shared.count.load(Ordering::Relaxed) == before {
                bail!("the watch over the primary network does not see a packet from {vip}");
            }
        }
        std::thread::sleep(Duration::from_millis(200));
        self.baseline = self.shared.count.load(Ordering::Relaxed);
        self.shared.samples.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clear();
        Ok(())
    }

    /// Frames with a VIP since [`Sniffer::prove`], and the first few in words.
    pub fn leaks(&self) -> (u64, Vec<String>) {
        let samples = self.shared.samples.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
        (self.shared.count.load(Ordering::Relaxed) - self.baseline, samples)
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn count(socket: &Socket, shared: &Shared) {
    use std::io::Read as _;
    let mut buffer = [0; 128];
    while !shared.ended.load(Ordering::Relaxed) {
        let mut reader = socket;
        if let Ok(length) = reader.read(&mut buffer) {
            shared.count.fetch_add(1, Ordering::Relaxed);
            let mut samples = shared.samples.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if samples.len() < 3 {
                samples.push(describe(buffer.get(..length).unwrap_or_default()));
            }
        }
    }
}

/// Addresses of a frame: link layer, then network layer.
fn describe(frame: &[u8]) -> String {
    let mac = |at: usize| {
        let bytes = frame.get(at..at + 6).unwrap_or_default();
        bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(":")
    };
    let v4 = |at: usize| frame.get(at..at + 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map(IpAddr::from);
    let v6 = |at: usize| frame.get(at..at + 16).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(IpAddr::from);
    let addresses = if frame.get(12..14) == Some(&[8, 0]) { (v4(26), v4(30)) } else { (v6(22), v6(38)) };
    let show = |address: Option<IpAddr>| address.map_or_else(|| "?".to_owned(), |address| address.to_string());
    format!("{} -> {} ({} -> {})", show(addresses.0), show(addresses.1), mac(6), mac(0))
}

/// Classic BPF over an Ethernet frame: IPv4 or IPv6 with the VIP as source or destination.
fn filter(vip4: Ipv4Addr, vip6: Ipv6Addr) -> Vec<SockFilter> {
    const REJECT: u8 = 24;
    const ACCEPT: u8 = 25;
    let four = u32::from(vip4);
    let mut code = vec![SockFilter::new(LOAD_HALF, 0, 0, 12), SockFilter::new(JUMP_EQUAL, 0, 5, 0x0800)];
    for offset in [26, 30] {
        code.push(SockFilter::new(LOAD_WORD, 0, 0, offset));
        let to_accept = ACCEPT - (code.len() as u8 + 1);
        code.push(SockFilter::new(JUMP_EQUAL, to_accept, 0, four));
    }
    code.push(SockFilter::new(RETURN, 0, 0, 0));
    let to_reject = REJECT - (code.len() as u8 + 1);
    code.push(SockFilter::new(JUMP_EQUAL, 0, to_reject, 0x86dd));
    for (start, otherwise) in [(22, 16), (38, REJECT)] {
        for (word, bytes) in vip6.octets().chunks(4).enumerate() {
            let value = bytes.iter().fold(0u32, |value, &byte| value << 8 | u32::from(byte));
            code.push(SockFilter::new(LOAD_WORD, 0, 0, start + 4 * word as u32));
            let next = code.len() as u8 + 1;
            let equal = if word == 3 { ACCEPT - next } else { 0 };
            code.push(SockFilter::new(JUMP_EQUAL, equal, otherwise - next, value));
        }
    }
    code.push(SockFilter::new(RETURN, 0, 0, 0));
    code.push(SockFilter::new(RETURN, 0, 0, 128));
    code
}

fn send_from(source: IpAddr, to: IpAddr) -> Result<()> {
    let socket = std::net::UdpSocket::bind((source, 0)).context("bind to the VIP")?;
    socket.send_to(b"self-check", (to, 9)).context("send")?;
    Ok(())
}
