//! What a packet looks like after the program has forwarded it.

use super::headers::{Key, key, u16_at};
use super::{Answer, Reference};

/// What follows a change of a 16-bit word in an Internet checksum (RFC 1624, equation 3).
fn adjusted(sum: u16, from: u16, to: u16) -> u16 {
    let mut new = u32::from(!sum) + u32::from(!from) + u32::from(to);
    while new > 0xffff {
        new = new % 0x1_0000 + new / 0x1_0000;
    }
    !(new as u16)
}

fn put(b: &mut [u8], at: usize, word: u16) {
    if let Some(place) = b.get_mut(at..at + 2) {
        place.copy_from_slice(&word.to_be_bytes());
    }
}

/// Adjusts the checksum at a place.
fn adjust(b: &mut [u8], at: usize, from: u16, to: u16) {
    let sum = u16_at(b, at).unwrap_or(0);
    put(b, at, adjusted(sum, from, to));
}

/// The same for UDP, where 0 says that there is none.
fn adjust_udp(b: &mut [u8], at: usize, from: u16, to: u16) {
    let sum = u16_at(b, at).unwrap_or(0);
    let new = adjusted(sum, from, to);
    put(b, at, if new == 0 { 0xffff } else { new });
}

/// CRC32c, bit by bit (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc % 2 == 1 { (crc / 2) ^ 0x82f6_3b78 } else { crc / 2 };
        }
    }
    !crc
}

/// Sets the destination port of the packet itself.
fn translate(b: &mut [u8], k: &Key, from: u16, to: u16) {
    let before = b.get(k.l4..k.end).unwrap_or(&[]).to_vec();
    put(b, k.l4 + 2, to);
    match k.protocol {
        6 => adjust(b, k.l4 + 16, from, to),
        17 if u16_at(b, k.l4 + 6) != Some(0) => adjust_udp(b, k.l4 + 6, from, to),
        132 => {
            let Some(sum) = before.get(8..12).and_then(|s| <[u8; 4]>::try_from(s).ok()) else { return };
            if sum != [0; 4] {
                // The sum is linear: what the port changes in it does not depend on whether it was right.
                let difference = crc32c(&before) ^ crc32c(b.get(k.l4..k.end).unwrap_or(&[]));
                let new = u32::from_le_bytes(sum) ^ difference;
                b[k.l4 + 8..k.l4 + 12].copy_from_slice(&new.to_le_bytes());
            }
        }
        _ => {}
    }
}

/// Sets the source port of the packet that an ICMP error quotes.
fn translate_quoted(b: &mut [u8], k: &Key, from: u16, to: u16) {
    let at = k.quoted_l4;
    put(b, at, to);
    let sum = |place: usize| (at + place + 2 <= k.end).then(|| u16_at(b, at + place)).flatten();
    match k.protocol {
        // What the port changes in the sum of the message, its quoted checksum changes back.
        6 if sum(16).is_some() => adjust(b, at + 16, from, to),
        17 if sum(6).is_some_and(|sum| sum != 0) => adjust_udp(b, at + 6, from, to),
        _ => adjust(b, k.l4 + 2, from, to),
    }
}

impl Reference {
    /// A forwarded packet as it leaves, and whether it takes the fast path; the slow one is that of the kernel's stack, which
    /// counts the TTL itself. `None`: it is not forwarded.
    pub fn forwarded(&self, b: &[u8], v6: bool, answer: &Answer) -> Option<(bool, Vec<u8>)> {
        let Answer::Forward { nat_port, .. } = answer else { return None };
        let k = key(b, v6).ok()??;
        let mut after = b.to_vec();
        if let Some((_, port)) = k.ports.filter(|_| *nat_port != 0) {
            if k.quote {
                translate_quoted(&mut after, &k, port, *nat_port);
            } else {
                translate(&mut after, &k, port, *nat_port);
            }
        }
        let (ttl, options) = if v6 { (b[7], false) } else { (b[8], b[0] % 16 > 5) };
        if ttl < 2 || options {
            return Some((false, after));
        }
        if k.dst.is_ipv4() {
            let word = |ttl| u16::from_be_bytes([ttl, b[9]]);
            adjust(&mut after, 10, word(ttl), word(ttl - 1));
            after[8] = ttl - 1;
        } else {
            after[7] = ttl - 1;
        }
        Some((true, after))
    }
}
