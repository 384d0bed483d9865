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
    fn is_super(&self) -> bool {
        // SAFETY: reads of the context's fields.
        unsafe { (*self.0.skb.skb).gso_size != 0 }
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

    #[inline(always)]
    fn words<const N: usize>(&self, offset: u32, usual: u32) -> Option<[u32; N]> {
        // Constants, because the verifier wants to know where it is in the packet.
        let direct = match usual {
            0 if offset == 0 => direct::<0, N>(self.0),
            8 if offset == 8 => direct::<8, N>(self.0),
            24 if offset == 24 => direct::<24, N>(self.0),
            20 if offset == 20 => direct::<20, N>(self.0),
            40 if offset == 40 => direct::<40, N>(self.0),
            _ => None,
        };
        // It may lie behind the linear part.
        direct.or_else(|| self.load(offset))
    }
}

impl Skb<'_> {
    /// Words of the packet, wherever they lie.
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u32; N]> {
        let mut words = MaybeUninit::<[u32; N]>::uninit();
        // SAFETY: the helper writes 4 N bytes to a buffer of as many; if it fails it fills them with 0.
        unsafe {
            let at = offset.wrapping_add(L2);
            let to = words.as_mut_ptr().cast();
            if bpf_skb_load_bytes(self.0.as_ptr().cast(), at, to, 4 * N as u32) == 0 {
                Some(words.assume_init())
            } else {
                None
            }
        }
    }
}

/// Words of the packet where they are, without a call; `None`: not all of them are in its linear part.
#[inline(always)]
fn direct<const AT: usize, const N: usize>(ctx: &TcContext) -> Option<[u32; N]> {
    let from = ctx.data() + L2 as usize + AT;
    if from + 4 * N > ctx.data_end() {
        return None;
    }
    let mut words = [0u32; N];
    let mut n = 0;
    // SAFETY: within the packet, as just checked. Words need not be aligned: the verifier would refuse the program on
    // a machine where they have to be.
    unsafe {
        while n < N {
            words[n] = ((from + 4 * n) as *const u32).read();
            n += 1;
        }
    }
    Some(words)
}

/// Ethernet type of a packet.
#[inline(always)]
pub fn ethertype(ctx: &TcContext) -> u16 {
    u16::from_be(ctx.skb.protocol() as u16)
}
