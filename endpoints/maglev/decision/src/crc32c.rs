//! CRC32c, the checksum of SCTP (RFC 9260, appendix A), changed without reading the packet: the CRC is linear, so what a
//! changed port does to it depends on the change and on its distance from the end alone.

/// The polynomial, lowest power in the highest bit.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// x^(8 * 2^k) modulo the polynomial: what 2^k bytes behind a bit do to it.
#[allow(clippy::indexing_slicing)] // by the compiler, which would refuse
const SHIFTS: [u32; 16] = {
    let mut shifts = [0; 16];
    // x^8 is the ninth power from the top.
    let mut power = 1u32 << (31 - 8);
    let mut k = 0;
    while k < 16 {
        shifts[k] = power;
        power = multiply(power, power);
        k += 1;
    }
    shifts
};

/// Product modulo the polynomial. Without a branch on values: the verifier would follow each.
#[inline(always)]
const fn multiply(a: u32, b: u32) -> u32 {
    let (mut a, mut b, mut product) = (a, b, 0u32);
    let mut n = 0;
    while n < 32 {
        product ^= b & 0u32.wrapping_sub(a >> 31);
        a <<= 1;
        b = (b >> 1) ^ (POLYNOMIAL & 0u32.wrapping_sub(b & 1));
        n += 1;
    }
    product
}

/// By what to XOR the checksum of a packet (as it stands in the header, read little-endian) when two bytes of it are
/// XORed with `change`, big-endian, and `behind` bytes follow them.
#[inline(always)]
pub fn difference(change: u16, behind: u16) -> u32 {
    let mut crc = change.swap_bytes() as u32;
    // Two bytes through the shift register.
    crc = multiply(crc, SHIFTS[1]);
    for (k, shift) in SHIFTS.iter().enumerate() {
        // Times the power, or times one.
        let factor = if (behind >> k) & 1 != 0 { *shift } else { 1 << 31 };
        crc = multiply(crc, factor);
    }
    crc
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    /// Bit by bit, from the definition.
    fn crc32c(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= *byte as u32;
            for _ in 0..8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ POLYNOMIAL } else { crc >> 1 };
            }
        }
        !crc
    }

    #[test]
    fn the_definition_is_the_standards() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283, "check value of CRC-32C");
    }

    #[test]
    fn a_change_is_as_good_as_a_new_checksum() {
        for length in [12usize, 13, 16, 40, 257, 1480, 9000, 65_000] {
            let mut packet: Vec<u8> = (0..length).map(|n| (n * 31 + 7) as u8).collect();
            for (at, port) in [(0usize, 80u16), (2, 4000), (2, 1), (0, 65_535)] {
                let before = crc32c(&packet);
                let change = u16::from_be_bytes([packet[at], packet[at + 1]]) ^ port;
                packet[at..at + 2].copy_from_slice(&port.to_be_bytes());
                let changed = before ^ difference(change, (length - at - 2) as u16);
                assert_eq!(changed, crc32c(&packet), "{length} bytes, {at}: {port}");
            }
        }
    }
}
