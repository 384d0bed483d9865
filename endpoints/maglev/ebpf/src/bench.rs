//! Programs of the data-plane bench: a generator of small packets, a sink that counts, and the least that any load
//! balancer does to a packet.
#![no_std]
#![no_main]

mod skb;

use aya_ebpf::{
    bindings::{
        TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC,
        xdp_action::{XDP_ABORTED, XDP_DROP},
    },
    helpers::{bpf_ktime_get_ns, generated::bpf_redirect},
    macros::{classifier, map, xdp},
    maps::{Array, PerCpuArray},
    programs::{TcContext, XdpContext},
};
use meridio_decision::packet::{self, Kind, Network, Transport};
use skb::{Skb, ethertype};

/// Bytes of a generated packet, with its Ethernet header.
const PACKET: usize = 64;

/// What the generator sends.
#[repr(C)]
pub struct Generator {
    /// Interface to send through.
    ifindex: u32,
    /// Offset of the UDP ports.
    ports_at: u32,
    /// Destination ports: `first_port` and the ones behind it, spread evenly.
    first_port: u32,
    destination_ports: u32,
    /// Source ports from 20,000 on, one after the other.
    source_ports: u32,
    /// Time between two packets, in 1/256 ns.
    interval: u32,
    /// The packet; the buffers are reused, and the load balancer changes them.
    packet: [u64; PACKET / 8],
}

/// What arrived at a link address.
#[repr(C)]
pub struct Seen {
    packets: u64,
    /// Monotonic clock, ns: first and last arrival.
    first: u64,
    last: u64,
}

/// Results of a parse, kept so that the compiler has to make them.
pub struct Parsed {
    network: Network,
    quoted: Network,
    transport: Transport,
}

#[map]
static GENERATOR: Array<Generator> = Array::with_max_entries(1, 0);
#[map]
static SEQUENCE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
/// When the next packet is due, in 1/256 ns of the monotonic clock.
#[map]
static DUE: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
static TOTAL: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
/// By the last two bytes of the destination's link address; only when the sink's clock is on.
#[map]
static SEEN: Array<Seen> = Array::with_max_entries(65_536, 0);
#[map]
static CLOCK: Array<u32> = Array::with_max_entries(1, 0);
#[map]
static PARSED: PerCpuArray<Parsed> = PerCpuArray::with_max_entries(1, 0);

/// The longest time that the generator catches up with, in 1/256 ns.
const BURST: u64 = 100_000 << 8;

/// How often the clock is read at most until a packet is due: some 20 us.
const WAIT: u32 = 1_000;

/// Makes a packet of the buffer and sends it once it is due.
#[xdp]
pub fn generate(ctx: XdpContext) -> u32 {
    let Some(generator) = GENERATOR.get(0) else { return XDP_DROP };
    let Some(sequence) = SEQUENCE.get_ptr_mut(0) else { return XDP_DROP };
    let Some(due) = DUE.get_ptr_mut(0) else { return XDP_DROP };
    // SAFETY: a helper without arguments, and a per-CPU value of this type.
    unsafe {
        // A packet that is dropped goes back to where the sink returns its own: both CPUs would take turns there, at a cost that
        // has nothing to do with forwarding. So it waits, unless it is for long.
        let mut now = bpf_ktime_get_ns() << 8;
        for _ in 0..WAIT {
            if now >= *due {
                break;
            }
            now = bpf_ktime_get_ns() << 8;
        }
        if now < *due {
            return XDP_DROP;
        }
        let from = if now - *due > BURST { now } else { *due };
        *due = from + generator.interval as u64;
    }
    // SAFETY: a per-CPU value of this type; the program does not nest.
    let n = unsafe {
        *sequence = (*sequence).wrapping_add(1);
        *sequence
    };
    let data = ctx.data();
    if data + PACKET > ctx.data_end() {
        return XDP_ABORTED;
    }
    let words = data as *mut u64;
    for (i, word) in generator.packet.iter().enumerate() {
        // SAFETY: within the 64 bytes that were checked.
        unsafe { words.add(i).write_unaligned(*word) };
    }
    let mixed = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) & 0xffff_ffff;
    let source = 20_000 + (n % generator.source_ports.max(1) as u64) as u16;
    let destination = generator.first_port as u16 + ((mixed * generator.destination_ports as u64) >> 32) as u16;
    let at = if generator.ports_at == 54 { 54 } else { 34 };
    let ports = (data + at) as *mut u16;
    // SAFETY: 4 bytes at 34 or 54 are within the 64 bytes that were checked.
    unsafe {
        ports.write_unaligned(source.to_be());
        ports.add(1).write_unaligned(destination.to_be());
    }
    // SAFETY: a helper with plain arguments.
    unsafe { bpf_redirect(generator.ifindex, 0) as u32 }
}

/// Counts, and ends the packet's way.
#[classifier]
pub fn sink(ctx: TcContext) -> i32 {
    if let Some(total) = TOTAL.get_ptr_mut(0) {
        // SAFETY: a per-CPU value of this type.
        unsafe { *total += 1 };
    }
    let Some(clock) = CLOCK.get(0) else { return TC_ACT_SHOT };
    if *clock == 0 {
        return TC_ACT_SHOT;
    }
    let Ok([high, low]) = ctx.load::<[u8; 2]>(4) else { return TC_ACT_SHOT };
    let index = u16::from_be_bytes([high, low]) as u32;
    if let Some(seen) = SEEN.get_ptr_mut(index) {
        // SAFETY: a map value of this type. Two CPUs may lose a count to each other; nobody compares these exactly.
        unsafe {
            (*seen).packets += 1;
            let now = bpf_ktime_get_ns();
            if (*seen).first == 0 {
                (*seen).first = now;
            }
            (*seen).last = now;
        }
    }
    TC_ACT_SHOT
}

/// Reads all headers as the load balancer does, and decides nothing.
#[classifier]
pub fn parse(ctx: TcContext) -> i32 {
    let Some(parsed) = PARSED.get_ptr_mut(0) else { return TC_ACT_SHOT };
    // SAFETY: a per-CPU value that only this program uses.
    let parsed = unsafe { &mut *parsed };
    let skb = Skb(&ctx);
    if !packet::network(&skb, ethertype(&ctx), 0, &mut parsed.network) {
        return TC_ACT_UNSPEC;
    }
    match packet::transport(&skb, &parsed.network, &mut parsed.quoted, &mut parsed.transport) {
        Ok(()) if matches!(parsed.transport.kind, Kind::Ports) => TC_ACT_OK,
        _ => TC_ACT_SHOT,
    }
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
