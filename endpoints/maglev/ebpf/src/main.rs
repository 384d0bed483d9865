//! The load balancer's TC programs: `meridio_ingress` on the external interface decides and forwards;
//! `meridio_egress` on it gives replies and ICMP errors the address and port that clients know.
#![no_std]
#![no_main]

mod maps;
mod rewrite;
mod skb;
mod trace;

use aya_ebpf::{
    EbpfContext,
    bindings::{TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh},
    helpers::generated::{bpf_check_mtu, bpf_redirect, bpf_redirect_neigh},
    macros::classifier,
    programs::TcContext,
};
use maps::{
    CONFIG, FLOW_DROPS, FLOW_HITS, LAST, Maps, REASONS, SCRATCH, STREAM_DROPS, Size, TARGET_HITS, TARGETS, count,
};
use meridio_decision::{
    Decision, ETH_IPV4, ETH_IPV6, NONE, Reason, Scratch, Verdict, decide,
    layout::{MAX_REASONS, MAX_STREAMS, TargetEntry},
    packet::{Network, Transport},
};
use skb::{L2, Skb, ethertype};

/// The packet is addressed to this machine's link address.
const PACKET_HOST: u32 = 0;
const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const CHECK_MTU_SEGS: u64 = 1;

/// Whether the kernel has `bpf_check_mtu` (5.12); set by the loader, so that the verifier drops the call elsewhere.
#[unsafe(no_mangle)]
static HAS_CHECK_MTU: u32 = 1;

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
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return TC_ACT_SHOT };
    // SAFETY: a per-CPU value that only this program uses, and it does not nest on one CPU.
    let scratch = unsafe { &mut *scratch };
    decide(&Skb(&ctx), &Maps, ethertype, scratch);
    record(&scratch.decision);
    if scratch.decision.verdict == Verdict::Pass as u32 {
        return TC_ACT_UNSPEC;
    }
    // SAFETY: reads of the context's fields.
    let segments = unsafe { (*ctx.skb.skb).gso_segs };
    let size = Size { segments: if segments == 0 { 1 } else { segments }, bytes: ctx.len().wrapping_sub(L2) };
    let (action, reason) = act(&ctx, scratch, size);
    count(&REASONS, reason, size);
    if action == TC_ACT_SHOT {
        dropped(&scratch.decision, reason, size);
    }
    trace::packet(&ctx, scratch, action, reason, size);
    action
}

