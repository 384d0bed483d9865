//! Which flow: one bit vector per dimension, AND-ed word by word; the first bit left is the flow of highest priority.

use crate::decide::Tables;
use crate::layout::*;
use crate::packet::{Kind, Packet, Transport, protocol};

/// The vectors of one packet. A dimension that no flow uses repeats the destination's: AND does not mind.
pub(crate) struct Dimensions<'a> {
    proto: &'a Vector,
    dst: &'a Vector,
    src: &'a Vector,
    dport: &'a Vector,
    sport: &'a Vector,
}

impl<'a> Dimensions<'a> {
    #[inline(always)]
    pub(crate) fn of<T: Tables>(
        tables: &'a T,
        switches: u32,
        flags: u32,
        dst_class: u32,
        transport: &Transport,
        prefix: &PrefixKey,
    ) -> Option<Self> {
        let kind = transport.kind;
        let generation = switches & 1;
        let base = generation * VECTORS;
        let dst = tables.vector(base + DST_BASE + dst_class)?;
        let proto_class = match kind {
            Kind::Ping => class::PING,
            Kind::Ports => match transport.protocol {
                protocol::TCP => class::TCP,
                protocol::UDP => class::UDP,
                _ => class::SCTP,
            },
            _ => class::OTHER,
        };
        let src_vector = if flags & flag::SOURCES != 0 {
            let class = tables.source(prefix, switches);
            tables.vector(base + SRC_BASE + class)?
        } else {
            dst
        };
        let (dport_vector, sport_vector) = match kind {
            // A ping belongs to the first flow by addresses, whatever its ports are.
            Kind::Ping => (dst, dst),
            Kind::Ports => (
                tables.vector(base + DPORT_BASE + (tables.dport(generation, transport.dport) & PORT_CLASS))?,
                if flags & flag::SOURCE_PORTS != 0 {
                    tables.vector(base + SPORT_BASE + tables.sport(generation, transport.sport))?
                } else {
                    dst
                },
            ),
            _ => (tables.vector(base + DPORT_BASE)?, tables.vector(base + SPORT_BASE)?),
        };
        Some(Dimensions {
            proto: tables.vector(base + PROTO_BASE + proto_class)?,
            dst,
            src: src_vector,
            dport: dport_vector,
            sport: sport_vector,
        })
    }

    #[inline(always)]
    fn summary(&self) -> u64 {
        self.proto.summary & self.dst.summary & self.src.summary & self.dport.summary & self.sport.summary
    }

    #[inline(always)]
    fn word(&self, index: usize) -> u64 {
        self.proto.word(index)
            & self.dst.word(index)
            & self.src.word(index)
            & self.dport.word(index)
            & self.sport.word(index)
    }

    /// As [`Dimensions::word`], of the first word of the summary. Of a vector with one word only its first cache line is read.
    #[inline(always)]
    fn first(&self, index: usize, below: u64) -> u64 {
        self.proto.first(index, below)
            & self.dst.first(index, below)
            & self.src.first(index, below)
            & self.dport.first(index, below)
            & self.sport.first(index, below)
    }
}

/// In which respects a flow matches a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Matched {
    /// Protocol.
    pub protocol: bool,
    /// Destination address.
    pub destination: bool,
    /// Source address.
    pub source: bool,
    /// Destination port.
    pub destination_port: bool,
    /// Source port.
    pub source_port: bool,
    /// Byte matches.
    pub bytes: bool,
}

impl Matched {
    /// In all of them.
    pub const fn all(self) -> bool {
        self.protocol && self.destination && self.source && self.destination_port && self.source_port && self.bytes
    }
}

