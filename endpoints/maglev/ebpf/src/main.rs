//! The load balancer's TC programs: `meridio_ingress` on the external interface decides and forwards;
//! `meridio_egress` on it gives replies and ICMP errors the address and port that clients know.
#![no_std]
#![no_main]

mod forward;
mod maps;
mod rewrite;
mod skb;
mod trace;

use aya_ebpf::{
    bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::generated::bpf_redirect,
    macros::classifier,
    programs::TcContext,
};
use maps::{
    CONFIG, FLOW_DROPS, FLOW_HITS, LAST, Maps, REASONS, SCRATCH, STREAM_DROPS, Size, TARGET_HITS, count, count_flat,
};
use meridio_decision::{
    Decision, ETH_IPV4, ETH_IPV6, NONE, Reason, Scratch, Verdict, decide,
    layout::{Config, FLOW_COUNTERS, MAX_REASONS, MAX_STREAMS, MAX_TARGETS},
};
use skb::{L2, Skb, ethertype};

/// The packet is addressed to this machine's link address.
const PACKET_HOST: u32 = 0;

/// Decides about each packet from outside.
#[classifier]
pub fn meridio_ingress(ctx: TcContext) -> i32 {
    // SAFETY: reads of the context's fields.
    let packet_type = unsafe { (*ctx.skb.skb).pkt_type };
    if packet_type != PACKET_HOST {
        return TC_ACT_UNSPEC;
    }
    let ethertype = ethertype(&ctx);
    if ethertype != ETH_IPV4 && ethertype != ETH_IPV6 {
        return TC_ACT_UNSPEC;
    }
    let (Some(config), Some(scratch)) = (CONFIG.get_ptr(0), SCRATCH.get_ptr_mut(0)) else { return TC_ACT_SHOT };
    // SAFETY: a per-CPU value that only this program uses, and it does not nest on one CPU.
    let scratch = unsafe { &mut *scratch };
    decide(&Skb(&ctx), &Maps { config, remember: true }, ethertype, scratch);
    record(config, &scratch.decision);
    if scratch.decision.verdict == Verdict::Pass as u32 {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: reads of the context's fields.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    let size = Size { segments: if segments == 0 { 1 } else { segments }, bytes: ctx.len().wrapping_sub(L2) };
    let (action, reason) = act(&ctx, config, scratch, size);
    count(&REASONS, reason, size);
    if action == TC_ACT_SHOT {
        dropped(&scratch.decision, reason, size);
    }
    trace::packet(&ctx, scratch, action, reason, size);
    action
}

/// What is done to a packet for a VIP, and the number of the reason.
#[inline(always)]
fn act(ctx: &TcContext, config: *const Config, scratch: &Scratch, size: Size) -> (i32, u32) {
    let decision = &scratch.decision;
    if decision.counter != NONE {
        count_flat(&FLOW_HITS, FLOW_COUNTERS, decision.counter, size);
    }
    if decision.verdict == Verdict::Drop as u32 {
        if decision.reason == Reason::FragmentUnknown as u32
            && let Some(action) = hold(ctx, config)
        {
            return (action, Reason::FragmentHeld as u32);
        }
        return (TC_ACT_SHOT, decision.reason);
    }
    match forward::forward(ctx, scratch) {
        Ok((action, reason)) => {
            count_flat(&TARGET_HITS, MAX_TARGETS as u32, decision.target / 2, size);
            (action, reason as u32)
        }
        Err(reason) => (TC_ACT_SHOT, reason as u32),
    }
}

/// Counts a dropped packet where it belongs, as far as that is known.
#[inline(always)]
fn dropped(decision: &Decision, reason: u32, size: Size) {
    if decision.counter != NONE {
        count(&FLOW_DROPS, decision.counter, size);
    }
    if decision.slot < MAX_STREAMS as u32 {
        count(&STREAM_DROPS, decision.slot * MAX_REASONS as u32 + reason, size);
    }
}

/// Hands a fragment that came before its first one to user space, which sends it through here again when it knows more;
/// `None`: nobody holds it, or has held it already, or whoever did is gone without a word.
#[inline(always)]
fn hold(ctx: &TcContext, config: *const Config) -> Option<i32> {
    // SAFETY: the pointer is into a map value; volatile because user space changes it at any time.
    let hold = unsafe { (&raw const (*config).hold).read_volatile() };
    // SAFETY: reads of the context's fields.
    let here = unsafe { (*ctx.skb.skb).ifindex };
    if hold == 0 || hold == here || !forward::exists(ctx, hold) {
        return None;
    }
    // SAFETY: a helper with plain arguments.
    Some(unsafe { bpf_redirect(hold, 0) } as i32)
}

#[inline(always)]
fn record(config: *const Config, decision: &Decision) {
    // SAFETY: the pointer is into a map value.
    if unsafe { (*config).record } != 0
        && let Some(last) = LAST.get_ptr_mut(0)
    {
        // SAFETY: a per-CPU value of this type.
        unsafe { *last = *decision };
    }
}

/// Gives what leaves through the external interface the port and address that clients know.
#[classifier]
pub fn meridio_egress(ctx: TcContext) -> i32 {
    let ethertype = ethertype(&ctx);
    if (ethertype == ETH_IPV4 || ethertype == ETH_IPV6)
        && let Err(reason) = rewrite::outgoing(&ctx, ethertype)
    {
        // With a port that its client does not know it would be of no use to anybody.
        count(&REASONS, reason as u32, Size { segments: 1, bytes: ctx.len().wrapping_sub(L2) });
        return TC_ACT_SHOT;
    }
    TC_ACT_UNSPEC
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
