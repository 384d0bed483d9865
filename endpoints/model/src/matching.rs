//! What a flow matches: protocols, port ranges, bytes, subnets; as text and as values.

use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;

/// A transport protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// Lower-case name, as written in resources.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }

    /// Bytes of the fixed header.
    pub fn header(self) -> u64 {
        match self {
            Self::Tcp => 20,
            Self::Udp => 8,
            Self::Sctp => 12,
        }
    }

    /// IANA protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Protocol {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The data plane of the original also takes upper case.
        let lower = text.to_ascii_lowercase();
        Self::ALL
            .into_iter()
            .find(|p| p.as_str() == lower)
            .ok_or_else(|| format!("protocol {text:?} is not one of tcp, udp, sctp"))
    }
}

/// Ports `first..=last`; `0-65535` means any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// Every port.
    pub const ANY: Self = Self { first: 0, last: u16::MAX };

    /// `first..=last`. Port 0 is only part of [`PortRange::ANY`]: no packet carries it, and the original's data plane refuses such a
    /// range after its webhook has let it pass.
    ///
    /// # Errors
    /// Names the range and the reason.
    pub fn new(first: u16, last: u16) -> Result<Self, String> {
        if first > last {
            return Err(format!("port range {first}-{last}: the first port is larger than the last"));
        }
        if first == 0 && last != u16::MAX {
            return Err(format!("port range {first}-{last}: port 0 is only allowed in 0-65535 (any)"));
        }
        Ok(Self { first, last })
    }

    /// Lowest port.
    pub fn first(self) -> u16 {
        self.first
    }

    /// Highest port.
    pub fn last(self) -> u16 {
        self.last
    }

    /// Whether any port is in both.
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// Whether all of `other` is in this range.
    pub fn contains(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "any" {
            return Ok(Self::ANY);
        }
        let port = |part: &str| {
            let digits = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
            part.parse::<u16>()
                .ok()
                .filter(|_| digits)
                .ok_or_else(|| format!("port range {text:?} is not <port>, <port>-<port> or any (0 to 65535)"))
        };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Self::new(port(first)?, port(last)?)
    }
}

/// `tcp[offset:size] & mask = value`: bytes of the transport header, network byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteMatch {
    /// Protocol that the packet must have.
    pub protocol: Protocol,
    /// Bytes after the start of the transport header.
    pub offset: u16,
    /// 1, 2 or 4 bytes.
    pub size: u8,
    /// Bits that count; all bits of `size` unless given.
    pub mask: u32,
    /// What the masked bytes must equal.
    pub value: u32,
}

impl fmt::Display for ByteMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}:{}]", self.protocol, self.offset, self.size)?;
        if self.mask != all_bits(self.size) {
            write!(f, " & {:#x}", self.mask)?;
        }
        write!(f, " = {}", self.value)
    }
}

fn all_bits(size: u8) -> u32 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        _ => u32::MAX,
    }
}

/// Decimal or lower-case hexadecimal with `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) if hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) => {
            u64::from_str_radix(hex, 16).ok()
        }
        None if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    }
}

impl FromStr for ByteMatch {
    type Err = String;

    /// The grammar of the original: `^(sctp|tcp|udp)\[[0-9]+ *: *[124]\]( *& *0x[0-9a-f]+)? *= *([0-9]+|0x[0-9a-f]+)$`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("byte match {text:?} {why}");
        let shape = || wrong("is not <tcp|udp|sctp>[<offset>:<1|2|4>] [& 0x<mask>] = <value>");
        let (name, rest) = text.split_once('[').ok_or_else(shape)?;
        let protocol = Protocol::ALL.into_iter().find(|p| p.as_str() == name).ok_or_else(shape)?;
        let (position, rest) = rest.split_once(']').ok_or_else(shape)?;
        let (offset, size) = position.split_once(':').ok_or_else(shape)?;
        let offset = offset.trim_end_matches(' ');
        let offset = number(offset).filter(|_| !offset.is_empty() && !offset.starts_with("0x")).ok_or_else(shape)?;
        let size = match size.trim_start_matches(' ') {
            "1" => 1,
            "2" => 2,
            "4" => 4,
            _ => return Err(shape()),
        };
        // Behind the fixed header there may be options or data, and they mean something else in each packet. The data plane of
        // the original refuses this too.
        let header = protocol.header();
        let offset = offset.checked_add(u64::from(size)).filter(|end| *end <= header).and(u16::try_from(offset).ok());
        let offset = offset.ok_or_else(|| wrong(&format!("reaches beyond the {header}-byte header of {protocol}")))?;
        let (mask, value) = rest.split_once('=').ok_or_else(shape)?;
        let mask = match mask.trim_matches(' ') {
            "" => u64::from(all_bits(size)),
            masked => {
                let hex = masked.strip_prefix('&').ok_or_else(shape)?.trim_start_matches(' ');
                number(hex).filter(|_| hex.starts_with("0x")).ok_or_else(shape)?
            }
        };
        let value = value.trim_start_matches(' ');
        let value = number(value).filter(|_| !value.is_empty()).ok_or_else(shape)?;
        let fits = |n: u64| u32::try_from(n).ok().filter(|n| *n <= all_bits(size));
        Ok(Self {
            protocol,
            offset,
            size,
            mask: fits(mask).ok_or_else(|| wrong("has a mask larger than its size"))?,
            value: fits(value).ok_or_else(|| wrong("has a value larger than its size"))?,
        })
    }
}

