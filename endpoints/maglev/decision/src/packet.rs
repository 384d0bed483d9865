//! Reading a packet: IPv4, IPv6 with extension headers, TCP, UDP, SCTP, ICMP echo, ICMP errors, fragments.

use crate::Reason;

/// Read access to a packet from its network header on.
pub trait Packet {
    /// Bytes from the network header to the end of the packet.
    fn len(&self) -> u32;
    /// Whether there is nothing to read.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// `N` bytes at `offset` behind the start of the network header; `None` beyond the end.
    #[inline(always)]
    fn read<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = [0u8; N];
        if self.read_into(offset, &mut bytes) { Some(bytes) } else { None }
    }
    /// As `read`, into memory of the caller; `false` beyond the end.
    fn read_into<const N: usize>(&self, offset: u32, bytes: &mut [u8; N]) -> bool;
    /// Whether it stands for several (GRO, segmentation offload). Such a packet may be longer than its header can say.
    fn is_super(&self) -> bool {
        false
    }
    /// `N` words as they lie in memory, for what most packets have at `usual`: the reader may have a shorter way there. (Words,
    /// because where two ways meet the compiler would put bytes together one by one.)
    #[inline(always)]
    fn words<const N: usize>(&self, offset: u32, usual: u32) -> Option<[u32; N]> {
        let _ = usual;
        let mut words = [0; N];
        for (word, at) in words.iter_mut().zip((offset..).step_by(4)) {
            *word = u32::from_ne_bytes(self.read(at)?);
        }
        Some(words)
    }
}

/// The upper and the lower half of a word of the packet.
#[inline(always)]
const fn parts(word: u32) -> (u16, u16) {
    let word = u32::from_be(word);
    ((word >> 16) as u16, word as u16)
}

/// An IPv6 address of its words.
#[inline(always)]
fn address(words: [u32; 4]) -> [u8; 16] {
    let [a, b, c, d] = words.map(|word| word as u128);
    if cfg!(target_endian = "little") {
        (a | b << 32 | c << 64 | d << 96).to_ne_bytes()
    } else {
        (a << 96 | b << 64 | c << 32 | d).to_ne_bytes()
    }
}

/// Ethernet types that are looked at.
pub const ETH_IPV4: u16 = 0x0800;
/// See [`ETH_IPV4`].
pub const ETH_IPV6: u16 = 0x86dd;

/// IP protocol numbers.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// Authentication header.
    pub const AUTH: u8 = 51;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// What one less in an IPv6 hop limit adds to a sum over the packet's 16-bit words as they lie in memory (RFC 1071): its word
/// begins at an even offset, and the hop limit is the lower byte.
pub const AGED: u32 = !1u16.to_be() as u32;

/// Extension headers that are walked; a longer chain is refused.
pub const MAX_EXTENSIONS: usize = 8;

/// What the packet is to the classifier.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// TCP, UDP or SCTP with ports.
    #[default]
    Ports,
    /// ICMP echo; the identifier is in `sport`.
    Ping,
    /// Any other protocol: addresses only.
    Other,
    /// A fragment that is not the first.
    LaterFragment,
    /// Neighbour discovery and its kin: belongs to the stack of this machine, never to a target.
    Local,
}

/// The network header. Aligned with the addresses first, so that they are copied and hashed as words.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Network {
    /// Source address, IPv4 mapped into IPv6.
    pub src: [u8; 16],
    /// Destination address.
    pub dst: [u8; 16],
    /// IPv6.
    pub v6: bool,
    /// Offset of what follows the fixed header.
    pub next: u32,
    /// Protocol, or first extension header.
    pub protocol: u8,
    /// End of the packet according to its header.
    pub end: u32,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Checksum of the IPv4 header.
    pub checksum: u16,
    /// IPv4 options are present.
    pub options: bool,
    /// IPv4: flags and fragment offset.
    pub fragment: u16,
    /// IPv4: identification.
    pub id: u16,
    /// The fixed header contradicts itself or the packet.
    pub lying: bool,
}

impl Network {
    /// Where the transport header is if there are neither options nor extension headers.
    #[inline(always)]
    pub(crate) fn usual(&self) -> u32 {
        if self.v6 { 40 } else { 20 }
    }
}

