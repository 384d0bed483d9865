//! Changes to packets: age, ports, and the source of ICMP errors.

use aya_ebpf::{
    EbpfContext,
    helpers::generated::{
        bpf_csum_diff, bpf_csum_update, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_store_bytes,
    },
    programs::TcContext,
};
use meridio_decision::{
    ETH_IPV4, Packet, Reason, Scratch, crc32c,
    decide::{End, Tables, translation, vip_class},
    layout::flag,
    packet::{self, Kind, Network, Transport, protocol},
};

use crate::{
    maps::{CONFIG, EGRESS_SCRATCH, Maps, REASONS, Size, count},
    skb::{L2, Skb},
};

/// The checksum may be 0 for "none" and must not become 0 (UDP).
const MANGLED_0: u64 = 0x20;
/// The value is part of the pseudo header.
const PSEUDO_HEADER: u64 = 0x10;
/// The sum that the network card made over the whole packet has to follow.
const RECOMPUTE: u64 = 1;

#[inline(always)]
fn store<const N: usize>(ctx: &TcContext, offset: u32, bytes: &[u8; N], flags: u64) -> Result<(), Reason> {
    // SAFETY: the helper reads N bytes from a buffer of N bytes.
    let result = unsafe {
        bpf_skb_store_bytes(ctx.as_ptr().cast(), offset.wrapping_add(L2), bytes.as_ptr().cast(), N as u32, flags)
    };
    if result == 0 { Ok(()) } else { Err(Reason::Helper) }
}

/// Takes one from TTL or hop limit; the packet's is above 1.
#[inline(always)]
pub fn age(ctx: &TcContext, network: &Network) -> Result<(), Reason> {
    let ttl = network.ttl - 1;
    if network.v6 {
        let at = ctx.data() + L2 as usize + 6;
        if at + 2 > ctx.data_end() {
            return store(ctx, 7, &[ttl], RECOMPUTE);
        }
        // SAFETY: within the packet, as just checked; alignment as in `skb::direct`. And a helper with plain arguments,
        // which changes nothing where the network card has made no sum.
        unsafe {
            (at as *mut u16).write(u16::from_ne_bytes([network.protocol, ttl]));
            bpf_csum_update(ctx.skb.skb, packet::AGED);
        }
        return Ok(());
    }
    // RFC 1624 for a change of 0x0100 in one word; 0xffff becomes 0, as there.
    let sum = network.checksum as u32 + 0x0100;
    let sum = sum + ((sum + 1) >> 16);
    // What the one changes in a sum over the packet, the other changes back.
    let word = (ttl as u32) << 24 | (network.protocol as u32) << 16 | (sum & 0xffff);
    let at = ctx.data() + L2 as usize + 8;
    if at + 4 > ctx.data_end() {
        return store(ctx, 8, &word.to_be_bytes(), 0);
    }
    // SAFETY: within the packet, as just checked; alignment as in `skb::direct`.
    unsafe { (at as *mut u32).write(word.to_be()) };
    Ok(())
}

/// Sets the link addresses: destination and source, as they lie in the packet. `false`: the packet has none.
#[inline(always)]
pub fn link(ctx: &TcContext, addresses: &[u32; 3]) -> bool {
    let at = ctx.data();
    if at + L2 as usize > ctx.data_end() {
        return false;
    }
    let words = at as *mut u32;
    // SAFETY: within the packet, as just checked; alignment as in `skb::direct`.
    unsafe {
        words.write(addresses[0]);
        words.add(1).write(addresses[1]);
        words.add(2).write(addresses[2]);
    }
    true
}

/// Replaces a 16-bit word in an Internet checksum at `at`.
#[inline(always)]
fn sum(ctx: &TcContext, at: u32, from: u16, to: u16, flags: u64) -> Result<(), Reason> {
    // SAFETY: plain arguments.
    let result =
        unsafe { bpf_l4_csum_replace(ctx.as_ptr().cast(), at + L2, from.to_be() as u64, to.to_be() as u64, 2 | flags) };
    if result == 0 { Ok(()) } else { Err(Reason::Helper) }
}