/// Judges one flow; on the host only. `excluded`: flows of its word whose byte matches do not hold.
pub(crate) fn judge(dimensions: &Dimensions<'_>, excluded: u64, kind: Kind, flags: u32, flow: u32) -> Matched {
    let (index, bit) = ((flow / 64) as usize, 1u64 << (flow % 64));
    let has = |vector: &Vector| vector.word(index) & bit != 0;
    let ping = matches!(kind, Kind::Ping);
    let source_port = ping || (matches!(kind, Kind::Ports) && flags & flag::SOURCE_PORTS == 0);
    Matched {
        protocol: has(dimensions.proto),
        destination: has(dimensions.dst),
        source: flags & flag::SOURCES == 0 || has(dimensions.src),
        destination_port: ping || has(dimensions.dport),
        source_port: source_port || has(dimensions.sport),
        bytes: excluded & bit == 0,
    }
}

/// All bits below the lowest one set; the value is not 0.
#[inline(always)]
fn bits_below(value: u64) -> u64 {
    (value & value.wrapping_neg()).wrapping_sub(1)
}

/// A sequence in which each six bits in a row occur once (de Bruijn), so that a single bit times it has its index in the six highest
/// bits, in other words.
const SEQUENCE: u64 = 0x03f7_9d71_b4cb_0a89;
#[allow(clippy::indexing_slicing)] // at compile time: six bits are an index of 64
static INDEX: [u8; 64] = {
    let mut table = [0; 64];
    let mut n = 0;
    while n < 64 {
        table[(SEQUENCE.wrapping_mul(1 << n) >> 58) as usize] = n as u8;
        n += 1;
    }
    table
};

/// Index of the lowest bit set, 0 to 63; the value is not 0. By hand because eBPF has no such instruction. The black box
/// keeps the compiler from finding out what this is: what it has for it is longer.
#[inline(always)]
fn lowest(value: u64) -> u32 {
    let bit = core::hint::black_box(value & value.wrapping_neg());
    INDEX.get((bit.wrapping_mul(SEQUENCE) >> 58) as usize).copied().unwrap_or(0) as u32
}

/// Index of the flow that the packet belongs to. `asked`: lists of byte matches in use, and which of them do not hold.
#[inline(always)]
pub(crate) fn search<T: Tables>(dimensions: &Dimensions<'_>, tables: &T, asked: &Asked) -> Option<u32> {
    let mut summary = dimensions.summary();
    if summary == 0 {
        return None;
    }
    // Nearly always it is in the first word: this goes before the loop, which is costly to prepare.
    let index = lowest(summary) & (WORDS as u32 - 1);
    let mut bits = dimensions.first(index as usize, bits_below(summary));
    if asked.lists != 0 {
        bits &= !asked.excluded(tables, index as usize);
    }
    if bits != 0 {
        return Some(index * 64 + lowest(bits));
    }
    summary &= summary - 1;
    for _ in 1..WORDS {
        if summary == 0 {
            return None;
        }
        let index = lowest(summary) & (WORDS as u32 - 1);
        summary &= summary - 1;
        let mut bits = dimensions.word(index as usize);
        if asked.lists != 0 {
            bits &= !asked.excluded(tables, index as usize);
        }
        if bits != 0 {
            return Some(index * 64 + lowest(bits));
        }
    }
    None
}

/// Whether all byte matches of a list hold: 0, else 1.
///
/// Statements about another protocol than the packet's do not count. For an ICMP error they are asked of the
/// quoted packet turned round, of which only the ports are known: statements about anything else are taken as met, so
/// that errors do reach the flow of the packet that they are about.
///
/// Without branches within a statement, because the verifier would follow each of them for each list.
#[inline(always)]
fn missed(list: &ByteList, asked: &Asked) -> u64 {
    let mut missed = 0u64;
    for statement in &list.statements {
        if statement.protocol == UNUSED {
            break;
        }
        let (at, odd) = (((statement.offset / 4) & 7) as usize, statement.offset as u32 & 3);
        let word = |i: usize| asked.header.get(i).copied().unwrap_or(0) as u64;
        let word = ((word(at) << 32 | word(at + 1)) << (8 * odd) >> 32) as u32;
        let value = word >> (32u32.wrapping_sub(8 * statement.size as u32) & 31);
        let differs = not_zero((value & statement.mask) ^ statement.value);
        let other = not_zero((statement.protocol ^ asked.protocol) as u32);
        let unknown = (asked.known as u64).wrapping_sub(statement.offset as u64 + statement.size as u64) >> 63;
        missed |= differs & !other & !unknown;
    }
    missed & 1
}

