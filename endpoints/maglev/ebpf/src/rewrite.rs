//! Changes to packets: age, ports, and the source of ICMP errors.

use aya_ebpf::{
    EbpfContext,
    helpers::generated::{bpf_l4_csum_replace, bpf_skb_store_bytes},
    programs::TcContext,
};
use meridio_decision::{
    Reason,
    decide::{Tables, destination_class, translation},
    layout::flag,
    packet::{self, Kind, Network, Transport, protocol},
};

use crate::{
    maps::{EGRESS_SCRATCH, Maps},
    skb::{L2, Skb},
};

/// The checksum may be 0 for "none" and must not become 0 (UDP).
const MANGLED_0: u64 = 0x20;

#[inline(always)]
fn store<const N: usize>(ctx: &TcContext, offset: u32, bytes: &[u8; N]) -> Result<(), Reason> {
    // SAFETY: the helper reads N bytes from a buffer of N bytes.
    let result = unsafe { bpf_skb_store_bytes(ctx.as_ptr().cast(), offset + L2, bytes.as_ptr().cast(), N as u32, 0) };
    if result == 0 { Ok(()) } else { Err(Reason::Helper) }
}

/// Takes one from TTL or hop limit; the packet's is above 1.
#[inline(always)]
pub fn age(ctx: &TcContext, network: &Network) -> Result<(), Reason> {
    let ttl = network.ttl - 1;
    if network.v6 {
        return store(ctx, 7, &[ttl]);
    }
    // RFC 1624 for a change of 0x0100 in one word.
    let sum = network.checksum as u32 + 0x0100;
    let sum = (sum & 0xffff) + (sum >> 16);
    let [high, low] = (sum as u16).to_be_bytes();
    store(ctx, 8, &[ttl, network.protocol, high, low])
}

/// Where the checksum of a translated protocol lies, and the flags of its update.
#[inline(always)]
fn checksum(proto: u8, offset: u32) -> Option<(u32, u64)> {
    match proto {
        protocol::TCP => Some((offset + 16, 2)),
        protocol::UDP => Some((offset + 6, 2 | MANGLED_0)),
        _ => None,
    }
}

#[inline(always)]
fn port(ctx: &TcContext, proto: u8, l4: u32, field: u32, from: u16, to: u16) -> Result<(), Reason> {
    let Some((at, flags)) = checksum(proto, l4) else { return Ok(()) };
    // SAFETY: plain arguments.
    let result =
        unsafe { bpf_l4_csum_replace(ctx.as_ptr().cast(), at + L2, from.to_be() as u64, to.to_be() as u64, flags) };
    if result != 0 {
        return Err(Reason::Helper);
    }
    store(ctx, l4 + field, &to.to_be_bytes())
}

/// Sets the destination port on the way to the target.
#[inline(always)]
pub fn destination(ctx: &TcContext, network: &Network, transport: &Transport, to: u16) -> Result<(), Reason> {
    let _ = network;
    if transport.quote != 0 {
        return Ok(());
    }
    port(ctx, transport.protocol, transport.offset, 2, transport.dport, to)
}

/// Replies of targets: sets the source port back to the one that the client addressed.
#[inline(always)]
pub fn outgoing(ctx: &TcContext, ethertype: u16) {
    let (generation, flags) = Maps.generation();
    if flags & flag::NAT == 0 {
        return;
    }
    let Some(scratch) = EGRESS_SCRATCH.get_ptr_mut(0) else { return };
    // SAFETY: a per-CPU value that only this program uses, and it does not nest on one CPU.
    let s = unsafe { &mut *scratch };
    let skb = Skb(ctx);
    s.generation = generation;
    if !packet::network(&skb, ethertype, 0, &mut s.network) || !destination_class(&Maps, s, false) {
        return;
    }
    if packet::transport(&skb, &s.network, &mut s.quoted, &mut s.transport).is_err()
        || !matches!(s.transport.kind, Kind::Ports)
        || s.transport.quote != 0
    {
        return;
    }
    let to = translation(&Maps, s, 1, s.transport.sport);
    if to != 0 {
        let _ = port(ctx, s.transport.protocol, s.transport.offset, 0, s.transport.sport, to);
    }
}
