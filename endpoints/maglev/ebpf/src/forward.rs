//! Towards the target: straight into its link, or through the stack for what only the stack can do.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_FIB_LOOKUP_DIRECT, BPF_FIB_LOOKUP_OUTPUT, TC_ACT_OK, bpf_fib_lookup as FibLookup, bpf_redir_neigh},
    helpers::generated::{bpf_check_mtu, bpf_fib_lookup, bpf_jiffies64, bpf_redirect_neigh, bpf_redirect_peer},
    programs::TcContext,
};
use meridio_decision::{
    Packet, Reason, Scratch,
    layout::TargetEntry,
    packet::{Network, Transport},
};

use crate::{
    maps::{Hop, TARGETS},
    rewrite,
    skb::{L2, Skb},
};

const TCP: u8 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const CHECK_MTU_SEGS: u64 = 1;
/// What the kernel answers about a super-packet with segments that are too long.
const SEGMENTS_TOO_LONG: i64 = 2;

/// Whether the kernel has `bpf_check_mtu` (5.12); set by the loader, so that the verifier drops the call elsewhere.
#[unsafe(no_mangle)]
static HAS_CHECK_MTU: u32 = 1;
/// Whether the kernel tells link addresses of valid neighbour entries only, and all that the direct way needs (6.3).
#[unsafe(no_mangle)]
static HAS_DIRECT: u32 = 0;

/// Ticks of the kernel (1 to 10 ms each) for which what a neighbour entry says is believed.
const BELIEVED: u64 = 8;
/// Ticks after which a packet goes past the neighbour entry. The direct way only reads it, and an entry that nobody
/// uses is never found to be wrong; one that is used is not checked before some 30 s either (`base_reachable_time`).
const USED: u64 = 1_250;

/// What is done with the packet, and why.
#[inline(always)]
pub fn forward(ctx: &TcContext, s: &Scratch) -> Result<(i32, Reason), Reason> {
    let (network, index) = (&s.network, s.decision.target);
    let place = Hop::place(index, network.v6);
    // SAFETY: a constant that the loader sets before the program is loaded.
    let has_direct = unsafe { (&raw const HAS_DIRECT).read_volatile() };
    let mut hop = None;
    if has_direct != 0 && !network.options && network.ttl > 1 {
        // SAFETY: only this CPU uses it, and the program does not nest on one CPU.
        hop = Hop::of(place).map(|hop| unsafe { &mut *hop });
    }
    // Most packets need nothing of the target but this: it would be two cache lines more.
    let mut known = hop.as_ref().is_some_and(|hop| hop.place == place && hop.written == s.written);
    if !known {
        let target = TARGETS.get(index).ok_or(Reason::Internal)?;
        let ifindex = if network.v6 { target.ifindex6 } else { target.ifindex4 };
        if ifindex == 0 {
            return Err(Reason::NoAddress);
        }
        if target.direct != 0
            && let Some(hop) = &mut hop
        {
            known = hop.take(target, ifindex, place, s);
        }
    }
    if s.decision.nat_port != 0 {
        rewrite::destination(ctx, network, &s.transport, s.decision.nat_port as u16)?;
    }
    if known
        && let Some(hop) = hop
        && usable(ctx, s, hop)
    {
        rewrite::age(ctx, network)?;
        if rewrite::link(ctx, &hop.link) {
            // SAFETY: a helper with plain arguments.
            return Ok((unsafe { bpf_redirect_peer(hop.ifindex, 0) } as i32, Reason::Redirected));
        }
        return Err(Reason::Helper);
    }
    let target = TARGETS.get(index).ok_or(Reason::Internal)?;
    let ifindex = if network.v6 { target.ifindex6 } else { target.ifindex4 };
    if let Some(reason) = slow(ctx, s, target, ifindex) {
        // SAFETY: writes a field of the context that TC programs may write.
        unsafe { (*ctx.skb.skb).mark = target.mark };
        return Ok((TC_ACT_OK, reason));
    }
    rewrite::age(ctx, network)?;
    Ok((neighbour(network, target, ifindex), Reason::Redirected))
}

