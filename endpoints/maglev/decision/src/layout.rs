//! The shapes shared by the eBPF program and user space: what lies in the maps, byte for byte.
//!
//! Everything here is `repr(C)` without padding that is not named, because user space writes it as raw bytes.
//! A change of anything in this file or in `trace_layout.rs` changes [`LAYOUT_VERSION`]: maps of another version are never adopted.

/// Version of the map layout. Pinned maps live in a directory of this name, so an upgraded process never reads
/// maps that mean something else.
pub const LAYOUT_VERSION: u32 = 6;

pub use crate::trace_layout::*;

/// Flows that one classifier can hold; more is an error of the configuration.
pub const MAX_FLOWS: usize = 2048;
/// Counters of flows: those of two generations of flows fit.
pub const FLOW_COUNTERS: u32 = 2 * MAX_FLOWS as u32;
/// 64-bit words of a bit vector over the flows.
pub const WORDS: usize = MAX_FLOWS / 64;
/// Byte matches of one flow.
pub const MAX_BYTE_MATCHES: usize = 4;
/// Different lists of byte matches in one classifier.
pub const MAX_BYTE_LISTS: usize = 32;

/// Streams that one load balancer can hold.
pub const MAX_STREAMS: usize = 256;
/// Sum of the `max-targets` of all streams.
pub const MAX_TARGETS: usize = 32_768;
/// Rows of one chunk of the row map; a stream's table is one or more chunks.
pub const CHUNK_ROWS: usize = 65_600;
/// Chunks of the row map unless the loader is told otherwise (128 KiB each).
pub const DEFAULT_CHUNKS: usize = 128;

/// Next hops that each CPU remembers (64 bytes each), of two IP versions; a power of two. Targets whose numbers are half as many apart
/// share a place, and each turn of the two costs a packet the way past the neighbour entry.
pub const HOP_ENTRIES: u32 = 16_384;

/// Destinations that each CPU remembers; a power of two.
pub const DESTINATIONS_REMEMBERED: u32 = 256;
/// Sources that each CPU remembers; a power of two.
pub const CLIENTS_REMEMBERED: u32 = 1024;

/// Dimension of the classifier: IP protocol class.
pub const PROTO_CLASSES: usize = 8;
/// Dimension of the classifier: destination prefix.
pub const DST_CLASSES: usize = 2048;
/// Dimension of the classifier: source prefix. Class 0 is "no prefix of any flow".
pub const SRC_CLASSES: usize = 4096;
/// Dimension of the classifier: a port. Class 0 is "the packet has no ports".
pub const PORT_CLASSES: usize = 4096;

/// Entries of the VIP map for each generation.
pub const VIP_PREFIXES: usize = DST_CLASSES;
/// Entries of the source map for each generation.
pub const SOURCE_PREFIXES: usize = 65_536;
/// Entries of the map of translations for each generation: two for each VIP prefix of a port translation.
pub const NAT_ENTRIES: usize = 4096;

/// The class in an entry of the destination ports' map.
pub const PORT_CLASS: u32 = PORT_CLASSES as u32 - 1;
/// In such an entry, by direction (see [`NatKey::direction`]): some VIP and protocol may have this port translated.
pub const PORT_TRANSLATED: [u16; 2] = [0x8000, 0x4000];
const _: () = assert!(PORT_CLASS < 0x4000);

/// Index of the first vector of each dimension within one generation.
pub const PROTO_BASE: u32 = 0;
/// See [`PROTO_BASE`].
pub const DST_BASE: u32 = PROTO_BASE + PROTO_CLASSES as u32;
/// See [`PROTO_BASE`].
pub const SRC_BASE: u32 = DST_BASE + DST_CLASSES as u32;
/// See [`PROTO_BASE`].
pub const DPORT_BASE: u32 = SRC_BASE + SRC_CLASSES as u32;
/// See [`PROTO_BASE`].
pub const SPORT_BASE: u32 = DPORT_BASE + PORT_CLASSES as u32;
/// Flows that have a list of byte matches.
pub const BYTES_BASE: u32 = SPORT_BASE + PORT_CLASSES as u32;
/// Vectors of one generation.
pub const VECTORS: u32 = BYTES_BASE + MAX_BYTE_LISTS as u32;

