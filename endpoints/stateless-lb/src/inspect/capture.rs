//! Packets of a capture file (pcap or pcapng).

use std::path::Path;

use anyhow::{Context as _, bail};
use pcap_parser::{Block, Linktype, PcapBlockOwned, PcapError, create_reader};

use super::question::Packet;

/// Read at a time; no packet of a capture is longer.
const BUFFER: usize = 1 << 20;

/// Packets of a capture, each with its number, or why it is none for a load balancer.
pub(crate) type Packets = Vec<(usize, Result<Packet, String>)>;

/// The first `most` packets, and whether more of the file is left, whole or not.
///
/// # Errors
/// The file cannot be read, or is no capture.
pub(crate) fn packets(path: &Path, most: usize) -> anyhow::Result<(Packets, bool)> {
    let name = path.display();
    let file = std::fs::File::open(path).with_context(|| name.to_string())?;
    let mut reader = match create_reader(BUFFER, file) {
        Ok(reader) => reader,
        Err(PcapError::Eof) => bail!("{name}: is empty"),
        Err(_) => bail!("{name}: is neither pcap nor pcapng"),
    };
    // Link type and snapshot length of each interface.
    let mut links: Vec<(Linktype, u32)> = Vec::new();
    let mut packets = Vec::new();
    let mut starved = false;
    loop {
        let enough = packets.len() >= most;
        match reader.next() {
            Ok(_) if enough => return Ok((packets, true)),
            Ok((length, block)) => {
                starved = false;
                let found = match &block {
                    PcapBlockOwned::LegacyHeader(header) => {
                        links = vec![(header.network, header.snaplen)];
                        None
                    }
                    PcapBlockOwned::Legacy(block) => Some((0, block.data, block.caplen, block.origlen)),
                    PcapBlockOwned::NG(Block::SectionHeader(_)) => {
                        links.clear();
                        None
                    }
                    PcapBlockOwned::NG(Block::InterfaceDescription(description)) => {
                        links.push((description.linktype, description.snaplen));
                        None
                    }
                    PcapBlockOwned::NG(Block::EnhancedPacket(block)) => {
                        Some((block.if_id as usize, block.data, block.caplen, block.origlen))
                    }
                    PcapBlockOwned::NG(Block::SimplePacket(block)) => {
                        // As much of it as the interface's snapshot length let through (0: all), and padding.
                        let most = links.first().map(|(_, most)| *most).filter(|most| *most > 0).unwrap_or(u32::MAX);
                        let captured = block.origlen.min(most).min(block.data.len() as u32);
                        Some((0, block.data, captured, block.origlen))
                    }
                    PcapBlockOwned::NG(_) => None,
                };
                if let Some((interface, data, captured, sent)) = found {
                    let data = data.get(..captured as usize).unwrap_or(data);
                    let packet = match links.get(interface) {
                        Some((link, _)) => network(data, *link).and_then(|packet| whole(packet, captured, sent)),
                        None => Err("its interface is not described".to_owned()),
                    };
                    packets.push((packets.len() + 1, packet));
                }
                reader.consume(length);
            }
            Err(PcapError::Eof) => return Ok((packets, false)),
            Err(PcapError::Incomplete(_)) if !starved => {
                starved = true;
                reader.refill().map_err(|_| anyhow::anyhow!("{name}: cannot be read on"))?;
            }
            Err(_) if enough => return Ok((packets, true)),
            Err(PcapError::Incomplete(_) | PcapError::UnexpectedEof) => {
                bail!("{name}: ends within packet {}", packets.len() + 1)
            }
            Err(_) => bail!("{name}: is damaged behind packet {}", packets.len()),
        }
    }
}

/// What lies behind the link-layer header, VLAN tags included.
fn network(data: &[u8], link: Linktype) -> Result<Packet, String> {
    let field = |at: usize| data.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    let short = || "is shorter than its link-layer header".to_owned();
    // Where the Ethernet type stands, and where the packet begins.
    let (mut kind, mut at) = match link {
        Linktype::ETHERNET => (field(12).ok_or_else(short)?, 14),
        Linktype::LINUX_SLL => (field(14).ok_or_else(short)?, 16),
        Linktype::LINUX_SLL2 => (field(0).ok_or_else(short)?, 20),
        Linktype::NULL | Linktype::LOOP => (by_version(data.get(4)).ok_or_else(short)?, 4),
        Linktype::RAW | Linktype::IPV4 | Linktype::IPV6 | DLT_RAW => (by_version(data.first()).ok_or_else(short)?, 0),
        other => return Err(format!("has link type {}, which is not known here", other.0)),
    };
    while matches!(kind, 0x8100 | 0x88a8 | 0x9100) {
        kind = field(at + 2).ok_or_else(short)?;
        at += 4;
    }
    match kind {
        0x0800 | 0x86dd => Ok(Packet { ethertype: kind, bytes: data.get(at..).ok_or_else(short)?.to_vec() }),
        other => Err(format!("is not IP but of Ethernet type {other:#06x}")),
    }
}

/// A packet as long as it was: of one that the capture has cut, the payload is made up, which nobody asks for anything.
fn whole(mut packet: Packet, captured: u32, sent: u32) -> Result<Packet, String> {
    let cut = sent.saturating_sub(captured) as usize;
    if cut > 0 && packet.bytes.len() < HEADERS {
        return Err(format!("is cut off after {captured} of {sent} bytes: capture more of each (tcpdump -s 0)"));
    }
    if packet.bytes.len() + cut > LONGEST {
        return Err(format!("is said to be {sent} bytes long, which no packet is"));
    }
    packet.bytes.resize(packet.bytes.len() + cut, 0);
    Ok(packet)
}

/// What headers may take, those of a quoted packet included.
const HEADERS: usize = 128;
/// More than a super-packet has.
const LONGEST: usize = 1 << 20;

/// What some systems write for [`Linktype::RAW`].
const DLT_RAW: Linktype = Linktype(12);

fn by_version(first: Option<&u8>) -> Option<u16> {
    first.map(|byte| if byte >> 4 == 6 { 0x86dd } else { 0x0800 })
}

#[cfg(test)]
#[path = "capture_tests.rs"]
mod tests;
