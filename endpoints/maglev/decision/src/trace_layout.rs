//! The shapes of the trace, a part of the [layout](crate::layout).

use crate::layout::MAX_REASONS;

/// Entry of the per-reason counters that counts trace events for which there was no room.
pub const TRACE_LOST: u32 = MAX_REASONS as u32 - 1;

/// Prefixes and port ranges of each kind in a [`Trace`].
pub const TRACE_ALTERNATIVES: usize = 4;
/// Bytes of the ring buffer of the trace; a power of two and a multiple of the page size.
pub const TRACE_RING: u32 = 1 << 19;

/// Bits of [`Trace::protocols`].
pub mod trace_protocol {
    /// TCP.
    pub const TCP: u32 = 1;
    /// UDP.
    pub const UDP: u32 = 2;
    /// SCTP.
    pub const SCTP: u32 = 4;
    /// ICMP and ICMPv6.
    pub const ICMP: u32 = 8;
    /// Every other protocol.
    pub const OTHER: u32 = 16;
    /// All of them.
    pub const ALL: u32 = 31;
}

/// A prefix of (mapped) IPv6 addresses as words in memory order: no address bit outside the mask.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Masked {
    /// Network.
    pub net: [u64; 2],
    /// Mask; 0: every address.
    pub mask: [u64; 2],
}

/// Ports from `low` to `high`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Lowest.
    pub low: u16,
    /// Highest.
    pub high: u16,
}

impl Ports {
    /// Every port, and packets without ports.
    pub const ANY: Ports = Ports { low: 0, high: u16::MAX };
}

/// Which packets are traced; one of each list has to match. Unused places repeat the first one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The trace is on until this time of the monotonic clock, ns; 0: off.
    pub until: u64,
    /// See [`trace_protocol`].
    pub protocols: u32,
    /// Not 0: only dropped packets.
    pub only_dropped: u32,
    /// Source prefixes.
    pub sources: [Masked; TRACE_ALTERNATIVES],
    /// Destination prefixes.
    pub destinations: [Masked; TRACE_ALTERNATIVES],
    /// Source ports.
    pub source_ports: [Ports; TRACE_ALTERNATIVES],
    /// Destination ports.
    pub destination_ports: [Ports; TRACE_ALTERNATIVES],
}

impl Default for Trace {
    fn default() -> Self {
        Trace {
            until: 0,
            protocols: trace_protocol::ALL,
            only_dropped: 0,
            sources: [Masked::default(); TRACE_ALTERNATIVES],
            destinations: [Masked::default(); TRACE_ALTERNATIVES],
            source_ports: [Ports::ANY; TRACE_ALTERNATIVES],
            destination_ports: [Ports::ANY; TRACE_ALTERNATIVES],
        }
    }
}

/// Bits of [`TraceEvent::flags`].
pub mod trace_flag {
    /// IPv6.
    pub const V6: u32 = 1;
    /// An ICMP error; ports and protocol are those of the quoted packet turned round.
    pub const QUOTE: u32 = 2;
    /// First fragment.
    pub const FIRST_FRAGMENT: u32 = 4;
    /// A later fragment.
    pub const LATER_FRAGMENT: u32 = 8;
    /// The ports are ports.
    pub const PORTS: u32 = 16;
    /// ICMP echo; the source port is its identifier.
    pub const PING: u32 = 32;
}

/// What happened to one packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TraceEvent {
    /// Monotonic clock, ns.
    pub time: u64,
    /// Source address (IPv4 mapped into IPv6).
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
    /// Next hop; all zero when dropped.
    pub next_hop: [u8; 16],
    /// See [`trace_flag`].
    pub flags: u32,
    /// Protocol that the flow was looked up by.
    pub protocol: u32,
    /// Source port in the high half, destination port in the low one.
    pub ports: u32,
    /// Bytes from the network header on.
    pub bytes: u32,
    /// Packets that a super-packet stands for, else 1.
    pub segments: u32,
    /// TTL or hop limit at arrival.
    pub ttl: u32,
    /// Interface that it came in by.
    pub ifindex_in: u32,
    /// Interface towards the target; 0: dropped.
    pub ifindex_out: u32,
    /// See [`crate::Verdict`]: drop or forward.
    pub verdict: u32,
    /// See [`crate::Reason`].
    pub reason: u32,
    /// Generation of the classifier.
    pub generation: u32,
    /// Index of the flow in the classifier.
    pub flow: u32,
    /// Index of the flow's counter.
    pub counter: u32,
    /// Slot of the stream.
    pub slot: u32,
    /// Row of the stream's table.
    pub row: u32,
    /// Identifier of the target.
    pub identifier: u32,
    /// Translated destination port; 0: unchanged.
    pub nat_port: u32,
    /// Explicit padding.
    pub pad: u32,
}
