//! The headers of a packet, read by offsets from their definitions (RFC 791, 8200, 792, 4443).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Reason;

#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    pub(super) protocol: u8,
    pub(super) ports: Option<(u16, u16)>,
    pub(super) ping: Option<u16>,
    pub(super) quote: bool,
    pub(super) first_fragment: bool,
    pub(super) later_fragment: bool,
    /// Identification of a fragmented packet.
    pub(super) id: u32,
    /// Where the packet's own L4 header begins.
    pub(super) l4: usize,
    /// Where the packet ends by its own account.
    pub(super) end: usize,
    /// Where the L4 header of the quoted packet begins.
    pub(super) quoted_l4: usize,
}

struct Header {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    l4: usize,
    end: usize,
    later_fragment: bool,
    first_fragment: bool,
    id: u32,
}

pub(super) fn u16_at(b: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*b.get(at)?, *b.get(at + 1)?]))
}

pub(super) fn addresses(b: &[u8], v6: bool) -> Option<(IpAddr, IpAddr)> {
    if v6 {
        let a: [u8; 16] = b.get(8..24)?.try_into().ok()?;
        let d: [u8; 16] = b.get(24..40)?.try_into().ok()?;
        (b[0] >> 4 == 6).then(|| (Ipv6Addr::from(a).into(), Ipv6Addr::from(d).into()))
    } else {
        let a: [u8; 4] = b.get(12..16)?.try_into().ok()?;
        let d: [u8; 4] = b.get(16..20)?.try_into().ok()?;
        (b[0] >> 4 == 4).then(|| (Ipv4Addr::from(a).into(), Ipv4Addr::from(d).into()))
    }
}

/// Walks the headers of `b`; `whole` is false for a quoted packet, which may be cut off. Offsets are within `b`.
fn header(b: &[u8], v6: bool, whole: bool) -> Result<Header, Reason> {
    let (src, dst) = addresses(b, v6).ok_or(Reason::Truncated)?;
    if !v6 {
        let ihl = (b[0] & 15) as usize * 4;
        let total = u16_at(b, 2).unwrap_or(0) as usize;
        if ihl < 20 || total < ihl || (whole && total > b.len()) {
            return Err(Reason::Malformed);
        }
        let fragment = u16_at(b, 6).unwrap_or(0);
        let offset = fragment & 0x1fff;
        return Ok(Header {
            src,
            dst,
            protocol: b[9],
            l4: ihl,
            end: total,
            later_fragment: offset != 0,
            first_fragment: offset == 0 && fragment & 0x2000 != 0,
            id: u16_at(b, 4).unwrap_or(0) as u32,
        });
    }
    let payload = u16_at(b, 4).unwrap_or(0) as usize;
    let end = 40 + payload;
    if whole && end > b.len() {
        return Err(Reason::Malformed);
    }
    let (mut protocol, mut at) = (b[6], 40);
    let mut h = Header { src, dst, protocol, l4: at, end, later_fragment: false, first_fragment: false, id: 0 };
    let mut steps = 0;
    while [0, 43, 44, 51, 60].contains(&protocol) {
        if steps == 8 {
            return Err(Reason::Extensions);
        }
        steps += 1;
        let needed = if protocol == 44 { 8 } else { 2 };
        let bytes = b.get(at..at + needed).ok_or(Reason::Truncated)?;
        let next = bytes[0];
        match protocol {
            44 => {
                let field = u16::from_be_bytes([bytes[2], bytes[3]]);
                at += 8;
                h.first_fragment = field & 1 != 0 && field >> 3 == 0;
                h.id = u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
                if field >> 3 != 0 {
                    (h.protocol, h.l4, h.later_fragment) = (next, at, true);
                    return Ok(h);
                }
            }
            51 => at += (bytes[1] as usize + 2) * 4,
            _ => at += (bytes[1] as usize + 1) * 8,
        }
        protocol = next;
    }
    (h.protocol, h.l4) = (protocol, at);
    Ok(h)
}

fn is_echo(v6: bool, t: u8) -> bool {
    if v6 { t == 128 || t == 129 } else { t == 0 || t == 8 }
}

