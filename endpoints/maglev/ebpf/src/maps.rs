//! The maps, and the decision's view of them. All are pinned: they outlive the process that loaded them.

use aya_ebpf::{
    helpers::{bpf_ktime_get_ns, generated::bpf_get_smp_processor_id},
    macros::map,
    maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, lpm_trie::Key},
};
use meridio_decision::{Decision, Scratch, Tables, layout::*};

const NO_PREALLOC: u32 = 1;
/// The values begin at a page, so that one that fills cache lines lies in no others.
const ALIGNED: u32 = 1 << 10;
/// A [`PrefixKey`] without its length, as the map's type wants it.
type Prefix = [u8; 20];

#[map]
pub static CONFIG: Array<Config> = Array::pinned(1, 0);
#[map]
pub static VIPS: LpmTrie<Prefix, u32> = LpmTrie::pinned(2 * VIP_PREFIXES as u32, NO_PREALLOC);
#[map]
pub static SOURCES: LpmTrie<Prefix, u32> = LpmTrie::pinned(2 * SOURCE_PREFIXES as u32, NO_PREALLOC);
#[map]
pub static PORTS: Array<PortMap> = Array::pinned(4, 0);
#[map]
pub static VECTORS_MAP: Array<Vector> = Array::pinned(2 * VECTORS, ALIGNED);
#[map]
pub static FLOWS: Array<FlowEntry> = Array::pinned(2 * MAX_FLOWS as u32, 0);
#[map]
pub static BYTE_LISTS: Array<ByteList> = Array::pinned(2 * MAX_BYTE_LISTS as u32, 0);
#[map]
pub static STREAMS: Array<StreamEntry> = Array::pinned(MAX_STREAMS as u32, 0);
#[map]
pub static ROWS: Array<Chunk> = Array::pinned(DEFAULT_CHUNKS as u32, 0);
#[map]
pub static TARGETS: Array<TargetEntry> = Array::pinned(2 * MAX_TARGETS as u32, 0);
#[map]
pub static NATS: HashMap<NatKey, u32> = HashMap::pinned(2 * NAT_ENTRIES as u32, NO_PREALLOC);
#[map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentValue> = LruHashMap::pinned(8192, 0);
/// What each packet counts for: [`FLOW_COUNTERS`] of each CPU in one piece, then those of the next one. The loader knows how many
/// CPUs there are. (Of a per-CPU array each would have a pointer of its own to be read first.)
#[map]
pub static FLOW_HITS: Array<Counter> = Array::pinned(FLOW_COUNTERS, ALIGNED);
/// See above; [`MAX_TARGETS`] of each CPU.
#[map]
pub static TARGET_HITS: Array<Counter> = Array::pinned(MAX_TARGETS as u32, ALIGNED);
/// What was dropped of each flow, by the index of [`FLOW_HITS`].
#[map]
pub static FLOW_DROPS: PerCpuArray<Counter> = PerCpuArray::pinned(FLOW_COUNTERS, 0);
/// What was dropped of each stream, by slot and reason. (What was forwarded is the sum of its targets.)
#[map]
pub static STREAM_DROPS: PerCpuArray<Counter> = PerCpuArray::pinned((MAX_STREAMS * MAX_REASONS) as u32, 0);
/// Which packets are traced; the one entry is written by whoever traces.
#[map]
pub static TRACE: Array<Trace> = Array::pinned(1, 0);
#[map]
pub static TRACE_EVENTS: RingBuf = RingBuf::pinned(TRACE_RING, 0);
#[map]
pub static REASONS: PerCpuArray<Counter> = PerCpuArray::pinned(MAX_REASONS as u32, 0);
/// Working memory of one packet. Not pinned: it means nothing to user space.
#[map]
pub static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);
/// The same for the egress program, which may interrupt the ingress one.
#[map]
pub static EGRESS_SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);
/// What each CPU has found out about next hops in other network namespaces, [`HOP_ENTRIES`] for each: in one piece, because of a
/// per-CPU array the pointer to the value would be one more cache line to read. The loader knows how many CPUs there are.
/// Not pinned: it is found out again at once.
#[map]
pub static HOPS: Array<Hop> = Array::with_max_entries(HOP_ENTRIES, ALIGNED);
/// What each CPU remembers of destinations and of sources, so many of each: the loader knows how many CPUs there are. To walk
/// through the prefixes costs several times as much.
#[map]
pub static DESTINATIONS: Array<Remembered> = Array::with_max_entries(DESTINATIONS_REMEMBERED, ALIGNED);
/// See above.
#[map]
pub static CLIENTS: Array<Remembered> = Array::with_max_entries(CLIENTS_REMEMBERED, ALIGNED);
#[map]
pub static LAST: PerCpuArray<Decision> = PerCpuArray::pinned(1, 0);
/// Names of streams (by slot) and of flows (by counter), so that a new process knows what it adopted.
#[map]
pub static STREAM_NAMES: Array<[u8; 128]> = Array::pinned(MAX_STREAMS as u32, 0);
#[map]
pub static FLOW_NAMES: Array<[u8; 128]> = Array::pinned(FLOW_COUNTERS, 0);

