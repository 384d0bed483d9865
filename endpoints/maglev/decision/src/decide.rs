//! From packet to target: the decision itself, over whatever holds the tables.

use crate::classify::{Asked, Dimensions, Matched, judge, search};
use crate::layout::*;
use crate::packet::{self, Kind, Network, Packet, Transport, protocol};
use crate::{Reason, hash};

/// How long a later fragment follows the first one, ns. (A host gives up reassembly after 30 s or more, but fragments
/// of one packet travel together.)
pub const FRAGMENT_LIFETIME: u64 = 2_000_000_000;

/// The tables of a load balancer: maps in the kernel, vectors on the host.
pub trait Tables {
    /// Switches so far, of which the lowest bit is the generation in use, and its flags (see [`flag`]).
    fn generation(&self) -> (u32, u32);
    /// Destination class of the longest prefix around the address; [`NOT_A_VIP`] or `None`: not ours. `switches`: those by which the
    /// generation of the key was found.
    fn destination(&self, key: &PrefixKey, switches: u32) -> Option<u32>;
    /// Source class of the longest prefix around the address; 0: none is. `switches`: as above.
    fn source(&self, key: &PrefixKey, switches: u32) -> u32;
    /// Class of a destination port ([`PORT_CLASS`]), and whether it may be translated ([`PORT_TRANSLATED`]).
    fn dport(&self, generation: u32, port: u16) -> u32;
    /// Class of a source port.
    fn sport(&self, generation: u32, port: u16) -> u32;
    /// A bit vector.
    fn vector(&self, index: u32) -> Option<&Vector>;
    /// A flow of a generation.
    fn flow(&self, generation: u32, index: u32) -> Option<&FlowEntry>;
    /// A list of byte matches of a generation.
    fn byte_list(&self, generation: u32, index: u32) -> Option<&ByteList>;
    /// A stream; one that is not used has no ready target. Of each slot below [`MAX_STREAMS`] there is one.
    fn stream(&self, slot: u32) -> Option<&StreamEntry>;
    /// The copy of a stream's table that is in use (read once per packet: it may change any time).
    fn active(&self, stream: &StreamEntry) -> u32;
    /// Identifier in a row.
    fn row(&self, chunk: u32, index: u32) -> Option<u16>;
    /// Begins to read what belongs to a target, of a packet that most likely goes there; on the host there is nothing to do.
    fn fetch(&self, target: u32, v6: bool) {
        let _ = (target, v6);
    }
    /// A target.
    fn target(&self, index: u32) -> Option<&TargetEntry>;
    /// Translated port.
    fn nat(&self, key: &NatKey) -> Option<u16>;
    /// Where the first fragment of this packet went.
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue>;
    /// Remembers where the first fragment went.
    fn remember(&self, key: &FragmentKey, value: &FragmentValue);
    /// Monotonic clock, ns.
    fn now(&self) -> u64;
}

/// What is to be done with a packet.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not ours: the stack decides.
    Pass = 0,
    /// Ours, and it ends here.
    Drop = 1,
    /// To a target.
    Forward = 2,
}

/// No flow, no target, no row.
pub const NONE: u32 = u32::MAX;

/// The whole answer, in a form that the kernel can hand out.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// See [`Verdict`].
    pub verdict: u32,
    /// See [`Reason`]; [`Reason::None`] unless dropped.
    pub reason: u32,
    /// Index of the flow in the classifier; [`NONE`].
    pub flow: u32,
    /// Index of the flow's counter; [`NONE`].
    pub counter: u32,
    /// Slot of the stream; [`NONE`].
    pub slot: u32,
    /// Row of the stream's table; [`NONE`] also for later fragments.
    pub row: u32,
    /// Identifier of the target; 0: none.
    pub identifier: u32,
    /// Index of the target's entry; [`NONE`].
    pub target: u32,
    /// Translated destination port (for an ICMP error: of the quoted source); 0: unchanged.
    pub nat_port: u32,
}