/// The transport header, and the addresses that the flow is looked up by.
#[derive(Clone, Copy, Debug, Default)]
pub struct Transport {
    /// What it is.
    pub kind: Kind,
    /// IP protocol that the flow is looked up by.
    pub protocol: u8,
    /// Offset of the L4 header.
    pub offset: u32,
    /// Source port (echo: identifier).
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// More fragments follow and this is the first.
    pub first_fragment: bool,
    /// Identification of the fragmented packet.
    pub fragment_id: u32,
    /// Offset of the network header quoted by an ICMP error, 0: none. The flow is then looked up by the quoted
    /// packet turned round.
    pub quote: u32,
    /// Offset of the quoted L4 header.
    pub quote_l4: u32,
}

/// An IPv4 address within IPv6, put together as words.
#[inline(always)]
fn mapped(address: u32) -> [u8; 16] {
    (0xffff_0000_0000u128 | address as u128).to_be_bytes()
}

/// Reads the fixed header at `offset` of a packet whose Ethernet type says `ethertype`; `false`: not IP, or not even a
/// header.
///
/// It writes into `n` rather than returning a value: on the eBPF side that is per-CPU memory, because the stack has
/// 512 bytes for everything.
#[inline(always)]
pub fn network<P: Packet>(packet: &P, ethertype: u16, offset: u32, n: &mut Network) -> bool {
    if ethertype == ETH_IPV4 {
        let Some([first, second, third, src, dst]) = packet.words::<5>(offset, 0) else { return false };
        let (first, total) = parts(first);
        if first >> 12 != 4 {
            return false;
        }
        let words = (first >> 8) as u32 & 0x0f;
        let total = total as u32;
        let header = words * 4;
        n.src = mapped(u32::from_be(src));
        n.dst = mapped(u32::from_be(dst));
        n.v6 = false;
        n.next = offset + header;
        // A length of 0 in a super-packet means "too long to say" (Linux calls it BIG TCP): it ends where the buffer ends.
        let long = total == 0 && packet.is_super();
        n.end = if long { packet.len() } else { offset + total };
        let (lifetime, checksum) = parts(third);
        n.protocol = lifetime as u8;
        n.ttl = (lifetime >> 8) as u8;
        n.checksum = checksum;
        n.options = words > 5;
        let (id, fragment) = parts(second);
        n.fragment = fragment & 0x3fff;
        n.id = id;
        n.lying = words < 5 || (total < header && !long);
        true
    } else if ethertype == ETH_IPV6 {
        let Some([first, second]) = packet.words::<2>(offset, 0) else { return false };
        if u32::from_be(first) >> 28 != 6 {
            return false;
        }
        let Some(src) = packet.words::<4>(offset + 8, 8) else { return false };
        let Some(dst) = packet.words::<4>(offset + 24, 24) else { return false };
        n.src = address(src);
        n.dst = address(dst);
        let (payload, next) = parts(second);
        let payload = payload as u32;
        n.v6 = true;
        n.next = offset + 40;
        n.protocol = (next >> 8) as u8;
        // As above. Of any other packet 0 means that nothing follows.
        n.end = if payload == 0 && packet.is_super() { packet.len() } else { offset + 40 + payload };
        n.ttl = next as u8;
        n.checksum = 0;
        n.options = false;
        n.fragment = 0;
        n.id = 0;
        n.lying = false;
        true
    } else {
        false
    }
}

/// What lies behind the fixed header and the extension headers.
#[derive(Clone, Copy)]
struct Upper {
    protocol: u8,
    offset: u32,
    more_fragments: bool,
    fragment_offset: u16,
    fragment_id: u32,
}