/// Past the kernel's neighbour entry, which resolves and checks the link address as the stack would.
#[inline(always)]
fn neighbour(network: &Network, target: &TargetEntry, ifindex: u32) -> i32 {
    // SAFETY: plain numbers, for which zero is a value.
    let mut next: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    if network.v6 {
        next.nh_family = AF_INET6 as u32;
        next.__bindgen_anon_1.ipv6_nh = words(&target.v6);
    } else {
        next.nh_family = AF_INET as u32;
        next.__bindgen_anon_1.ipv4_nh = u32::from_ne_bytes(target.v4);
    }
    // SAFETY: the parameters are on this frame and of the size given.
    unsafe { bpf_redirect_neigh(ifindex, &raw mut next, core::mem::size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
}

#[inline(always)]
fn words(a: &[u8; 16]) -> [u32; 4] {
    [
        u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
        u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
        u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
        u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
    ]
}

/// Now, in ticks of the kernel.
#[inline(always)]
fn ticks() -> u64 {
    // SAFETY: a helper without arguments.
    unsafe { bpf_jiffies64() }
}

impl Hop {
    /// Takes over what the target's entry says; `false`: this is another next hop, whose first packet goes past the neighbour entry.
    /// The link address is asked for anew: that it is another one may be why the copy was written (`Engine::look_again`).
    #[inline(always)]
    fn take(&mut self, target: &TargetEntry, ifindex: u32, place: u32, s: &Scratch) -> bool {
        let address = if s.network.v6 {
            let [a, b, c, d] = words(&target.v6);
            [(a as u64) << 32 | b as u64, (c as u64) << 32 | d as u64]
        } else {
            [0, u32::from_ne_bytes(target.v4) as u64]
        };
        let same = self.address[1] == address[1] && self.address[0] == address[0] && self.ifindex == ifindex;
        // Not a time in the past: after a call on this way the verifier would follow twice as much.
        (self.place, self.written, self.read) = (place, s.written, 0);
        if !same {
            (self.address, self.ifindex, self.used) = (address, ifindex, ticks());
        }
        same
    }
}

/// Whether a packet can go straight into the other end of a veth pair, past the queue between the two ends. Else it takes the
/// usual way: the link address is not known, or the packet may be too large, or it is time for the kernel to check the
/// neighbour entry.
#[inline(always)]
fn usable(ctx: &TcContext, s: &Scratch, hop: &mut Hop) -> bool {
    let now = ticks();
    if now.wrapping_sub(hop.read) >= BELIEVED {
        if now.wrapping_sub(hop.used) >= USED {
            hop.used = now;
            return false;
        }
        if !look(ctx, s.network.v6, hop) {
            return false;
        }
        hop.read = now;
    }
    // SAFETY: reads of the context's fields.
    let super_packet = unsafe { (*ctx.skb.skb).gso_size } != 0;
    if super_packet {
        return fits(ctx, s, hop.ifindex);
    }
    ctx.len().wrapping_sub(L2) <= hop.mtu
}

/// Reads the neighbour entry; `false`: there is none, or not a valid one.
#[inline(always)]
fn look(ctx: &TcContext, v6: bool, hop: &mut Hop) -> bool {
    // SAFETY: plain numbers, for which zero is a value.
    let mut look: FibLookup = unsafe { core::mem::zeroed() };
    look.ifindex = hop.ifindex;
    let [high, low] = hop.address;
    if v6 {
        look.family = AF_INET6;
        look.__bindgen_anon_4.ipv6_dst = [(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32];
    } else {
        look.family = AF_INET;
        look.__bindgen_anon_4.ipv4_dst = low as u32;
    }
    let size = core::mem::size_of::<FibLookup>() as i32;
    let flags = BPF_FIB_LOOKUP_DIRECT | BPF_FIB_LOOKUP_OUTPUT;
    // SAFETY: the parameters are on this frame and of the size given.
    let result = unsafe { bpf_fib_lookup(ctx.as_ptr().cast(), &raw mut look, size, flags) };
    if result != 0 || look.ifindex != hop.ifindex {
        return false;
    }
    let (d, s) = (look.dmac, look.smac);
    hop.link = [
        u32::from_ne_bytes([d[0], d[1], d[2], d[3]]),
        u32::from_ne_bytes([d[4], d[5], s[0], s[1]]),
        u32::from_ne_bytes([s[2], s[3], s[4], s[5]]),
    ];
    // SAFETY: the kernel has written it.
    hop.mtu = unsafe { look.__bindgen_anon_1.mtu_result } as u32;
    true
}

/// Whether the packet, or of a super-packet each segment, is not larger than the MTU of an interface.
///
/// The kernel takes the jumbo option for a part of each segment, which it is not: segmentation leaves it out. (Linux puts it into TCP
/// over IPv6 of more than 64 KiB, up to some version after 6.18.)
#[inline(always)]
fn fits(ctx: &TcContext, s: &Scratch, ifindex: u32) -> bool {
    const HOP_BY_HOP: u8 = 0;
    const JUMBO_OPTION: u32 = 8;
    let (network, transport) = (&s.network, &s.transport);
    let mut mtu = 0u32;
    // SAFETY: the helper writes one u32.
    let result = unsafe { bpf_check_mtu(ctx.as_ptr().cast(), ifindex, &raw mut mtu, 0, CHECK_MTU_SEGS) } as i64;
    let jumbo = network.v6 && network.protocol == HOP_BY_HOP && ctx.len().wrapping_sub(L2) > 40 + 0xffff;
    if result != SEGMENTS_TOO_LONG || !jumbo || transport.protocol != TCP {
        return result == 0;
    }
    segment(ctx, transport).is_some_and(|length| length.wrapping_sub(JUMBO_OPTION) <= mtu)
}

#[inline(always)]
fn has_check_mtu() -> bool {
    // SAFETY: a constant that the loader sets before the program is loaded.
    unsafe { (&raw const HAS_CHECK_MTU).read_volatile() != 0 }
}

/// Whether there is such an interface; where the kernel does not tell, there is.
#[inline(always)]
pub fn exists(ctx: &TcContext, ifindex: u32) -> bool {
    if !has_check_mtu() {
        return true;
    }
    let mut mtu = 0u32;
    // SAFETY: the helper writes one u32. Whether the packet fits does not matter here.
    unsafe { bpf_check_mtu(ctx.as_ptr().cast(), ifindex, &raw mut mtu, 0, 0) as i64 >= 0 }
}

/// Length of the segments that a super-packet stands for, from the network header on.
#[inline(always)]
fn segment(ctx: &TcContext, transport: &Transport) -> Option<u32> {
    const UDP_HEADER: u32 = 8;
    let header = match transport.protocol {
        TCP => (Skb(ctx).read::<1>(transport.offset.wrapping_add(12))?[0] as u32 >> 4) * 4,
        _ => UDP_HEADER,
    };
    // SAFETY: reads of the context's fields.
    let payload = unsafe { (*ctx.skb.skb).gso_size };
    Some(transport.offset.wrapping_add(header).wrapping_add(payload))
}

/// Why this packet needs the stack.
#[inline(always)]
fn slow(ctx: &TcContext, s: &Scratch, target: &TargetEntry, ifindex: u32) -> Option<Reason> {
    if s.network.options {
        return Some(Reason::SlowOptions);
    }
    if s.network.ttl <= 1 {
        return Some(Reason::SlowTtl);
    }
    if has_check_mtu() {
        if !fits(ctx, s, ifindex) {
            return Some(Reason::SlowMtu);
        }
    } else if target.mtu != 0 {
        // SAFETY: reads of the context's fields.
        let gso = unsafe { (*ctx.skb.skb).gso_size };
        let whole = ctx.len().wrapping_sub(L2);
        let size = if gso == 0 { Some(whole) } else { segment(ctx, &s.transport) };
        if size.is_none_or(|size| size > target.mtu) {
            return Some(Reason::SlowMtu);
        }
    }
    None
}