impl Decision {
    /// Not ours.
    pub const PASS: Decision = Decision {
        verdict: Verdict::Pass as u32,
        reason: Reason::None as u32,
        flow: NONE,
        counter: NONE,
        slot: NONE,
        row: NONE,
        identifier: 0,
        target: NONE,
        nat_port: 0,
    };
}

impl Default for Decision {
    fn default() -> Self {
        Decision::PASS
    }
}

/// The stream that a packet most likely belongs to: that of the last one with a similar port.
#[derive(Clone, Copy, Debug)]
struct Expected([u8; EXPECTED]);
/// As many as one byte has values.
const EXPECTED: usize = 256;
const _: () = assert!(MAX_STREAMS <= EXPECTED, "a slot is a byte");

impl Default for Expected {
    fn default() -> Self {
        Expected([0; EXPECTED])
    }
}

impl Expected {
    #[inline(always)]
    fn of(&mut self, port: u16) -> Option<&mut u8> {
        self.0.get_mut(port as usize % EXPECTED)
    }
}

/// What a decision needs memory for. The eBPF side keeps it in a per-CPU map.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scratch {
    /// Network header.
    pub network: Network,
    /// Network header of the packet that an ICMP error quotes.
    pub quoted: Network,
    /// Transport header.
    pub transport: Transport,
    /// The answer.
    pub decision: Decision,
    /// Destination class of the VIP.
    pub class: u32,
    /// Generation of the classifier that was asked.
    pub generation: u32,
    /// Switches by which it was found.
    switches: u32,
    /// When the copy of the stream's targets was written (see [`StreamEntry::written`]); set with a target.
    pub written: u64,
    prefix: PrefixKey,
    /// What the fragments of the packet have in common; set for fragments only.
    pub fragment: FragmentKey,
    first: FragmentValue,
    nat: NatKey,
    asked: Asked,
    expected: Expected,
}

impl Scratch {
    /// Fixes the generation that this packet uses, see [`Tables::generation`].
    #[inline(always)]
    pub fn enter(&mut self, switches: u32) {
        self.switches = switches;
        self.generation = switches & 1;
    }
}

/// Decides about a packet that arrived from outside; the answer is in `s.decision`.
#[inline(always)]
pub fn decide<P: Packet, T: Tables>(packet: &P, tables: &T, ethertype: u16, s: &mut Scratch) {
    s.decision = Decision::PASS;
    if !packet::network(packet, ethertype, 0, &mut s.network) {
        return;
    }
    let (switches, flags) = tables.generation();
    s.enter(switches);
    if !vip_class(tables, s, End::Destination) {
        return;
    }
    let result = match packet::transport(packet, &s.network, &mut s.quoted, &mut s.transport) {
        Err(reason) => Err(reason),
        Ok(()) => match s.transport.kind {
            Kind::Local => return,
            Kind::LaterFragment => later_fragment(tables, s),
            _ => balance(packet, tables, flags, s),
        },
    };
    match result {
        Ok(()) => s.decision.verdict = Verdict::Forward as u32,
        Err(reason) => {
            s.decision.verdict = Verdict::Drop as u32;
            s.decision.reason = reason as u32;
        }
    }
}

/// Which address of a packet is asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The destination.
    Destination,
    /// The source.
    Source,
    /// The destination of the packet that an ICMP error quotes.
    QuotedDestination,
}

/// Looks an address of the packet up among the VIPs; `false`: not one.
#[inline(always)]
pub fn vip_class<T: Tables>(tables: &T, s: &mut Scratch, end: End) -> bool {
    s.prefix.bits = PREFIX_KEY_BITS + 128;
    s.prefix.space = if s.network.v6 { s.generation } else { s.generation + IPV4_SPACE };
    s.prefix.address = match end {
        End::Destination => s.network.dst,
        End::Source => s.network.src,
        End::QuotedDestination => s.quoted.dst,
    };
    match tables.destination(&s.prefix, s.switches) {
        None | Some(NOT_A_VIP) => false,
        Some(class) => {
            s.class = class;
            true
        }
    }
}

