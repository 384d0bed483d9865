//! The hash of a packet's key and the row that it selects.

use crate::packet::protocol;

const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;

/// Mixes one word into the hash.
#[inline(always)]
const fn mix(hash: u64, word: u64) -> u64 {
    let h = (hash ^ word).wrapping_mul(MULTIPLIER);
    h ^ (h >> 29)
}

#[inline(always)]
fn halves(a: [u8; 16]) -> (u64, u64) {
    let whole = u128::from_be_bytes(a);
    ((whole >> 64) as u64, whole as u64)
}

/// Hash of a packet's key. It has no seed that differs between load balancers, so that all of them agree.
#[inline(always)]
pub fn key(src: [u8; 16], dst: [u8; 16], proto: u8, sport: u16, dport: u16, sctp_ports_only: bool) -> u32 {
    let ports = ((proto as u64) << 32) | ((sport as u64) << 16) | dport as u64;
    let mut h = mix(0x6d65_7269_6469_6f31, ports);
    if !(sctp_ports_only && proto == protocol::SCTP) {
        let (s1, s2) = halves(src);
        let (d1, d2) = halves(dst);
        h = mix(h, s1);
        h = mix(h, s2);
        h = mix(h, d1);
        h = mix(h, d2);
    }
    h = mix(h, h >> 32);
    (h >> 32) as u32
}

/// Row of `hash` in a table of `rows`: multiply and shift, because a remainder costs a division and its bound is lost
/// on the verifier.
#[inline(always)]
pub const fn row(hash: u32, rows: u32) -> u32 {
    ((hash as u64 * rows as u64) >> 32) as u32
}

/// 64 bits from two numbers: the only source of "randomness" of the tables, the same on every machine.
pub const fn pair(a: u64, b: u64) -> u64 {
    pair_with(first(a), b)
}

/// What [`pair`] makes of its first number, for many second ones.
pub const fn first(a: u64) -> u64 {
    mix(0x7461_626c_6573_2031, a)
}

/// [`pair`] of what was given to [`first`], and `b`.
pub const fn pair_with(first: u64, b: u64) -> u64 {
    let h = mix(first, b);
    let h = (h ^ (h >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    h ^ (h >> 32)
}