/// Sets the port at `field` (0: source, 2: destination) of the packet's own L4 header.
#[inline(always)]
fn port(ctx: &TcContext, network: &Network, t: &Transport, field: u32, from: u16, to: u16) -> Result<(), Reason> {
    let l4 = t.offset;
    let mut flags = 0;
    match t.protocol {
        protocol::TCP => sum(ctx, l4 + 16, from, to, 0)?,
        protocol::UDP => {
            let none = Skb(ctx).read::<2>(l4 + 6).ok_or(Reason::Helper)? == [0, 0];
            if none {
                flags = RECOMPUTE;
            } else {
                sum(ctx, l4 + 6, from, to, MANGLED_0)?;
            }
        }
        protocol::SCTP => sctp(ctx, network, t, field, from ^ to)?,
        _ => return Ok(()),
    }
    store(ctx, l4 + field, &to.to_be_bytes(), flags)
}

/// Changes the checksum of an SCTP packet for a change of one port.
#[inline(always)]
fn sctp(ctx: &TcContext, network: &Network, t: &Transport, field: u32, change: u16) -> Result<(), Reason> {
    if t.first_fragment {
        // How far the end of the packet is, only the last fragment says.
        return Err(Reason::Untranslatable);
    }
    let old = Skb(ctx).read::<4>(t.offset + 8).ok_or(Reason::Helper)?;
    // 0: left to the network card, or agreed to be none (RFC 9653).
    if old == [0; 4] {
        return Ok(());
    }
    let behind = network.end.wrapping_sub(t.offset).wrapping_sub(field + 2) as u16;
    let new = u32::from_le_bytes(old) ^ crc32c::difference(change, behind);
    store(ctx, t.offset + 8, &new.to_le_bytes(), 0)
}

/// Sets a port of the packet that an ICMP error quotes.
#[inline(always)]
fn quoted_port(
    ctx: &TcContext,
    network: &Network,
    t: &Transport,
    field: u32,
    from: u16,
    to: u16,
) -> Result<(), Reason> {
    let inner = match t.protocol {
        protocol::TCP => 16,
        protocol::UDP => 6,
        _ => 0,
    };
    let at = t.quote_l4 + inner;
    let mut has_sum = false;
    if inner != 0 && at + 2 <= network.end {
        let old = Skb(ctx).read::<2>(at).ok_or(Reason::Helper)?;
        has_sum = t.protocol == protocol::TCP || old != [0, 0];
    }
    if has_sum {
        // What the port changes in the sum of the ICMP message, its quoted checksum changes back.
        sum(ctx, at, from, to, if t.protocol == protocol::UDP { MANGLED_0 } else { 0 })?;
    } else {
        sum(ctx, t.offset + 2, from, to, 0)?;
    }
    store(ctx, t.quote_l4 + field, &to.to_be_bytes(), 0)
}

/// Sets the destination port on the way to the target; in an ICMP error, the source port of what the target has sent.
#[inline(always)]
pub fn destination(ctx: &TcContext, network: &Network, transport: &Transport, to: u16) -> Result<(), Reason> {
    if transport.quote != 0 {
        return quoted_port(ctx, network, transport, 0, transport.dport, to);
    }
    port(ctx, network, transport, 2, transport.dport, to)
}

/// Whether the packet is an ICMP message: a first look that costs less than reading the packet whole.
#[inline(always)]
fn is_icmp(skb: &Skb<'_>, v4: bool) -> bool {
    if v4 { skb.read::<1>(9) == Some([protocol::ICMP]) } else { skb.read::<1>(6) == Some([protocol::ICMPV6]) }
}