/// The translation of `port` in a direction (0: towards targets); 0: none.
#[inline(always)]
pub fn translation<T: Tables>(tables: &T, s: &mut Scratch, direction: u16, port: u16) -> u16 {
    let may = if direction == 0 { PORT_TRANSLATED[0] } else { PORT_TRANSLATED[1] };
    if tables.dport(s.generation, port) & may as u32 == 0 {
        return 0;
    }
    s.nat = NatKey {
        generation: s.generation,
        class: s.class,
        protocol: s.transport.protocol as u16,
        direction,
        port: port as u32,
    };
    tables.nat(&s.nat).unwrap_or(0)
}

/// Flow, row, target.
#[inline(always)]
fn balance<P: Packet, T: Tables>(packet: &P, tables: &T, flags: u32, s: &mut Scratch) -> Result<(), Reason> {
    // Row, next hop and the port's flows are in no cache when there are many, so each is a wait for memory. Rather than one
    // after the other, they begin here together.
    let expected = expected(tables, s).ok_or(Reason::Internal)?;
    if flags & flag::SOURCES != 0 {
        s.prefix.address = if s.transport.quote != 0 { s.quoted.dst } else { s.network.src };
    }
    let dimensions =
        Dimensions::of(tables, s.switches, flags, s.class, &s.transport, &s.prefix).ok_or(Reason::Internal)?;
    if !s.asked.ask(packet, tables, s.generation, flags, &s.transport, s.network.usual()) {
        return Err(Reason::Internal);
    }
    let index = search(&dimensions, tables, &s.asked).ok_or(Reason::NoFlow)?;
    let flow = tables.flow(s.generation, index).ok_or(Reason::Internal)?;
    let slot = flow.slot;
    s.decision.flow = index;
    s.decision.counter = flow.counter;
    s.decision.slot = slot;
    let place = if expected.slot == slot {
        expected
    } else {
        if let Some(expected) = s.expected.of(s.transport.dport) {
            *expected = slot as u8;
        }
        // A flow whose stream is not known has a slot that there is not.
        place(tables, s, slot).ok_or(Reason::NoTarget)?
    };
    let Place { stream, copy, row, identifier, .. } = place;
    let ready = if copy == 0 { stream.ready[0] } else { stream.ready[1] };
    if ready == 0 {
        return Err(Reason::NoTarget);
    }
    s.decision.row = row;
    to_target(s, stream, copy, identifier)?;
    if flags & flag::NAT != 0 && matches!(s.transport.kind, Kind::Ports) {
        let port = translation(tables, s, 0, s.transport.dport);
        if port != 0 && s.transport.protocol == protocol::SCTP && s.transport.first_fragment {
            return Err(Reason::Untranslatable);
        }
        s.decision.nat_port = port as u32;
    }
    if s.transport.first_fragment {
        fragment_key(s);
        s.first = FragmentValue { seen: tables.now(), slot, identifier, counter: s.decision.counter, pad: 0 };
        tables.remember(&s.fragment, &s.first);
    }
    Ok(())
}

/// Where a packet goes if it belongs to a stream.
#[derive(Clone, Copy)]
struct Place<'a> {
    slot: u32,
    stream: &'a StreamEntry,
    /// Copy of the stream's table that was in use.
    copy: u32,
    row: u32,
    /// 0: the row has no target.
    identifier: u32,
}