/// A next hop as the kernel's neighbour entry says: one cache line.
#[repr(C)]
pub struct Hop {
    /// The target that it belongs to, and the IP version: see [`Hop::place`].
    pub place: u32,
    /// Interface; 0: nothing is known.
    pub ifindex: u32,
    /// Which copy of the targets it was taken from: [`StreamEntry::written`].
    pub written: u64,
    /// Address of the next hop.
    pub address: [u64; 2],
    /// When the neighbour entry was read, in ticks of the kernel; 0: it is to be read anew.
    pub read: u64,
    /// When a packet last went past the entry, so that the kernel checks it.
    pub used: u64,
    /// Link addresses, destination and source, as they lie in a packet.
    pub link: [u32; 3],
    /// MTU of the interface.
    pub mtu: u32,
}

impl Hop {
    /// Number of a target's next hop of an IP version. Of the two copies of the target one is in use.
    #[inline(always)]
    pub fn place(target: u32, v6: bool) -> u32 {
        (target & !1) | v6 as u32
    }

    /// Where this CPU keeps what it knows about the next hop of a place.
    #[inline(always)]
    pub fn of(place: u32) -> Option<*mut Hop> {
        // SAFETY: a helper without arguments.
        let cpu = unsafe { bpf_get_smp_processor_id() };
        HOPS.get_ptr_mut(cpu * HOP_ENTRIES + (place & (HOP_ENTRIES - 1)))
    }
}

/// What a map of prefixes has said about an address.
#[repr(C)]
pub struct Remembered {
    /// Address, as it lies in memory.
    address: [u64; 2],
    /// See [`PrefixKey::space`].
    space: u32,
    /// Switches of the classifier at that time; after another one it is asked again.
    switches: u32,
    /// Class; of a destination also [`NOT_A_VIP`].
    class: u32,
    /// Not 0: this is an answer, not an empty place.
    known: u32,
}

/// The maps as the decision sees them.
pub struct Maps {
    /// The one entry of [`CONFIG`].
    pub config: *const Config,
    /// Destinations and sources are remembered. Only for one program: two of them may be at it on one CPU.
    pub remember: bool,
}

impl Tables for Maps {
    #[inline(always)]
    fn generation(&self) -> (u32, u32) {
        let config = self.config;
        // SAFETY: the pointer is into a map value; volatile because user space switches it at any time.
        unsafe {
            let switches = (&raw const (*config).switches).read_volatile();
            let flags = if switches & 1 == 0 {
                (&raw const (*config).flags[0]).read_volatile()
            } else {
                (&raw const (*config).flags[1]).read_volatile()
            };
            (switches, flags)
        }
    }

    #[inline(always)]
    fn destination(&self, key: &PrefixKey, switches: u32) -> Option<u32> {
        if !self.remember {
            return VIPS.get(prefix(key)).copied();
        }
        Some(remembered(&DESTINATIONS, DESTINATIONS_REMEMBERED, key, switches, || {
            VIPS.get(prefix(key)).copied().unwrap_or(NOT_A_VIP)
        }))
    }

    #[inline(always)]
    fn source(&self, key: &PrefixKey, switches: u32) -> u32 {
        let ask = || SOURCES.get(prefix(key)).copied().unwrap_or(0);
        if !self.remember {
            return ask();
        }
        remembered(&CLIENTS, CLIENTS_REMEMBERED, key, switches, ask)
    }

    #[inline(always)]
    fn dport(&self, generation: u32, port: u16) -> u32 {
        port_class(generation * 2, port)
    }

    #[inline(always)]
    fn sport(&self, generation: u32, port: u16) -> u32 {
        port_class(generation * 2 + 1, port)
    }

    #[inline(always)]
    fn vector(&self, index: u32) -> Option<&Vector> {
        VECTORS_MAP.get(index)
    }

    #[inline(always)]
    fn flow(&self, generation: u32, index: u32) -> Option<&FlowEntry> {
        FLOWS.get(generation * MAX_FLOWS as u32 + index)
    }

    #[inline(always)]
    fn byte_list(&self, generation: u32, index: u32) -> Option<&ByteList> {
        BYTE_LISTS.get(generation * MAX_BYTE_LISTS as u32 + index)
    }

    #[inline(always)]
    fn stream(&self, slot: u32) -> Option<&StreamEntry> {
        STREAMS.get(slot)
    }

    #[inline(always)]
    fn active(&self, stream: &StreamEntry) -> u32 {
        // SAFETY: as in `generation`.
        unsafe { (&raw const stream.active).read_volatile() & 1 }
    }