/// What is done to a packet for a VIP, and the number of the reason.
#[inline(always)]
fn act(ctx: &TcContext, scratch: &Scratch, size: Size) -> (i32, u32) {
    let decision = &scratch.decision;
    if decision.counter != NONE {
        count(&FLOW_HITS, decision.counter, size);
    }
    if decision.verdict == Verdict::Drop as u32 {
        if decision.reason == Reason::FragmentUnknown as u32
            && let Some(action) = hold(ctx)
        {
            return (action, Reason::FragmentHeld as u32);
        }
        return (TC_ACT_SHOT, decision.reason);
    }
    match forward(ctx, decision, &scratch.network, &scratch.transport) {
        Ok((action, reason)) => {
            count(&TARGET_HITS, decision.target / 2, size);
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
/// `None`: nobody holds it, or has held it already.
#[inline(always)]
fn hold(ctx: &TcContext) -> Option<i32> {
    let config = CONFIG.get_ptr(0)?;
    // SAFETY: the pointer is into a map value; volatile because user space changes it at any time.
    let hold = unsafe { (&raw const (*config).hold).read_volatile() };
    // SAFETY: reads of the context's fields.
    let here = unsafe { (*ctx.skb.skb).ifindex };
    if hold == 0 || hold == here {
        return None;
    }
    // SAFETY: a helper with plain arguments.
    Some(unsafe { bpf_redirect(hold, 0) } as i32)
}

#[inline(always)]
fn record(decision: &Decision) {
    let Some(config) = CONFIG.get(0) else { return };
    if config.record != 0
        && let Some(last) = LAST.get_ptr_mut(0)
    {
        // SAFETY: a per-CPU value of this type.
        unsafe { *last = *decision };
    }
}

/// Towards the target: straight to its neighbour entry, or through the stack for what only the stack can do.
#[inline(always)]
fn forward(
    ctx: &TcContext,
    decision: &Decision,
    network: &Network,
    transport: &Transport,
) -> Result<(i32, Reason), Reason> {
    let target = TARGETS.get(decision.target).ok_or(Reason::Internal)?;
    let ifindex = if network.v6 { target.ifindex6 } else { target.ifindex4 };
    if ifindex == 0 {
        return Err(Reason::NoAddress);
    }
    if decision.nat_port != 0 {
        rewrite::destination(ctx, network, transport, decision.nat_port as u16)?;
    }
    if let Some(reason) = slow(ctx, network, target, ifindex) {
        ctx.skb.clone_mark(target.mark);
        return Ok((TC_ACT_OK, reason));
    }
    rewrite::age(ctx, network)?;
    let mut next = bpf_redir_neigh::default_zero();
    if network.v6 {
        next.nh_family = AF_INET6;
        let a = &target.v6;
        next.__bindgen_anon_1.ipv6_nh = [
            u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
            u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
            u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
            u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
        ];
    } else {
        next.nh_family = AF_INET;
        next.__bindgen_anon_1.ipv4_nh = u32::from_ne_bytes(target.v4);
    }
    // SAFETY: the parameters are on this frame and of the size given.
    let action =
        unsafe { bpf_redirect_neigh(ifindex, &raw mut next, core::mem::size_of::<bpf_redir_neigh>() as i32, 0) };
    Ok((action as i32, Reason::Redirected))
}

/// Why this packet needs the stack.
#[inline(always)]
fn slow(ctx: &TcContext, network: &Network, target: &TargetEntry, ifindex: u32) -> Option<Reason> {
    if network.options {
        return Some(Reason::SlowOptions);
    }
    if network.ttl <= 1 {
        return Some(Reason::SlowTtl);
    }
    // SAFETY: a constant that the loader sets before the program is loaded.
    let has_check = unsafe { (&raw const HAS_CHECK_MTU).read_volatile() };
    if has_check != 0 {
        let mut mtu = 0u32;
        // SAFETY: the helper writes one u32.
        let result = unsafe { bpf_check_mtu(ctx.as_ptr().cast(), ifindex, &raw mut mtu, 0, CHECK_MTU_SEGS) };
        if result != 0 {
            return Some(Reason::SlowMtu);
        }
    } else if target.mtu != 0 {
        // SAFETY: reads of the context's fields.
        let gso = unsafe { (*ctx.skb.skb).gso_size };
        // 60 and 60: the longest headers in front of a segment; too careful by at most a few bytes.
        let size = if gso == 0 { ctx.len().wrapping_sub(L2) } else { gso + 120 };
        if size > target.mtu {
            return Some(Reason::SlowMtu);
        }
    }
    None
}

trait Mark {
    fn clone_mark(&self, mark: u32);
}

impl Mark for aya_ebpf::programs::sk_buff::SkBuff {
    #[inline(always)]
    fn clone_mark(&self, mark: u32) {
        // SAFETY: writes a field of the context that TC programs may write.
        unsafe { (*self.skb).mark = mark };
    }
}

trait Zero {
    fn default_zero() -> Self;
}

impl Zero for bpf_redir_neigh {
    #[inline(always)]
    fn default_zero() -> Self {
        // SAFETY: plain numbers, for which zero is a value.
        unsafe { core::mem::zeroed() }
    }
}

/// Gives what leaves through the external interface the port and address that clients know.
#[classifier]
pub fn meridio_egress(ctx: TcContext) -> i32 {
    let ethertype = ethertype(&ctx);
    if ethertype == ETH_IPV4 || ethertype == ETH_IPV6 {
        rewrite::outgoing(&ctx, ethertype);
    }
    TC_ACT_UNSPEC
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