#[inline(always)]
fn place<'a, T: Tables>(tables: &'a T, s: &Scratch, slot: u32) -> Option<Place<'a>> {
    let stream = tables.stream(slot)?;
    let copy = tables.active(stream) & 1;
    let sctp_ports_only = stream.flags & stream_flag::SCTP_PORTS_ONLY != 0;
    // By value: behind a reference nothing is known of their alignment, and they would be read byte by byte.
    let src = if s.transport.quote != 0 { s.quoted.dst } else { s.network.src };
    let t = &s.transport;
    let hash = hash::key(src, s.network.dst, t.protocol, t.sport, t.dport, sctp_ports_only);
    let row = hash::row(hash, stream.rows);
    let base = if copy == 0 { stream.chunk[0] } else { stream.chunk[1] };
    let rows = CHUNK_ROWS as u32;
    let (chunk, within) = if row < rows { (base, row) } else { (base + row / rows, row % rows) };
    let identifier = tables.row(chunk, within).unwrap_or(0) as u32;
    Some(Place { slot, stream, copy, row, identifier })
}

/// The place of a packet in the stream that it most likely belongs to, and a first look at what it will need of the target.
/// (`None` never happens: there is a place for each stream, used or not.)
#[inline(always)]
fn expected<'a, T: Tables>(tables: &'a T, s: &mut Scratch) -> Option<Place<'a>> {
    let slot = *s.expected.of(s.transport.dport)? as u32;
    let place = place(tables, s, slot)?;
    tables.fetch(target_index(place.stream.target_base, place.identifier, place.copy), s.network.v6);
    Some(place)
}

/// In which respects a flow matches the packet that `s` was used for to decide; for explanations, on the host. `None`: the
/// tables contradict each other, or the packet was not looked up by flows.
pub fn matched<P: Packet, T: Tables>(packet: &P, tables: &T, s: &mut Scratch, flow: u32) -> Option<Matched> {
    let flags = tables.generation().1;
    if !s.asked.ask(packet, tables, s.generation, flags, &s.transport, s.network.usual()) {
        return None;
    }
    let dimensions = Dimensions::of(tables, s.switches, flags, s.class, &s.transport, &s.prefix)?;
    let excluded = s.asked.excluded(tables, (flow / 64) as usize);
    Some(judge(&dimensions, excluded, s.transport.kind, flags, flow))
}

/// Index of a target's entry: two copies per identifier, so that a swap changes row and next hop together.
#[inline(always)]
pub const fn target_index(base: u32, identifier: u32, copy: u32) -> u32 {
    (base + identifier) * 2 + copy
}

#[inline(always)]
fn to_target(s: &mut Scratch, stream: &StreamEntry, copy: u32, identifier: u32) -> Result<(), Reason> {
    if identifier == 0 || identifier > stream.max_targets {
        return Err(Reason::NoTarget);
    }
    s.decision.identifier = identifier;
    s.decision.target = target_index(stream.target_base, identifier, copy);
    s.written = if copy == 0 { stream.written[0] } else { stream.written[1] };
    Ok(())
}

/// Writes down what the fragments of this packet have in common.
#[inline(always)]
pub fn fragment_key(s: &mut Scratch) {
    s.fragment.src = s.network.src;
    s.fragment.dst = s.network.dst;
    s.fragment.id = s.transport.fragment_id;
    // IPv6 names the protocol in each fragment header, but only the first one's is binding (RFC 8200, 4.5).
    s.fragment.protocol = if s.network.v6 { 0 } else { s.transport.protocol as u32 };
}

#[inline(always)]
fn later_fragment<T: Tables>(tables: &T, s: &mut Scratch) -> Result<(), Reason> {
    fragment_key(s);
    let first = tables.fragment(&s.fragment).ok_or(Reason::FragmentUnknown)?;
    if tables.now().wrapping_sub(first.seen) > FRAGMENT_LIFETIME {
        return Err(Reason::FragmentUnknown);
    }
    s.decision.slot = first.slot;
    s.decision.counter = first.counter;
    let stream = tables.stream(first.slot).ok_or(Reason::Internal)?;
    let copy = tables.active(stream) & 1;
    to_target(s, stream, copy, first.identifier)?;
    // It may have left since; no other target could make sense of the rest.
    match tables.target(s.decision.target) {
        Some(target) if target.mark != 0 => Ok(()),
        _ => Err(Reason::NoTarget),
    }
}