/// 1 for anything but 0, by arithmetic: this machine's comparisons are branches.
#[inline(always)]
fn not_zero(value: u32) -> u64 {
    core::hint::black_box(value as u64).wrapping_neg() >> 63
}

/// What byte matches are asked of, and the answer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Asked {
    /// The beginning of the L4 header, as numbers.
    header: [u32; 9],
    /// Bytes known; statements beyond are taken as met.
    known: u32,
    /// Lists that were asked; 0: byte matches play no part for this packet.
    lists: u32,
    /// First of their vectors.
    base: u32,
    /// Those of them that do not hold, as bits.
    missed: u32,
    /// IP protocol.
    protocol: u8,
}

impl Asked {
    /// Asks each list of byte matches in use once; `false`: the packet or the tables cannot be read. Only a header with
    /// ports can be asked; a ping belongs to a flow by addresses alone.
    #[inline(always)]
    pub(crate) fn ask<P: Packet, T: Tables>(
        &mut self,
        packet: &P,
        tables: &T,
        generation: u32,
        flags: u32,
        transport: &Transport,
        usual: u32,
    ) -> bool {
        self.lists = 0;
        let lists = flag::byte_lists(flags);
        if lists == 0 || !matches!(transport.kind, Kind::Ports) {
            return true;
        }
        if !self.read(packet, transport, usual) {
            return false;
        }
        self.lists = lists;
        let mut all = 0u32;
        for n in 0..MAX_BYTE_LISTS as u32 {
            if n >= self.in_use() {
                break;
            }
            let Some(list) = tables.byte_list(generation, n) else { return false };
            all |= (missed(list, self) as u32) << n;
        }
        self.missed = all;
        self.base = generation * VECTORS + BYTES_BASE;
        true
    }

    /// Number of lists that were asked, read anew each time: from a number that it remembers the verifier would conclude
    /// where a loop up to it has ended, and follow what comes behind for each end.
    #[inline(always)]
    fn in_use(&self) -> u32 {
        *core::hint::black_box(&self.lists)
    }

    /// Flows of a word whose byte matches do not hold.
    #[inline(always)]
    pub(crate) fn excluded<T: Tables>(&self, tables: &T, index: usize) -> u64 {
        let mut excluded = 0;
        for n in 0..MAX_BYTE_LISTS as u32 {
            if n >= self.in_use() {
                break;
            }
            let Some(flows) = tables.vector(self.base + n) else { break };
            excluded |= flows.word(index) & ((self.missed >> n & 1) as u64).wrapping_neg();
        }
        excluded
    }

    /// Reads the header, which was found to be complete.
    #[inline(always)]
    fn read<P: Packet>(&mut self, packet: &P, transport: &Transport, usual: u32) -> bool {
        self.protocol = transport.protocol;
        if transport.quote != 0 {
            self.known = 4;
            self.header[0] = (transport.sport as u32) << 16 | transport.dport as u32;
            return true;
        }
        match transport.protocol {
            protocol::TCP => {
                self.known = 20;
                packet.words::<5>(transport.offset, usual).map(|h| self.fill(h)).is_some()
            }
            protocol::UDP => {
                self.known = 8;
                packet.words::<2>(transport.offset, usual).map(|h| self.fill(h)).is_some()
            }
            _ => {
                self.known = 12;
                packet.words::<3>(transport.offset, usual).map(|h| self.fill(h)).is_some()
            }
        }
    }

    #[inline(always)]
    fn fill<const N: usize>(&mut self, words: [u32; N]) {
        for (to, from) in self.header.iter_mut().zip(words) {
            *to = u32::from_be(from);
        }
    }
}
