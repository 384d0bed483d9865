//! Switches the trace on and reads its events. It is off again when the tracer is dropped, and two seconds after it was killed.
#![allow(unsafe_code)] // SAFETY: flock, poll, and the plain bytes of an event; each call says why.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use aya::maps::{Map, MapData, RingBuf};
use ipnet::IpNet;
use meridio_decision::layout::*;

use crate::config::{Protocol, mapped_address};
use crate::engine::failed;
use crate::error::Error;
use crate::live::Live;
use crate::sys::{self, RawMap};

/// How long the trace outlives a tracer that was killed.
const LEASE: Duration = Duration::from_secs(2);
/// How often a living tracer prolongs it.
const RENEW: Duration = Duration::from_millis(500);

/// Which packets to trace; of each list one item has to match, an empty list matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Protocols with ports; with `icmp` false and this empty: every protocol.
    pub protocols: Vec<Protocol>,
    /// ICMP and ICMPv6.
    pub icmp: bool,
    /// Source prefixes, at most four.
    pub sources: Vec<IpNet>,
    /// Destination prefixes, at most four.
    pub destinations: Vec<IpNet>,
    /// Source ports, inclusive ranges, at most four.
    pub source_ports: Vec<(u16, u16)>,
    /// Destination ports, inclusive ranges, at most four.
    pub destination_ports: Vec<(u16, u16)>,
    /// Only packets that are dropped.
    pub only_dropped: bool,
}

impl Filter {
    /// The filter as the program reads it, switched off.
    ///
    /// # Errors
    /// A list is longer than the program reads.
    pub fn entry(&self) -> Result<Trace, Error> {
        let mut protocols = if self.icmp { trace_protocol::ICMP } else { 0 };
        for protocol in &self.protocols {
            protocols |= match protocol {
                Protocol::Tcp => trace_protocol::TCP,
                Protocol::Udp => trace_protocol::UDP,
                Protocol::Sctp => trace_protocol::SCTP,
            };
        }
        let ranges = |what, list: &[(u16, u16)]| {
            let list: Vec<Ports> = list.iter().map(|(low, high)| Ports { low: *low, high: *high }).collect();
            fill(what, &list, Ports::ANY)
        };
        let nets = |what, list: &[IpNet]| {
            let list: Vec<Masked> = list.iter().map(masked).collect();
            fill(what, &list, Masked::default())
        };
        Ok(Trace {
            until: 0,
            protocols: if protocols == 0 { trace_protocol::ALL } else { protocols },
            only_dropped: self.only_dropped as u32,
            sources: nets("source prefixes", &self.sources)?,
            destinations: nets("destination prefixes", &self.destinations)?,
            source_ports: ranges("source ports", &self.source_ports)?,
            destination_ports: ranges("destination ports", &self.destination_ports)?,
        })
    }
}

/// The list with its first item repeated, or all `any`.
fn fill<T: Copy>(what: &str, list: &[T], any: T) -> Result<[T; TRACE_ALTERNATIVES], Error> {
    if list.len() > TRACE_ALTERNATIVES {
        return Err(Error::config("trace", format!("{} {what} are more than {TRACE_ALTERNATIVES}", list.len())));
    }
    let mut filled = [list.first().copied().unwrap_or(any); TRACE_ALTERNATIVES];
    for (to, from) in filled.iter_mut().zip(list) {
        *to = *from;
    }
    Ok(filled)
}

fn words(bytes: [u8; 16]) -> [u64; 2] {
    let mut words = [0; 2];
    for (word, half) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_ne_bytes(*half);
    }
    words
}

fn masked(net: &IpNet) -> Masked {
    let length = net.prefix_len() as u32 + if net.addr().is_ipv4() { 96 } else { 0 };
    let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
    Masked { net: words(mapped_address(net.network())), mask: words(mask.to_be_bytes()) }
}

/// A trace that is on.
pub struct Tracer {
    live: Live,
    switch: RawMap,
    entry: Trace,
    events: RingBuf<MapData>,
    renewed: Instant,
    lost: u64,
    /// Holds the lock on the directory of the maps: one trace at a time.
    _lock: OwnedFd,
}

