//! The trace: off, it costs a look at one map entry; on, an event for each packet that the filter wants.

use aya_ebpf::{bindings::TC_ACT_SHOT, helpers::bpf_ktime_get_ns, programs::TcContext};
use meridio_decision::{
    Scratch,
    layout::{TRACE_LOST, Trace, TraceEvent},
    trace::{flags, wanted},
};

use crate::maps::{REASONS, Size, TARGETS, TRACE, TRACE_EVENTS, count};

/// Whether packets can be traced; set by the loader.
#[unsafe(no_mangle)]
static HAS_TRACE: u32 = 1;

/// Tells what became of a packet for a VIP, if somebody wants to know.
#[inline(always)]
pub fn packet(ctx: &TcContext, scratch: &Scratch, action: i32, reason: u32, size: Size) {
    // SAFETY: a constant that the loader sets before the program is loaded.
    if unsafe { (&raw const HAS_TRACE).read_volatile() } == 0 {
        return;
    }
    let Some(trace) = TRACE.get_ptr_mut(0) else { return };
    // SAFETY: the pointer is into a map value; volatile because user space switches the trace at any time.
    let until = unsafe { (&raw const (*trace).until).read_volatile() };
    if until == 0 {
        return;
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    if now >= until {
        // Whoever traced is gone without a word.
        // SAFETY: as above.
        unsafe { (&raw mut (*trace).until).write_volatile(0) };
        return;
    }
    // SAFETY: as above; a filter is only written while the trace is off.
    let filter: &Trace = unsafe { &*trace };
    let dropped = action == TC_ACT_SHOT;
    if !wanted(filter, scratch, dropped) {
        return;
    }
    let Some(mut entry) = TRACE_EVENTS.reserve::<TraceEvent>(0) else {
        count(&REASONS, TRACE_LOST, size);
        return;
    };
    // SAFETY: reads of the context's fields.
    let ifindex_in = unsafe { (*ctx.skb.skb).ingress_ifindex };
    let (network, transport, decision) = (&scratch.network, &scratch.transport, &scratch.decision);
    let event = entry.as_mut_ptr();
    // SAFETY: the entry is memory for one event, and every field of it is written.
    unsafe {
        (*event).time = now;
        (*event).src = network.src;
        (*event).dst = network.dst;
        (*event).next_hop = [0; 16];
        (*event).flags = flags(scratch);
        (*event).protocol = transport.protocol as u32;
        (*event).ports = (transport.sport as u32) << 16 | transport.dport as u32;
        (*event).bytes = size.bytes;
        (*event).segments = size.segments;
        (*event).ttl = network.ttl as u32;
        (*event).ifindex_in = ifindex_in;
        (*event).ifindex_out = 0;
        (*event).verdict = decision.verdict;
        (*event).reason = reason;
        (*event).generation = scratch.generation;
        (*event).flow = decision.flow;
        (*event).counter = decision.counter;
        (*event).slot = decision.slot;
        (*event).row = decision.row;
        (*event).identifier = decision.identifier;
        (*event).nat_port = decision.nat_port;
        (*event).pad = 0;
        if dropped {
            (*event).verdict = meridio_decision::Verdict::Drop as u32;
        } else if let Some(target) = TARGETS.get(decision.target) {
            if network.v6 {
                (*event).next_hop = target.v6;
                (*event).ifindex_out = target.ifindex6;
            } else {
                let [a, b, c, d] = target.v4;
                (*event).next_hop = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d];
                (*event).ifindex_out = target.ifindex4;
            }
        }
    }
    entry.submit(0);
}
