use super::super::question::Question;
use super::*;

/// What the bytes of a file are written as.
#[derive(Clone, Copy, Debug)]
struct Form {
    pcapng: bool,
    /// Big-endian, as the machine that wrote it.
    big: bool,
}

const PCAP: Form = Form { pcapng: false, big: false };
const PCAPNG: Form = Form { pcapng: true, big: false };
const FORMS: [Form; 4] = [PCAP, PCAPNG, Form { big: true, ..PCAP }, Form { big: true, ..PCAPNG }];

impl Form {
    fn u16(self, value: u16) -> [u8; 2] {
        if self.big { value.to_be_bytes() } else { value.to_le_bytes() }
    }

    fn u32(self, value: u32) -> [u8; 4] {
        if self.big { value.to_be_bytes() } else { value.to_le_bytes() }
    }

    /// A pcapng block: type, total length, body in whole words, total length again.
    fn block(self, kind: u32, body: &[u8]) -> Vec<u8> {
        let padded = body.len().next_multiple_of(4);
        let length = self.u32(padded as u32 + 12);
        let mut bytes = [self.u32(kind), length].concat();
        bytes.extend(body);
        bytes.resize(8 + padded, 0xee);
        bytes.extend(length);
        bytes
    }

    /// Section header block: byte-order magic, version 1.0, and a length that is not said.
    fn section(self) -> Vec<u8> {
        let version = [self.u16(1), self.u16(0)].concat();
        self.block(0x0a0d_0d0a, &[&self.u32(0x1a2b_3c4d)[..], &version, &[0xff; 8]].concat())
    }

    /// Interface description block: link type, reserved, snapshot length.
    fn interface(self, link: u32, most: u32) -> Vec<u8> {
        self.block(1, &[&self.u16(link as u16)[..], &[0; 2], &self.u32(most)].concat())
    }

    /// Enhanced packet block: interface, time in two halves, captured and original length, the packet.
    fn enhanced(self, interface: u32, frame: &[u8], most: usize) -> Vec<u8> {
        let captured = &frame[..frame.len().min(most)];
        let numbers = [interface, 1, 2, captured.len() as u32, frame.len() as u32].map(|n| self.u32(n)).concat();
        self.block(6, &[&numbers, captured].concat())
    }

    /// Simple packet block: original length, the packet as far as the snapshot length of the first interface lets it.
    fn simple(self, frame: &[u8], most: usize) -> Vec<u8> {
        self.block(3, &[&self.u32(frame.len() as u32)[..], &frame[..frame.len().min(most)]].concat())
    }

    /// Of the older format: magic, version 2.4, zone and accuracy of the time, snapshot length, link type.
    fn file_header(self, link: u32) -> Vec<u8> {
        let version = [self.u16(2), self.u16(4)].concat();
        [&self.u32(0xa1b2_c3d4)[..], &version, &[0; 8], &self.u32(65_535), &self.u32(link)].concat()
    }

    /// Of the older format: time in seconds and microseconds, captured and original length, the packet.
    fn record(self, frame: &[u8], most: usize) -> Vec<u8> {
        let captured = &frame[..frame.len().min(most)];
        let numbers = [1, 2, captured.len() as u32, frame.len() as u32].map(|n| self.u32(n)).concat();
        [&numbers, captured].concat()
    }

    fn file(self, link: u32, frames: &[Vec<u8>], most: usize) -> tempfile::NamedTempFile {
        let mut bytes =
            if self.pcapng { [self.section(), self.interface(link, 65_535)].concat() } else { self.file_header(link) };
        for frame in frames {
            bytes.extend(if self.pcapng { self.enhanced(0, frame, most) } else { self.record(frame, most) });
        }
        written(&bytes)
    }
}

