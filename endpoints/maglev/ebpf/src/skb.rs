//! The packet as the decision reads it.

use core::mem::MaybeUninit;

use aya_ebpf::{EbpfContext, helpers::generated::bpf_skb_load_bytes, programs::TcContext};
use meridio_decision::Packet;

/// Length of the Ethernet header that TC ingress sees in front of the network header.
pub const L2: u32 = 14;

/// Aligned, so that the compiler reads words where it can, not bytes.
#[repr(align(8))]
struct Aligned<T>(T);

/// A packet at a TC hook.
pub struct Skb<'a>(pub &'a TcContext);

impl Packet for Skb<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.0.len().wrapping_sub(L2)
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = Aligned(MaybeUninit::<[u8; N]>::uninit());
        // SAFETY: the helper writes N bytes to a buffer of N bytes; if it fails it fills them with 0.
        unsafe {
            let result = bpf_skb_load_bytes(
                self.0.as_ptr().cast(),
                offset.wrapping_add(L2),
                bytes.0.as_mut_ptr().cast(),
                N as u32,
            );
            if result == 0 { Some(bytes.0.assume_init()) } else { None }
        }
    }

    #[inline(always)]
    fn read_into<const N: usize>(&self, offset: u32, bytes: &mut [u8; N]) -> bool {
        // SAFETY: the helper writes N bytes to a buffer of N bytes, or fails.
        let result = unsafe {
            bpf_skb_load_bytes(self.0.as_ptr().cast(), offset.wrapping_add(L2), bytes.as_mut_ptr().cast(), N as u32)
        };
        result == 0
    }
}

/// Ethernet type of a packet.
#[inline(always)]
pub fn ethertype(ctx: &TcContext) -> u16 {
    u16::from_be(ctx.skb.protocol() as u16)
}