/// A CIDR without host bits.
///
/// # Errors
/// Quotes the text and says what is wrong, with the canonical form where there is one.
pub fn canonical_subnet(text: &str) -> Result<IpNet, String> {
    let net: IpNet =
        text.parse().map_err(|_| format!("{text:?} is not a CIDR (address/prefix length, e.g. 20.0.0.1/32)"))?;
    if net.addr() != net.network() {
        return Err(format!("{text:?} has host bits set, did you mean {}?", net.trunc()));
    }
    Ok(net)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges() {
        assert_eq!("any".parse(), Ok(PortRange::ANY));
        assert_eq!("0-65535".parse(), Ok(PortRange::ANY));
        assert_eq!("80".parse::<PortRange>().unwrap().to_string(), "80");
        assert_eq!("4000-4002".parse::<PortRange>().unwrap().to_string(), "4000-4002");
        for bad in ["", "-", "1-", "-1", "70000", "5-4", "0", "0-100", "+5", "1-2-3", "a"] {
            assert!(bad.parse::<PortRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn byte_matches() {
        let plain: ByteMatch = "tcp[2:2] = 4002".parse().unwrap();
        assert_eq!(
            (plain.protocol, plain.offset, plain.size, plain.mask, plain.value),
            (Protocol::Tcp, 2, 2, 0xffff, 4002)
        );
        let masked: ByteMatch = "sctp[0 : 4]&0xff00 =0x1200".parse().unwrap();
        assert_eq!((masked.mask, masked.value), (0xff00, 0x1200));
        assert_eq!(masked.to_string().parse(), Ok(masked));
        for bad in [
            "tcp[2:3]=1",
            "icmp[0:1]=1",
            "tcp[2:2]",
            "tcp[2:2]=",
            "tcp[:2]=1",
            "tcp[0x1:2]=1",
            "tcp[0:1] & 5 = 5",
            "tcp[0:1]=256",
            "tcp[0:1]&0x1ff=1",
            " tcp[0:1]=1",
            "tcp[0:1]=1 ",
            "tcp[0:1]=0x",
            "tcp[0:1]=-1",
        ] {
            assert!(bad.parse::<ByteMatch>().is_err(), "{bad}");
        }
    }

    #[test]
    fn byte_matches_stay_within_the_fixed_header() {
        for (last, beyond, header) in [
            ("tcp[19:1] = 1", "tcp[20:4] = 0x47455420", "20-byte header of tcp"),
            ("tcp[16:4] = 1", "tcp[17:4] = 1", "20-byte header of tcp"),
            ("udp[4:4] = 1", "udp[7:2] = 1", "8-byte header of udp"),
            ("sctp[11:1] = 1", "sctp[12:1] = 1", "12-byte header of sctp"),
            ("sctp[10:2] = 1", "sctp[65535:4] = 1", "12-byte header of sctp"),
            ("tcp[0:1] = 1", "tcp[18446744073709551615:4] = 1", "20-byte header of tcp"),
        ] {
            assert!(last.parse::<ByteMatch>().is_ok(), "{last}");
            let error = beyond.parse::<ByteMatch>().unwrap_err();
            assert_eq!(error, format!("byte match {beyond:?} reaches beyond the {header}"));
        }
    }

    #[test]
    fn subnets() {
        assert!(canonical_subnet("20.0.0.0/8").is_ok());
        assert_eq!(
            canonical_subnet("20.0.0.1").unwrap_err(),
            "\"20.0.0.1\" is not a CIDR (address/prefix length, e.g. 20.0.0.1/32)"
        );
        assert_eq!(
            canonical_subnet("2000::1/64").unwrap_err(),
            "\"2000::1/64\" has host bits set, did you mean 2000::/64?"
        );
    }
}