#[inline(always)]
fn upper<P: Packet>(packet: &P, network: &Network) -> Result<Upper, Reason> {
    if !network.v6 {
        return Ok(Upper {
            protocol: network.protocol,
            offset: network.next,
            more_fragments: network.fragment & 0x2000 != 0,
            fragment_offset: network.fragment & 0x1fff,
            fragment_id: network.id as u32,
        });
    }
    let mut at = Upper {
        protocol: network.protocol,
        offset: network.next,
        more_fragments: false,
        fragment_offset: 0,
        fragment_id: 0,
    };
    for _ in 0..MAX_EXTENSIONS {
        match at.protocol {
            0 | 43 | 60 => {
                let h = packet.read::<2>(at.offset).ok_or(Reason::Truncated)?;
                at.protocol = h[0];
                at.offset += (h[1] as u32 + 1) * 8;
            }
            protocol::AUTH => {
                let h = packet.read::<2>(at.offset).ok_or(Reason::Truncated)?;
                at.protocol = h[0];
                at.offset += (h[1] as u32 + 2) * 4;
            }
            protocol::FRAGMENT => {
                let h = packet.read::<8>(at.offset).ok_or(Reason::Truncated)?;
                at.protocol = h[0];
                at.offset += 8;
                let field = u16::from_be_bytes([h[2], h[3]]);
                at.more_fragments = field & 1 != 0;
                at.fragment_offset = field >> 3;
                at.fragment_id = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
                if at.fragment_offset != 0 {
                    // What follows is payload, whatever the header calls it.
                    return Ok(at);
                }
            }
            _ => return Ok(at),
        }
    }
    match at.protocol {
        0 | 43 | 44 | 51 | 60 => Err(Reason::Extensions),
        _ => Ok(at),
    }
}

/// Whether an ICMP message quotes the packet that it is about.
#[inline(always)]
fn quotes(v6: bool, icmp_type: u8) -> bool {
    if v6 { matches!(icmp_type, 1..=4) } else { matches!(icmp_type, 3 | 4 | 5 | 11 | 12) }
}

/// Reads what follows the fixed header.
///
/// # Errors
/// The reason for which a packet to a VIP is dropped when its headers are cut off or contradict each other.
#[inline(always)]
pub fn transport<P: Packet>(
    packet: &P,
    network: &Network,
    quoted: &mut Network,
    t: &mut Transport,
) -> Result<(), Reason> {
    // Before anything can fail: what an earlier packet left must not be told about this one.
    t.kind = Kind::Other;
    t.protocol = network.protocol;
    t.sport = 0;
    t.dport = 0;
    t.first_fragment = false;
    t.quote = 0;
    t.quote_l4 = 0;
    if network.lying || network.end > packet.len() {
        return Err(Reason::Malformed);
    }
    let up = upper(packet, network)?;
    t.protocol = up.protocol;
    t.offset = up.offset;
    t.first_fragment = up.more_fragments && up.fragment_offset == 0;
    t.fragment_id = up.fragment_id;
    if up.offset > network.end {
        return Err(Reason::Truncated);
    }
    if up.fragment_offset != 0 {
        t.kind = Kind::LaterFragment;
        return Ok(());
    }
    let usual = network.usual();
    match up.protocol {
        protocol::TCP => {
            if up.offset + 20 > network.end {
                return Err(Reason::Truncated);
            }
            let [both, _, _, fourth] = packet.words::<4>(up.offset, usual).ok_or(Reason::Truncated)?;
            // The header of a first fragment may go on in the next one.
            let header = (u32::from_be(fourth) >> 28) * 4;
            if header < 20 || (!t.first_fragment && up.offset + header > network.end) {
                return Err(Reason::Malformed);
            }
            ports(t, parts(both));
        }
        protocol::UDP => {
            if up.offset + 8 > network.end {
                return Err(Reason::Truncated);
            }
            let [both, second] = packet.words::<2>(up.offset, usual).ok_or(Reason::Truncated)?;
            let length = parts(second).0 as u32;
            let beyond = !t.first_fragment && up.offset + length > network.end;
            // IPv6 knows a length of 0: it is in the jumbo option (RFC 2675, 4).
            let unsaid = length == 0 && network.v6;
            if !unsaid && (length < 8 || beyond) {
                return Err(Reason::Malformed);
            }
            ports(t, parts(both));
        }
        protocol::SCTP => {
            if up.offset + 12 > network.end {
                return Err(Reason::Truncated);
            }
            let h = packet.read::<4>(up.offset).ok_or(Reason::Truncated)?;
            ports(t, parts(u32::from_ne_bytes(h)));
        }
        protocol::ICMP if !network.v6 => icmp(packet, network, quoted, t)?,
        protocol::ICMPV6 if network.v6 => icmp(packet, network, quoted, t)?,
        _ => {}
    }
    Ok(())
}