/// Replies of targets: sets the source port back to the one that the client addressed. ICMP errors about packets to a VIP:
/// sets the quoted destination port back, and lets one that says "too big" come from the VIP, because the address of a
/// load balancer means nothing outside and may be filtered there.
///
/// # Errors
/// Why it cannot be done; the packet may be half changed.
#[inline(always)]
pub fn outgoing(ctx: &TcContext, ethertype: u16) -> Result<(), Reason> {
    let skb = Skb(ctx);
    let Some(config) = CONFIG.get_ptr(0) else { return Ok(()) };
    // What leaves is looked up without a memory of prefixes.
    let maps = &Maps { config, remember: false };
    let (switches, flags) = maps.generation();
    let nat = flags & flag::NAT != 0;
    if !nat && !is_icmp(&skb, ethertype == ETH_IPV4) {
        return Ok(());
    }
    let Some(scratch) = EGRESS_SCRATCH.get_ptr_mut(0) else { return Ok(()) };
    // SAFETY: a per-CPU value that only this program uses, and it does not nest on one CPU.
    let s = unsafe { &mut *scratch };
    s.enter(switches);
    if !packet::network(&skb, ethertype, 0, &mut s.network)
        || packet::transport(&skb, &s.network, &mut s.quoted, &mut s.transport).is_err()
    {
        return Ok(());
    }
    if s.transport.quote != 0 {
        return error(ctx, maps, s, nat);
    }
    if !nat || !matches!(s.transport.kind, Kind::Ports) || !vip_class(maps, s, End::Source) {
        return Ok(());
    }
    let from = s.transport.sport;
    let to = translation(maps, s, 1, from);
    if to == 0 { Ok(()) } else { port(ctx, &s.network, &s.transport, 0, from, to) }
}

/// An ICMP error that leaves, about a packet that came from outside.
#[inline(always)]
fn error(ctx: &TcContext, maps: &Maps, s: &mut Scratch, nat: bool) -> Result<(), Reason> {
    if !vip_class(maps, s, End::QuotedDestination) {
        return Ok(());
    }
    if nat && matches!(s.transport.kind, Kind::Ports) {
        let from = s.transport.sport;
        let to = translation(maps, s, 1, from);
        if to != 0 {
            quoted_port(ctx, &s.network, &s.transport, 2, from, to)?;
        }
    }
    let message = Skb(ctx).read::<2>(s.transport.offset).ok_or(Reason::Helper)?;
    let too_big = if s.network.v6 { message[0] == 2 } else { message == [3, 4] };
    if too_big && s.network.src != s.quoted.dst {
        source(ctx, s)?;
        count(&REASONS, Reason::SourceSet as u32, Size { segments: 1, bytes: ctx.len().wrapping_sub(L2) });
    }
    Ok(())
}

/// Makes the VIP the source of the packet.
#[inline(always)]
fn source(ctx: &TcContext, s: &mut Scratch) -> Result<(), Reason> {
    let (from, to) = (&s.network.src, &s.quoted.dst);
    if s.network.v6 {
        // SAFETY: two buffers of 16 bytes.
        let difference =
            unsafe { bpf_csum_diff(from.as_ptr().cast_mut().cast(), 16, to.as_ptr().cast_mut().cast(), 16, 0) };
        let at = s.transport.offset + 2 + L2;
        // SAFETY: plain arguments; the flags say that the difference is already made.
        let result = unsafe { bpf_l4_csum_replace(ctx.as_ptr().cast(), at, 0, difference as u64, PSEUDO_HEADER) };
        if result != 0 {
            return Err(Reason::Helper);
        }
        return store(ctx, 8, to, 0);
    }
    let from = u32::from_ne_bytes([from[12], from[13], from[14], from[15]]);
    let to = [to[12], to[13], to[14], to[15]];
    // SAFETY: plain arguments.
    let result =
        unsafe { bpf_l3_csum_replace(ctx.as_ptr().cast(), 10 + L2, from as u64, u32::from_ne_bytes(to) as u64, 4) };
    if result != 0 {
        return Err(Reason::Helper);
    }
    store(ctx, 12, &to, 0)
}
