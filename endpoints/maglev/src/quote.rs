//! ICMP errors that this machine makes about replies of a VIP whose port is to be translated. They are made before the reply gets
//! the port that its client knows, so they quote the target's; flows know the client's. Here the quote gets that one, and the
//! program gives it the target's again on the way there, as it does with errors that come from outside.

use std::io;
use std::sync::Arc;

use meridio_decision::Scratch;
use meridio_decision::layout::{IPV4_SPACE, NOT_A_VIP, NatKey, PREFIX_KEY_BITS, PrefixKey};
use meridio_decision::packet::{Kind, protocol};

use crate::config_entry::ConfigEntry;
use crate::sys::RawMap;

/// Direction of [`NatKey`] from targets to clients.
const TO_CLIENTS: u16 = 1;

/// Which port clients know.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) vips: RawMap,
    pub(crate) nats: RawMap,
    pub(crate) config: Arc<ConfigEntry>,
}

impl Known {
    /// Gives an ICMP error, from its network header on and read into `s`, the port that the client of the quoted packet knows.
    ///
    /// # Errors
    /// A map cannot be read.
    pub(crate) fn put(&self, packet: &mut [u8], s: &Scratch) -> io::Result<()> {
        if s.transport.quote == 0 || !matches!(s.transport.kind, Kind::Ports) {
            return Ok(());
        }
        let generation = self.config.get().generation();
        let space = if s.network.v6 { generation } else { generation + IPV4_SPACE };
        let vip = PrefixKey { bits: PREFIX_KEY_BITS + 128, space, address: s.network.dst };
        let class = match self.vips.get(&vip, 0u32)? {
            None | Some(NOT_A_VIP) => return Ok(()),
            Some(class) => class,
        };
        let (protocol, port) = (s.transport.protocol as u16, s.transport.dport as u32);
        let key = NatKey { generation, class, protocol, direction: TO_CLIENTS, port };
        if let Some(known) = self.nats.get(&key, 0u32)? {
            set_port(packet, s, known as u16);
        }
        Ok(())
    }
}

/// Sets the source port of the quoted packet, and the sums over it.
fn set_port(packet: &mut [u8], s: &Scratch, port: u16) {
    let (icmp, l4) = (s.transport.offset as usize, s.transport.quote_l4 as usize);
    let sum = match s.transport.protocol {
        protocol::TCP => Some(l4 + 16),
        protocol::UDP => Some(l4 + 6),
        _ => None,
    };
    let old = s.transport.dport;
    // Of a quote that ends before it, or of a datagram without one, there is no sum to change.
    let quoted = sum.filter(|at| at + 2 <= s.network.end as usize).and_then(|at| Some((at, word(packet, at)?)));
    if let Some((at, before)) = quoted.filter(|(_, sum)| s.transport.protocol == protocol::TCP || *sum != 0) {
        let after = follow(before, old, port);
        // Zero would say that there is none.
        let after = if after == 0 && s.transport.protocol == protocol::UDP { 0xffff } else { after };
        set(packet, at, after);
        change(packet, icmp + 2, before, after);
    }
    set(packet, l4, port);
    change(packet, icmp + 2, old, port);
}

fn word(packet: &[u8], at: usize) -> Option<u16> {
    packet.get(at..)?.first_chunk().map(|word| u16::from_be_bytes(*word))
}

fn set(packet: &mut [u8], at: usize, value: u16) {
    if let Some(word) = packet.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<2>()) {
        *word = value.to_be_bytes();
    }
}

/// Lets the sum at `at` follow a change of a word (RFC 1624).
fn change(packet: &mut [u8], at: usize, from: u16, to: u16) {
    if let Some(sum) = word(packet, at) {
        set(packet, at, follow(sum, from, to));
    }
}

/// An Internet checksum after one of its words has changed (RFC 1624, equation 3).
fn follow(sum: u16, from: u16, to: u16) -> u16 {
    let mut sum = !sum as u32 + !from as u32 + to as u32;
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it
mod tests {
    use meridio_decision::packet::{ETH_IPV4, network, transport};

    use super::*;
    use crate::image::Bytes;

    fn sum(bytes: &[u8]) -> u16 {
        let words = bytes.chunks(2).map(|w| u16::from_be_bytes([w[0], *w.get(1).unwrap_or(&0)]) as u32);
        let sum = words.sum::<u32>();
        let sum = (sum & 0xffff) + (sum >> 16);
        !((sum & 0xffff) + (sum >> 16)) as u16
    }

    fn ipv4(protocol: u8, payload: &[u8], (from, to): ([u8; 4], [u8; 4])) -> Vec<u8> {
        let length = (20 + payload.len() as u16).to_be_bytes();
        let header = [0x45, 0, length[0], length[1], 0, 1, 0x40, 0, 64, protocol, 0, 0];
        [&header[..], &from, &to, payload].concat()
    }

    /// The sum over a quoted datagram and its pseudo header.
    fn inner(l4: &[u8], protocol: u8) -> u16 {
        let length = (l4.len() as u16).to_be_bytes();
        sum(&[&[20, 0, 0, 1, 10, 0, 0, 1, 0, protocol, length[0], length[1]], l4].concat())
    }

    #[test]
    fn all_sums_follow_the_port() {
        // Of each protocol the place of its sum within the header, and how much of it is quoted.
        let cases = [(6, Some(16), 40), (6, Some(16), 8), (17, Some(6), 40), (17, None, 40), (132, None, 40)];
        for (protocol, sum_at, quoted) in cases {
            for port in [0u16, 1, 80, 443, 8080, 65_535] {
                let mut l4 = vec![7u8; 40];
                l4[..4].copy_from_slice(&[0x13, 0x88, 0x90, 0x01]);
                if protocol == 17 {
                    l4[4..8].copy_from_slice(&[0, 40, 0, 0]);
                }
                if let Some(at) = sum_at {
                    l4[at..at + 2].fill(0);
                    let right = inner(&l4, protocol);
                    l4[at..at + 2].copy_from_slice(&right.to_be_bytes());
                }
                let reply = ipv4(protocol, &l4, ([20, 0, 0, 1], [10, 0, 0, 1]));
                let mut icmp = [&[3, 4, 0, 0, 0, 0, 5, 120], &reply[..20 + quoted]].concat();
                let right = sum(&icmp);
                icmp[2..4].copy_from_slice(&right.to_be_bytes());
                let mut error = ipv4(1, &icmp, ([10, 0, 0, 2], [20, 0, 0, 1]));
                let mut s = Scratch::default();
                assert!(network(&Bytes(&error), ETH_IPV4, 0, &mut s.network));
                transport(&Bytes(&error), &s.network, &mut s.quoted, &mut s.transport).unwrap();
                assert_eq!(s.transport.dport, 5000);
                set_port(&mut error, &s, port);
                assert_eq!(sum(&error[20..]), 0, "protocol {protocol}, port {port}: the error's own sum");
                assert_eq!(error[48..50], port.to_be_bytes());
                if quoted == 40 && sum_at.is_some() {
                    assert_eq!(inner(&error[48..], protocol), 0, "protocol {protocol}, port {port}: the quoted sum");
                }
            }
        }
    }
}