/// `Ok(None)`: for the stack of this machine.
pub(super) fn key(b: &[u8], v6: bool) -> Result<Option<Key>, Reason> {
    let h = header(b, v6, true)?;
    let mut k = Key {
        src: h.src,
        dst: h.dst,
        protocol: h.protocol,
        ports: None,
        ping: None,
        quote: false,
        first_fragment: h.first_fragment,
        later_fragment: h.later_fragment,
        id: h.id,
        l4: h.l4,
        end: h.end,
        quoted_l4: 0,
    };
    if h.l4 > h.end {
        return Err(Reason::Truncated);
    }
    if h.later_fragment {
        return Ok(Some(k));
    }
    let need = |n: usize| if h.l4 + n > h.end { Err(Reason::Truncated) } else { Ok(()) };
    let ports = |at: usize| (u16_at(b, at).unwrap_or(0), u16_at(b, at + 2).unwrap_or(0));
    match (h.protocol, v6) {
        (6, _) => {
            need(20)?;
            let header = (b[h.l4 + 12] >> 4) as usize * 4;
            if header < 20 || (header > h.end - h.l4 && !h.first_fragment) {
                return Err(Reason::Malformed);
            }
            k.ports = Some(ports(h.l4));
        }
        (17, _) => {
            need(8)?;
            let length = u16_at(b, h.l4 + 4).unwrap_or(0) as usize;
            let short = length < 8 && !(v6 && length == 0);
            if short || (length > h.end - h.l4 && !h.first_fragment) {
                return Err(Reason::Malformed);
            }
            k.ports = Some(ports(h.l4));
        }
        (132, _) => {
            need(12)?;
            k.ports = Some(ports(h.l4));
        }
        (1, false) | (58, true) => {
            need(8)?;
            let t = b[h.l4];
            let is_error = if v6 { (1..=4).contains(&t) } else { [3, 4, 5, 11, 12].contains(&t) };
            if is_echo(v6, t) {
                k.ping = u16_at(b, h.l4 + 4);
            } else if v6 && (130..=143).contains(&t) {
                return Ok(None);
            } else if is_error {
                if h.first_fragment {
                    return Err(Reason::FragmentedError);
                }
                return quoted(b, v6, &h).map(Some);
            }
        }
        _ => {}
    }
    Ok(Some(k))
}

fn quoted(b: &[u8], v6: bool, outer: &Header) -> Result<Key, Reason> {
    let q = b.get(outer.l4 + 8..).unwrap_or(&[]);
    let end = outer.end - outer.l4 - 8;
    if addresses(q, v6).is_none() {
        return Err(Reason::Truncated);
    }
    // Order of refusals: contradictions first, then a stranger's packet.
    if !v6 {
        let (ihl, total) = ((q[0] & 15) as usize * 4, u16_at(q, 2).unwrap_or(0) as usize);
        if ihl < 20 || total < ihl {
            return Err(Reason::Malformed);
        }
    }
    if addresses(q, v6).map(|a| a.0) != Some(outer.dst) {
        return Err(Reason::QuoteMismatch);
    }
    let h = header(q, v6, false)?;
    if h.later_fragment {
        return Err(Reason::FragmentedError);
    }
    let mut k = Key {
        src: h.dst,
        dst: h.src,
        protocol: h.protocol,
        ports: None,
        ping: None,
        quote: true,
        first_fragment: false,
        later_fragment: false,
        id: 0,
        l4: outer.l4,
        end: outer.end,
        quoted_l4: outer.l4 + 8 + h.l4,
    };
    match h.protocol {
        6 | 17 | 132 => {
            if h.l4 + 4 > end {
                return Err(Reason::Truncated);
            }
            k.ports = Some((u16_at(q, h.l4 + 2).unwrap_or(0), u16_at(q, h.l4).unwrap_or(0)));
        }
        1 | 58 => {
            if h.l4 + 6 > end {
                return Err(Reason::Truncated);
            }
            if is_echo(v6, q[h.l4]) {
                k.ping = u16_at(q, h.l4 + 4);
            }
        }
        _ => {}
    }
    Ok(k)
}