impl Tracer {
    /// Switches the trace on.
    ///
    /// # Errors
    /// The filter does not fit, another process traces, or the maps cannot be used.
    pub fn start(live: Live, filter: &Filter) -> Result<Self, Error> {
        let entry = filter.entry()?;
        let lock = lock(&live.directory)?;
        let open = |name: &'static str| {
            RawMap::pinned_writable(&live.directory.join(name), name)
                .map_err(|e| Error::Map { name, reason: e.to_string() })
        };
        let switch = open("TRACE")?;
        let fault = |reason: String| Error::Map { name: "TRACE_EVENTS", reason };
        let data = MapData::from_pin(live.directory.join("TRACE_EVENTS")).map_err(|e| fault(e.to_string()))?;
        let events = RingBuf::try_from(Map::RingBuf(data)).map_err(|e| fault(e.to_string()))?;
        let lost = live.trace_lost()?;
        let mut tracer = Tracer { live, switch, entry, events, renewed: Instant::now(), lost, _lock: lock };
        // An earlier trace that was killed may still be on: off with it, and away with what it has left.
        tracer.write(0)?;
        sys::grace_period();
        while tracer.events.next().is_some() {}
        tracer.renew()?;
        Ok(tracer)
    }

    fn write(&mut self, until: u64) -> Result<(), Error> {
        self.entry.until = until;
        self.switch.set(&0u32, &self.entry).map_err(failed(&self.switch))
    }

    fn renew(&mut self) -> Result<(), Error> {
        self.renewed = Instant::now();
        self.write(sys::monotonic() + LEASE.as_nanos() as u64)
    }

    /// The maps that are traced.
    pub fn live(&self) -> &Live {
        &self.live
    }

    /// The next event; `None` when there was none within `patience`. It has to be called at least every second.
    ///
    /// # Errors
    /// The trace cannot be prolonged.
    pub fn next(&mut self, patience: Duration) -> Result<Option<TraceEvent>, Error> {
        let deadline = Instant::now() + patience;
        loop {
            if self.renewed.elapsed() >= RENEW {
                self.renew()?;
            }
            if let Some(item) = self.events.next() {
                if let Some(event) = event(&item) {
                    return Ok(Some(event));
                }
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            wait(self.events.as_raw_fd(), left.min(RENEW));
        }
    }

    /// Packets that the filter wanted, but for which there was no room.
    ///
    /// # Errors
    /// The counter cannot be read.
    pub fn lost(&self) -> Result<u64, Error> {
        Ok(self.live.trace_lost()?.saturating_sub(self.lost))
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // If this fails, the deadline in the map ends it.
        let _ = self.write(0);
    }
}

fn event(bytes: &[u8]) -> Option<TraceEvent> {
    if bytes.len() < size_of::<TraceEvent>() {
        return None;
    }
    // SAFETY: enough bytes, and every bit pattern is a valid event.
    Some(unsafe { bytes.as_ptr().cast::<TraceEvent>().read_unaligned() })
}

/// Waits until the descriptor is readable, at most for `patience`.
fn wait(fd: i32, patience: Duration) {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let milliseconds = patience.as_millis().clamp(1, 1000) as i32;
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&raw mut poll, 1, milliseconds) };
}

fn lock(directory: &PathBuf) -> Result<OwnedFd, Error> {
    let file = std::fs::File::open(directory).map_err(|source| Error::Io { path: directory.clone(), source })?;
    // SAFETY: a live descriptor.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        let source = std::io::Error::last_os_error();
        return Err(match source.kind() {
            std::io::ErrorKind::WouldBlock => Error::Traced { directory: directory.clone() },
            _ => Error::Io { path: directory.clone(), source },
        });
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_become_masks_in_memory_order() {
        let v4 = masked(&"10.1.2.3/8".parse().unwrap());
        let bytes = |w: [u64; 2]| [w[0].to_ne_bytes(), w[1].to_ne_bytes()].concat();
        assert_eq!(bytes(v4.net)[10..], [0xff, 0xff, 10, 0, 0, 0]);
        assert_eq!(bytes(v4.mask)[10..], [0xff, 0xff, 0xff, 0, 0, 0]);
        assert_eq!(masked(&"::/0".parse().unwrap()), Masked::default());
        assert_eq!(bytes(masked(&"2000::1/128".parse().unwrap()).mask), [0xff; 16]);
    }

    #[test]
    fn a_filter_that_does_not_fit_is_refused() {
        let filter = Filter { source_ports: vec![(1, 1); 5], ..Filter::default() };
        assert_eq!(filter.entry().unwrap_err().to_string(), "trace: 5 source ports are more than 4");
        let two = Filter { destination_ports: vec![(80, 80), (443, 444)], ..Filter::default() }.entry().unwrap();
        assert_eq!(two.destination_ports.map(|p| p.low), [80, 443, 80, 80]);
        assert_eq!((two.protocols, two.source_ports[3]), (trace_protocol::ALL, Ports::ANY));
    }
}