#[inline(always)]
fn ports(t: &mut Transport, (source, destination): (u16, u16)) {
    t.kind = Kind::Ports;
    t.sport = source;
    t.dport = destination;
}

#[inline(always)]
fn icmp<P: Packet>(packet: &P, network: &Network, inner: &mut Network, t: &mut Transport) -> Result<(), Reason> {
    if t.offset + 8 > network.end {
        return Err(Reason::Truncated);
    }
    let h = packet.read::<6>(t.offset).ok_or(Reason::Truncated)?;
    let v6 = network.v6;
    let echo = if v6 { h[0] == 128 || h[0] == 129 } else { h[0] == 8 || h[0] == 0 };
    if echo {
        t.kind = Kind::Ping;
        t.sport = u16::from_be_bytes([h[4], h[5]]);
        return Ok(());
    }
    if v6 && h[0] >= 130 && h[0] <= 143 {
        t.kind = Kind::Local;
        return Ok(());
    }
    if !quotes(v6, h[0]) {
        return Ok(());
    }
    if t.first_fragment {
        // The rest of the quote could say anything.
        return Err(Reason::FragmentedError);
    }
    quoted(packet, network, inner, t)
}

/// Takes the key of the flow from the packet that an ICMP error quotes, turned round: the quoted packet was sent by a
/// target as the VIP.
#[inline(always)]
fn quoted<P: Packet>(packet: &P, outer: &Network, inner: &mut Network, t: &mut Transport) -> Result<(), Reason> {
    let at = t.offset + 8;
    let ethertype = if outer.v6 { ETH_IPV6 } else { ETH_IPV4 };
    if !network(packet, ethertype, at, inner) {
        return Err(Reason::Truncated);
    }
    if inner.lying {
        return Err(Reason::Malformed);
    }
    if inner.src != outer.dst {
        return Err(Reason::QuoteMismatch);
    }
    let up = upper(packet, inner)?;
    if up.fragment_offset != 0 {
        return Err(Reason::FragmentedError);
    }
    t.quote = at;
    t.quote_l4 = up.offset;
    t.protocol = up.protocol;
    t.kind = Kind::Other;
    match up.protocol {
        protocol::TCP | protocol::UDP | protocol::SCTP => {
            if up.offset + 4 > outer.end {
                return Err(Reason::Truncated);
            }
            let h = packet.read::<4>(up.offset).ok_or(Reason::Truncated)?;
            let (source, destination) = parts(u32::from_ne_bytes(h));
            ports(t, (destination, source));
        }
        protocol::ICMP | protocol::ICMPV6 => {
            if up.offset + 6 > outer.end {
                return Err(Reason::Truncated);
            }
            let h = packet.read::<6>(up.offset).ok_or(Reason::Truncated)?;
            let echo = if outer.v6 { h[0] == 128 || h[0] == 129 } else { h[0] == 8 || h[0] == 0 };
            if echo {
                t.kind = Kind::Ping;
                t.sport = u16::from_be_bytes([h[4], h[5]]);
            }
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::AGED;

    fn sum(words: &[[u8; 2]]) -> u32 {
        let mut sum: u32 = words.iter().map(|word| u16::from_ne_bytes(*word) as u32).sum();
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum
    }

    #[test]
    fn a_sum_over_the_packet_follows_its_hop_limit() {
        for hop_limit in 1..=u8::MAX {
            for next_header in [0, 6, 17, 58, 132, 255] {
                let packet = |hop_limit| [[0x60, 0x01], [0, 0], [0, 20], [next_header, hop_limit], [0xfd, 0x3f]];
                let (before, after) = (sum(&packet(hop_limit)), sum(&packet(hop_limit - 1)));
                let followed = before + AGED;
                let followed = (followed & 0xffff) + (followed >> 16);
                // 0 and 0xffff are the same sum.
                assert_eq!(followed % 0xffff, after % 0xffff, "{next_header} {hop_limit}");
            }
        }
    }
}