/// Protocol classes (index within the protocol dimension).
pub mod class {
    /// No port-carrying protocol: matched by flows that name no protocol.
    pub const OTHER: u32 = 0;
    /// TCP.
    pub const TCP: u32 = 1;
    /// UDP.
    pub const UDP: u32 = 2;
    /// SCTP.
    pub const SCTP: u32 = 3;
    /// ICMP echo: matched by addresses alone.
    pub const PING: u32 = 4;
}

/// Bits of [`Config::flags`].
pub mod flag {
    /// At least one flow has source prefixes.
    pub const SOURCES: u32 = 1;
    /// At least one flow has source ports.
    pub const SOURCE_PORTS: u32 = 2;
    /// At least one port is translated.
    pub const NAT: u32 = 4;
    /// The number of lists of byte matches in use begins at this bit.
    pub const BYTE_LISTS_SHIFT: u32 = 8;

    /// How many lists of byte matches the flows have; they lie at the first places.
    #[inline(always)]
    pub const fn byte_lists(flags: u32) -> u32 {
        flags >> BYTE_LISTS_SHIFT & 0xff
    }
}

/// Bits of [`StreamEntry::flags`].
pub mod stream_flag {
    /// SCTP hashes on its ports only, so that all paths of a multihomed association meet in one target.
    pub const SCTP_PORTS_ONLY: u32 = 1;
}

/// The one entry of the configuration map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Switches of the classifier so far; the lowest bit is the generation that packets use. One number, so that a packet which
    /// reads it once knows both: what is remembered of a generation is known by it.
    pub switches: u32,
    /// Flags of each generation, see [`flag`].
    pub flags: [u32; 2],
    /// [`LAYOUT_VERSION`] once the maps hold a complete configuration, else 0.
    pub version: u32,
    /// Not 0: the program records each decision for tests.
    pub record: u32,
    /// Interface towards the process that holds fragments which arrive before their first one; 0: nobody does.
    pub hold: u32,
}

impl Config {
    /// Generation of the classifier that packets use: 0 or 1.
    pub const fn generation(&self) -> u32 {
        self.switches & 1
    }
}

/// A set of flows as bits, ordered by priority: bit 0 of word 0 is the flow that wins over all others.
///
/// It fills whole cache lines, and most packets need the first one only: few flows have a port, so that the first word with
/// any is the one that is asked for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Vector {
    /// Bit `i` is set when `words[i]` is not zero.
    pub summary: u64,
    /// The first word that is not zero once more; 0: none is.
    pub first: u64,
    /// The flows.
    pub words: [u64; WORDS],
    /// Explicit padding.
    pub pad: [u64; 6],
}

impl Default for Vector {
    fn default() -> Self {
        Vector::new([0; WORDS])
    }
}

impl Vector {
    /// The flows whose bits are set.
    pub fn new(words: [u64; WORDS]) -> Self {
        let mut vector = Vector { summary: 0, first: 0, words, pad: [0; 6] };
        for (n, word) in words.iter().enumerate().rev().filter(|(_, word)| **word != 0) {
            vector.summary |= 1 << n;
            vector.first = *word;
        }
        vector
    }

    /// A word; 0 beyond the last one.
    #[inline(always)]
    pub fn word(&self, index: usize) -> u64 {
        match self.words.get(index) {
            Some(word) => *word,
            None => 0,
        }
    }

    /// The word of a bit that the summary has. `below`: all bits below that one.
    #[inline(always)]
    pub(crate) fn first(&self, index: usize, below: u64) -> u64 {
        if self.summary & below == 0 { self.first } else { self.word(index) }
    }
}

/// Protocol of a [`ByteMatch`] that is not used, and none behind it is.
pub const UNUSED: u8 = u8::MAX;

/// `protocol[offset:size] & mask == value`, read big-endian from the L4 header.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ByteMatch {
    /// IP protocol number that this statement is about; ignored for packets of another protocol. [`UNUSED`] ends
    /// the list.
    pub protocol: u8,
    /// 1, 2 or 4 bytes.
    pub size: u8,
    /// Offset within the L4 header.
    pub offset: u16,
    /// Mask applied to the value read.
    pub mask: u32,
    /// Value expected.
    pub value: u32,
}

/// A list of byte matches, all of which must hold.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ByteList {
    /// The statements, the unused ones last.
    pub statements: [ByteMatch; MAX_BYTE_MATCHES],
}

