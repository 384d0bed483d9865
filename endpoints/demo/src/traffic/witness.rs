//! Sees which requests arrive at a target, so that a packet without an answer can be said to be lost on its way in or on its way out.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use super::UDP_PORT;
use crate::namespace::Namespace;

/// Begins the payload of every packet of the continuous traffic.
pub const MAGIC: [u8; 4] = *b"MDMC";

/// Payload of packet `sequence` of `flow`.
pub fn payload(flow: u32, sequence: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..8].copy_from_slice(&flow.to_be_bytes());
    bytes[8..].copy_from_slice(&sequence.to_be_bytes());
    bytes
}

/// (flow, sequence) of a payload.
pub fn parse(payload: &[u8]) -> Option<(u32, u64)> {
    let rest = payload.strip_prefix(&MAGIC)?;
    let flow = u32::from_be_bytes(rest.get(..4)?.try_into().ok()?);
    Some((flow, u64::from_be_bytes(rest.get(4..12)?.try_into().ok()?)))
}

/// Requests that arrived at any target and whose fate is not settled yet.
#[derive(Debug, Default)]
pub struct Arrivals {
    seen: Mutex<HashSet<(u32, u64)>>,
    ended: AtomicBool,
}

impl Arrivals {
    /// Whether the request arrived; forgets it.
    pub fn take(&self, flow: u32, sequence: u64) -> bool {
        self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&(flow, sequence))
    }

    /// Ends all witnesses.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    fn insert(&self, packet: (u32, u64)) {
        self.seen.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(packet);
    }
}

/// Starts a witness in a target's namespace; it ends with [`Arrivals::end`].
///
/// # Errors
/// If a packet socket is refused.
pub fn start(target: &Namespace, arrivals: &Arc<Arrivals>) -> Result<()> {
    let arrivals = Arc::clone(arrivals);
    target.run(move || -> Result<()> {
        let all = i32::from((libc::ETH_P_ALL as u16).to_be());
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(Protocol::from(all))).context("packet socket")?;
        socket.attach_filter(&filter()).context("packet filter")?;
        socket.set_read_timeout(Some(Duration::from_millis(100))).context("read timeout")?;
        std::thread::Builder::new()
            .name("witness".to_owned())
            .spawn(move || watch(&socket, &arrivals))
            .context("start the witness")?;
        Ok(())
    })?
}

fn watch(socket: &Socket, arrivals: &Arrivals) {
    use std::io::Read as _;
    let mut buffer = [0; 128];
    while !arrivals.ended.load(Ordering::Relaxed) {
        let mut reader = socket;
        if let Ok(length) = reader.read(&mut buffer) {
            let start = if buffer[0] >> 4 == 4 { 28 } else { 48 };
            if let Some(packet) = buffer.get(start..length).and_then(parse) {
                arrivals.insert(packet);
            }
        }
    }
}

/// Classic BPF over an IP packet: for this host (a bridge floods what is for a neighbour that has just gone), UDP to the flow's port,
/// IPv4 without options or IPv6 without extension headers.
fn filter() -> Vec<SockFilter> {
    let (byte, half, and, equal, end) = (0x30, 0x28, 0x54, 0x15, 0x06);
    let packet_type = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE).cast_unsigned();
    vec![
        SockFilter::new(byte, 0, 0, packet_type),
        SockFilter::new(equal, 12, 0, u32::from(libc::PACKET_OTHERHOST)),
        SockFilter::new(byte, 0, 0, 0),
        SockFilter::new(and, 0, 0, 0xf0),
        SockFilter::new(equal, 0, 4, 0x40),
        SockFilter::new(byte, 0, 0, 9),
        SockFilter::new(equal, 0, 7, 17),
        SockFilter::new(half, 0, 0, 22),
        SockFilter::new(equal, 4, 5, u32::from(UDP_PORT)),
        SockFilter::new(byte, 0, 0, 6),
        SockFilter::new(equal, 0, 3, 17),
        SockFilter::new(half, 0, 0, 42),
        SockFilter::new(equal, 0, 1, u32::from(UDP_PORT)),
        SockFilter::new(end, 0, 0, 128),
        SockFilter::new(end, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_read_back() {
        assert_eq!(parse(&payload(7, 1 << 40)), Some((7, 1 << 40)));
        assert_eq!(parse(b"MDMC"), None);
        assert_eq!(parse(b"something else entirely"), None);
    }
}
