//! Packets byte by byte, with right checksums.

use std::net::IpAddr;

/// The Internet checksum (RFC 1071) of `parts`, each of even length but the last.
pub(crate) fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]) as u32;
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

fn octets(a: IpAddr) -> Vec<u8> {
    match a {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut b = [octets(src), octets(dst)].concat();
    b.extend((length as u32).to_be_bytes());
    b.extend([0, 0, 0, protocol]);
    b
}

/// Bit by bit (RFC 9260, appendix A).
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= *byte as u32;
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

/// Offset of the checksum in an L4 header.
fn place(protocol: u8) -> usize {
    match protocol {
        6 => 16,
        17 => 6,
        132 => 8,
        _ => 2,
    }
}

fn set_sum(l4: &mut [u8], src: IpAddr, dst: IpAddr, protocol: u8) {
    let at = place(protocol);
    if protocol == 132 {
        let crc = crc32c(l4);
        l4[8..12].copy_from_slice(&crc.to_le_bytes());
        return;
    }
    let sum = match protocol {
        1 => checksum(&[l4]),
        _ => checksum(&[&pseudo(src, dst, protocol, l4.len()), l4]),
    };
    l4[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// Whether the checksum of an L4 packet between two addresses is right.
pub(crate) fn is_right(l4: &[u8], src: IpAddr, dst: IpAddr, protocol: u8) -> bool {
    match protocol {
        132 => {
            let mut copy = l4.to_vec();
            copy[8..12].fill(0);
            crc32c(&copy).to_le_bytes() == l4[8..12]
        }
        1 => checksum(&[l4]) == 0,
        _ => checksum(&[&pseudo(src, dst, protocol, l4.len()), l4]) == 0,
    }
}

pub(crate) fn udp(src: IpAddr, dst: IpAddr, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut b = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    b.extend((8 + payload.len() as u16).to_be_bytes());
    b.extend([0, 0]);
    b.extend(payload);
    set_sum(&mut b, src, dst, 17);
    b
}

/// A bare acknowledgement.
pub(crate) fn tcp(src: IpAddr, dst: IpAddr, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut b = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    b.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 7]);
    b.extend(payload);
    set_sum(&mut b, src, dst, 6);
    b
}

pub(crate) fn sctp(src: IpAddr, dst: IpAddr, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut b = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    b.extend([1, 2, 3, 4, 0, 0, 0, 0]);
    b.extend(payload);
    set_sum(&mut b, src, dst, 132);
    b
}

/// An ICMP or ICMPv6 message: type, code, four bytes, and the rest.
pub(crate) fn icmp(src: IpAddr, dst: IpAddr, kind: [u8; 2], word: [u8; 4], rest: &[u8]) -> Vec<u8> {
    let mut b = vec![kind[0], kind[1], 0, 0];
    b.extend(word);
    b.extend(rest);
    set_sum(&mut b, src, dst, if src.is_ipv4() { 1 } else { 58 });
    b
}

/// The IP packet around an L4 packet.
pub(crate) fn packet(src: IpAddr, dst: IpAddr, protocol: u8, l4: &[u8]) -> Vec<u8> {
    fragment(src, dst, protocol, l4, 0, 0, false)
}

/// One fragment: `part` of the L4 packet, at `offset` bytes; `more` follow. IPv4 without fragmentation says "do not".
pub(crate) fn fragment(
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    part: &[u8],
    id: u32,
    offset: u16,
    more: bool,
) -> Vec<u8> {
    let whole = offset == 0 && !more;
    match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            let mut b = vec![0x45, 0];
            b.extend((20 + part.len() as u16).to_be_bytes());
            b.extend((id as u16).to_be_bytes());
            let flags = if whole { 0x4000 } else { (more as u16) << 13 };
            b.extend((flags | (offset / 8)).to_be_bytes());
            b.extend([64, protocol, 0, 0]);
            b.extend(s.octets());
            b.extend(d.octets());
            let sum = checksum(&[&b]);
            b[10..12].copy_from_slice(&sum.to_be_bytes());
            b.extend(part);
            b
        }
        (IpAddr::V6(_), IpAddr::V6(_)) if whole => v6(src, dst, protocol, part),
        _ => {
            let mut b = vec![protocol, 0];
            b.extend((offset | more as u16).to_be_bytes());
            b.extend(id.to_be_bytes());
            b.extend(part);
            v6(src, dst, 44, &b)
        }
    }
}

/// An IPv6 packet around what its next header says.
pub(crate) fn v6(src: IpAddr, dst: IpAddr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut b = vec![0x60, 0, 0, 0];
    b.extend((payload.len() as u16).to_be_bytes());
    b.extend([next, 64]);
    b.extend(octets(src));
    b.extend(octets(dst));
    b.extend(payload);
    b
}

/// Protocol and L4 packet of a packet without extension headers, when its network header is right.
pub(crate) fn l4(packet: &[u8]) -> Option<(u8, &[u8])> {
    if packet.first()? >> 4 == 4 {
        let header = packet.get(..20)?;
        let total = u16::from_be_bytes([packet[2], packet[3]]) as usize;
        (checksum(&[header]) == 0).then_some((packet[9], packet.get(20..total)?))
    } else {
        let length = u16::from_be_bytes([*packet.get(4)?, *packet.get(5)?]) as usize;
        Some((packet[6], packet.get(40..40 + length)?))
    }
}

/// Source and destination address.
pub(crate) fn ends(packet: &[u8]) -> (IpAddr, IpAddr) {
    if packet[0] >> 4 == 4 {
        let a = |at: usize| <[u8; 4]>::try_from(&packet[at..at + 4]).unwrap();
        (a(12).into(), a(16).into())
    } else {
        let a = |at: usize| <[u8; 16]>::try_from(&packet[at..at + 16]).unwrap();
        (a(8).into(), a(24).into())
    }
}

/// The frame around a packet.
pub(crate) fn ethernet(to: [u8; 6], from: [u8; 6], packet: &[u8]) -> Vec<u8> {
    let kind: [u8; 2] = if packet[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xdd] };
    [&to[..], &from, &kind, packet].concat()
}