impl Default for ByteList {
    fn default() -> Self {
        let unused = ByteMatch { protocol: UNUSED, size: 4, offset: 0, mask: 0, value: 0 };
        ByteList { statements: [unused; MAX_BYTE_MATCHES] }
    }
}

/// What a flow does.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowEntry {
    /// Slot of the stream.
    pub slot: u32,
    /// Index of the flow's counter; stable over generations.
    pub counter: u32,
}

/// One stream: where its two tables and its targets are.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamEntry {
    /// Copy that packets use: 0 or 1. A swap changes this one byte.
    pub active: u32,
    /// Not 0 for a copy that has at least one target.
    pub ready: [u32; 2],
    /// Rows of a table; 0 marks a free slot.
    pub rows: u32,
    /// First chunk of each copy in the row map.
    pub chunk: [u32; 2],
    /// Index of identifier 0 of this stream among the targets (identifiers start at 1).
    pub target_base: u32,
    /// Highest identifier.
    pub max_targets: u32,
    /// See [`stream_flag`].
    pub flags: u32,
    /// Counts swaps, for observers.
    pub swaps: u32,
    /// When each copy was written, monotonic clock, ns: what was found out about its targets is known by it.
    pub written: [u64; 2],
}

/// One target in one copy of its stream.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TargetEntry {
    /// IPv6 next hop (the target's own address).
    pub v6: [u8; 16],
    /// IPv4 next hop.
    pub v4: [u8; 4],
    /// Interface towards `v4`; 0: none.
    pub ifindex4: u32,
    /// Interface towards `v6`; 0: none.
    pub ifindex6: u32,
    /// Firewall mark of the slow path.
    pub mark: u32,
    /// MTU of the interface, for kernels without `bpf_check_mtu`; 0: not known.
    pub mtu: u32,
    /// Not 0: the interfaces are ends of veth pairs whose other ends are in other network namespaces.
    pub direct: u32,
}

/// Identifies the fragments of one packet.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address (IPv4 mapped into IPv6).
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
    /// Identification.
    pub id: u32,
    /// IP protocol.
    pub protocol: u32,
}

/// Where the first fragment went.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FragmentValue {
    /// When the first fragment was seen, monotonic clock, ns.
    pub seen: u64,
    /// Slot of the stream.
    pub slot: u32,
    /// Identifier of the target.
    pub identifier: u32,
    /// Index of the flow's counter.
    pub counter: u32,
    /// Explicit padding.
    pub pad: u32,
}

/// Key of a port translation.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NatKey {
    /// Generation of the classifier.
    pub generation: u32,
    /// Destination class of the VIP.
    pub class: u32,
    /// IP protocol.
    pub protocol: u16,
    /// 0: from outside to the target, 1: back.
    pub direction: u16,
    /// Port before the translation.
    pub port: u32,
}

/// Key of the prefix maps: generation, then address (IPv4 mapped into IPv6).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixKey {
    /// Bits that count: [`PREFIX_KEY_BITS`] and the length of the prefix within 128 bits.
    pub bits: u32,
    /// Generation of the classifier, plus [`IPV4_SPACE`]: `::/0` must not contain mapped IPv4 addresses.
    pub space: u32,
    /// Address.
    pub address: [u8; 16],
}

/// See [`PrefixKey::space`].
pub const IPV4_SPACE: u32 = 2;

/// Bits of a prefix key before the address.
pub const PREFIX_KEY_BITS: u32 = 32;

/// Value of the VIP map: the destination class, and whether the prefix lies within a VIP at all.
pub const NOT_A_VIP: u32 = u32::MAX;

/// Packets and bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets. A super-packet (GRO, GSO) counts as the segments that the kernel says it stands for.
    pub packets: u64,
    /// Bytes from the network header on; of a super-packet the headers count once.
    pub bytes: u64,
}

/// Entries of the per-reason counters: [`crate::Reason`] values and the slow-path reasons share one space.
pub const MAX_REASONS: usize = 32;

/// Port classes of one dimension and generation, one map value. (Of destination ports also [`PORT_TRANSLATED`].)
pub type PortMap = [u16; 65_536];
/// One chunk of rows, one map value.
pub type Chunk = [u16; CHUNK_ROWS];