fn written(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

fn capture(link: u32, frames: &[Vec<u8>]) -> tempfile::NamedTempFile {
    cut(link, frames, usize::MAX)
}

/// As with a snapshot length.
fn cut(link: u32, frames: &[Vec<u8>], most: usize) -> tempfile::NamedTempFile {
    PCAP.file(link, frames, most)
}

/// A packet of each IP version, of an odd length.
fn both() -> [Packet; 2] {
    ["udp 10.0.0.1:1234 -> 20.0.0.1:4000 size 1399", "tcp [2001::1]:1234 -> [2000::1]:4000 size 1401"]
        .map(|question| Question::parse(question).unwrap().packet().unwrap())
}

/// The link-layer header of a packet in a file of this form.
fn link_header(form: Form, link: u32, packet: &Packet) -> Vec<u8> {
    let kind = packet.ethertype.to_be_bytes();
    let v6 = packet.ethertype == 0x86dd;
    match link {
        // Ethernet: destination, source, type.
        1 => [&[0x66; 6][..], &[0x68; 6], &kind].concat(),
        // Linux cooked: packet type, device type, length of the address, address in 8 bytes, protocol.
        113 => [&[0, 4, 0, 1, 0, 6][..], &[0x68; 6], &[8, 6], &kind].concat(),
        // Linux cooked, version 2: protocol, reserved, interface, device type, packet type, length of the address, address in 8 bytes.
        276 => [&kind[..], &[0, 0, 0, 0, 0, 7, 0, 1, 4, 6], &[0x68; 6], &[8, 6]].concat(),
        // BSD loopback: the address family, in the order of the machine that wrote it. IPv6 has a different one on each system.
        0 => form.u32(if v6 { 30 } else { 2 }).to_vec(),
        // OpenBSD's: the same in network byte order.
        108 => u32::to_be_bytes(if v6 { 24 } else { 2 }).to_vec(),
        // Raw, also under the number of some systems and those of one IP version each.
        _ => vec![],
    }
}

fn frames(form: Form, link: u32) -> [Vec<u8>; 2] {
    both().map(|packet| [link_header(form, link, &packet), packet.bytes].concat())
}

#[test]
fn every_link_type_and_form_of_file_is_read_whole_and_cut() {
    for (link, header) in [(1, 14), (113, 16), (276, 20), (0, 4), (108, 4), (101, 0), (12, 0), (228, 0), (229, 0)] {
        for form in FORMS {
            let context = format!("link type {link}, {form:?}");
            let frames = frames(form, link);
            let read = |most| {
                let (found, _) = packets(form.file(link, &frames, most).path(), 9).unwrap();
                <[_; 2]>::try_from(found).unwrap()
            };
            let whole = both().map(Ok);
            // Not shown: they are long.
            assert!(read(usize::MAX).into_iter().map(|(_, packet)| packet).eq(whole), "{context}");
            // As little as may be left, an odd number, and all but the last byte of the shorter one.
            for most in [header + HEADERS, header + HEADERS + 1, header + 1_398] {
                for ((number, got), (n, packet)) in read(most).into_iter().zip(both().into_iter().enumerate()) {
                    let got = got.unwrap();
                    assert_eq!((number, got.ethertype), (n + 1, packet.ethertype), "{context}, {most}");
                    assert_eq!(got.bytes.len(), packet.bytes.len(), "{context}, {most}");
                    // The payload was zero, and is made up as zero.
                    assert!(got == packet, "{context}, {most}");
                }
            }
            let few = header + HEADERS - 1;
            for ((_, got), frame) in read(few).into_iter().zip(&frames) {
                let said = format!("is cut off after {few} of {} bytes", frame.len());
                assert!(got.as_ref().is_err_and(|fault| fault.starts_with(&said)), "{context}: {got:?}");
            }
            if header > 0 {
                let faults: Vec<_> = read(header - 1).into_iter().map(|(_, packet)| packet.unwrap_err()).collect();
                assert_eq!(faults, ["is shorter than its link-layer header"; 2], "{context}");
            }
        }
    }
}

#[test]
fn packets_of_several_interfaces_and_sections_are_told_apart() {
    for form in [PCAPNG, Form { big: true, ..PCAPNG }] {
        let [ethernet, cooked] = [1, 276].map(|link| frames(form, link));
        let bytes = [
            form.section(),
            form.interface(1, 65_535),
            form.interface(276, 65_535),
            // Name resolution, which is none of our business.
            form.block(4, &[0; 4]),
            form.enhanced(1, &cooked[0], usize::MAX),
            form.enhanced(0, &ethernet[1], usize::MAX),
            form.enhanced(2, &ethernet[1], usize::MAX),
            // Another section begins anew.
            form.section(),
            form.interface(276, 201),
            form.simple(&cooked[1], 201),
            form.simple(&cooked[0], 201),
            form.enhanced(1, &cooked[0], usize::MAX),
        ];
        let [v4, v6] = both();
        let unknown = || Err("its interface is not described".to_owned());
        let expected = [Ok(v4.clone()), Ok(v6.clone()), unknown(), Ok(v6), Ok(v4), unknown()];
        let (found, more) = packets(written(&bytes.concat()).path(), 9).unwrap();
        assert!(!more && found.len() == expected.len(), "{form:?}");
        for ((number, got), (n, packet)) in found.into_iter().zip(expected.into_iter().enumerate()) {
            assert!(number == n + 1 && got == packet, "packet {number}, {form:?}");
        }
    }
}

#[test]
fn a_pcapng_file_that_ends_too_soon_is_told() {
    let bytes = std::fs::read(PCAPNG.file(1, &frames(PCAPNG, 1), usize::MAX).path()).unwrap();
    let ends = packets(written(&bytes[..bytes.len() - 3]).path(), 9).unwrap_err().to_string();
    assert!(ends.ends_with("ends within packet 2"), "{ends}");
}

#[test]
fn frames_with_and_without_tags_and_raw_packets() {
    let packet = Question::parse("udp 10.0.0.1:1 -> 20.0.0.1:2").unwrap().packet().unwrap();
    let plain = [vec![0; 12], vec![0x08, 0], packet.bytes.clone()].concat();
    let tagged = [vec![0; 12], vec![0x81, 0, 0, 100, 0x08, 0], packet.bytes.clone()].concat();
    let arp = [vec![0; 12], vec![0x08, 6, 0, 1]].concat();
    let file = capture(1, &[plain, tagged, arp, vec![0; 5]]);
    let (found, more) = packets(file.path(), 10).unwrap();
    assert!(!more);
    assert_eq!(found[0], (1, Ok(packet.clone())));
    assert_eq!(found[1], (2, Ok(packet.clone())));
    assert!(found[2].1.as_ref().unwrap_err().contains("0x0806"));
    assert!(found[3].1.is_err());
    let (first, more) = packets(file.path(), 1).unwrap();
    assert!(first.len() == 1 && more);
    let raw = capture(101, std::slice::from_ref(&packet.bytes));
    assert_eq!(packets(raw.path(), 10).unwrap(), (vec![(1, Ok(packet))], false));
}

#[test]
fn a_cut_packet_is_as_long_as_it_was() {
    let packet = Question::parse("udp 10.0.0.1:1234 -> 20.0.0.1:4000 size 1400").unwrap().packet().unwrap();
    let read = |most| packets(cut(101, std::slice::from_ref(&packet.bytes), most).path(), 9).unwrap().0.remove(0).1;
    for most in [128, 262, 1_399, 1_400] {
        let got = read(most).unwrap();
        assert_eq!(got.bytes.len(), 1_400, "{most}");
        assert_eq!(got.bytes[..128], packet.bytes[..128]);
    }
    assert_eq!(read(64).unwrap_err(), "is cut off after 64 of 1400 bytes: capture more of each (tcpdump -s 0)");
}

#[test]
fn what_is_no_capture_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(packets(file.path(), 1).unwrap_err().to_string().ends_with("is empty"));
    std::fs::write(file.path(), "this is no capture at all, whatever its name may say").unwrap();
    assert!(packets(file.path(), 1).unwrap_err().to_string().contains("neither pcap nor pcapng"));
    assert!(packets(Path::new("/nonexistent.pcap"), 1).is_err());
    let packet = Question::parse("udp 10.0.0.1:1 -> 20.0.0.1:2").unwrap().packet().unwrap();
    let whole = capture(101, &[packet.bytes]);
    let bytes = std::fs::read(whole.path()).unwrap();
    std::fs::write(file.path(), &bytes[..bytes.len() - 3]).unwrap();
    assert!(packets(file.path(), 9).unwrap_err().to_string().contains("ends within packet 1"));
}