    #[inline(always)]
    fn row(&self, chunk: u32, index: u32) -> Option<u16> {
        let rows = ROWS.get_ptr(chunk)?;
        // Without the black box the bound is folded away, and with it the verifier's knowledge of it.
        let index = core::hint::black_box(index);
        if index >= CHUNK_ROWS as u32 {
            return None;
        }
        // SAFETY: index is below the number of rows of the map's value.
        Some(unsafe { *rows.cast::<u16>().add(index as usize) })
    }

    #[inline(always)]
    fn fetch(&self, target: u32, v6: bool) {
        if let Some(hop) = Hop::of(Hop::place(target, v6)) {
            // SAFETY: the pointer is into a map value; volatile because nobody asks for what is read.
            unsafe { (&raw const (*hop).place).read_volatile() };
        }
        if let Some(counter) = of_this_cpu(&TARGET_HITS, MAX_TARGETS as u32, target / 2) {
            // SAFETY: as above.
            unsafe { (&raw const (*counter).packets).read_volatile() };
        }
    }

    #[inline(always)]
    fn target(&self, index: u32) -> Option<&TargetEntry> {
        TARGETS.get(index)
    }

    #[inline(always)]
    fn nat(&self, key: &NatKey) -> Option<u16> {
        // SAFETY: the value is copied at once; entries of the generation in use are not rewritten.
        unsafe { NATS.get(key) }.map(|port| *port as u16)
    }

    #[inline(always)]
    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue> {
        // SAFETY: the value is copied at once; a torn copy could only come from two packets of one key.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(always)]
    fn remember(&self, key: &FragmentKey, value: &FragmentValue) {
        let _ = FRAGMENTS.insert(key, value, 0);
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: a helper without arguments.
        unsafe { bpf_ktime_get_ns() }
    }
}

/// The answer of a map of prefixes, from memory if this CPU has asked it since the last switch. `places`: a power of two.
#[inline(always)]
fn remembered(map: &Array<Remembered>, places: u32, key: &PrefixKey, switches: u32, ask: impl Fn() -> u32) -> u32 {
    let [a, b] = halves(key.address);
    // The highest bits of the product, because all bits of the address have a say in them alone.
    let index = ((a ^ b).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - places.trailing_zeros())) as u32;
    // SAFETY: a helper without arguments; and a value that only this CPU uses, for one program that does not nest.
    let found = unsafe { map.get_ptr_mut(bpf_get_smp_processor_id() * places + index).map(|found| &mut *found) };
    let Some(found) = found else { return ask() };
    let same = found.address[1] == b && found.address[0] == a && found.space == key.space;
    if same && found.switches == switches && found.known != 0 {
        return found.class;
    }
    let class = ask();
    *found = Remembered { address: [a, b], space: key.space, switches, class, known: 1 };
    class
}

/// An address in words as they lie in memory.
#[inline(always)]
fn halves(address: [u8; 16]) -> [u64; 2] {
    let whole = u128::from_ne_bytes(address);
    [whole as u64, (whole >> 64) as u64]
}

#[inline(always)]
fn prefix(key: &PrefixKey) -> &Key<Prefix> {
    // SAFETY: both are a u32 followed by 20 bytes, and `Key` is packed.
    unsafe { &*(key as *const PrefixKey).cast() }
}

#[inline(always)]
fn port_class(index: u32, port: u16) -> u32 {
    let Some(ports) = PORTS.get_ptr(index) else { return 0 };
    // SAFETY: a port is below 65,536, the number of entries of the map's value.
    unsafe { *ports.cast::<u16>().add(core::hint::black_box(port) as usize) as u32 }
}

/// What a packet adds to counters.
#[derive(Clone, Copy)]
pub struct Size {
    /// Packets that a super-packet stands for, else 1.
    pub segments: u32,
    /// Bytes from the network header on.
    pub bytes: u32,
}

/// Adds a packet to a per-CPU counter.
#[inline(always)]
pub fn count(map: &PerCpuArray<Counter>, index: u32, size: Size) {
    if let Some(counter) = map.get_ptr_mut(index) {
        // SAFETY: a per-CPU value; the program does not migrate between CPUs.
        unsafe { add(counter, size) };
    }
}

/// Adds a packet to this CPU's counter of so many that each CPU has.
#[inline(always)]
pub fn count_flat(map: &Array<Counter>, places: u32, index: u32, size: Size) {
    if let Some(counter) = of_this_cpu(map, places, index) {
        // SAFETY: a value that only this CPU writes; the program does not migrate.
        unsafe { add(counter, size) };
    }
}

#[inline(always)]
fn of_this_cpu(map: &Array<Counter>, places: u32, index: u32) -> Option<*mut Counter> {
    // SAFETY: a helper without arguments.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    map.get_ptr_mut(cpu * places + index)
}

/// # Safety
/// Nobody else writes the counter meanwhile.
#[inline(always)]
unsafe fn add(counter: *mut Counter, size: Size) {
    // SAFETY: says the caller.
    unsafe {
        (*counter).packets += size.segments as u64;
        (*counter).bytes += size.bytes as u64;
    }
}
