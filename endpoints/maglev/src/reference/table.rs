//! Hash and table by their definitions: no step of the way there is shared with what they are compared with.

use std::net::IpAddr;

/// `(hash xor word) * constant`, folded: see `meridio_decision::hash`.
fn mix(hash: u64, word: u64) -> u64 {
    let product = u128::from(hash ^ word) * 0x9e37_79b9_7f4a_7c15;
    let low = (product % (1 << 64)) as u64;
    low ^ (low / (1 << 29))
}

fn pair(a: u64, b: u64) -> u64 {
    let mixed = mix(mix(u64::from_be_bytes(*b"tables 1"), a), b);
    let folded = u128::from(mixed ^ (mixed / (1 << 32))) * 0xd6e8_feb8_6659_fd93;
    let low = (folded % (1 << 64)) as u64;
    low ^ (low / (1 << 32))
}

/// The 16 bytes of an address, an IPv4 one as `::ffff:a.b.c.d`.
fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => [&[0; 10][..], &[0xff, 0xff], &a.octets()].concat(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// Hash of addresses (source, destination), protocol and ports (source, destination). Without addresses: of SCTP by ports alone.
pub(super) fn hash(addresses: Option<(IpAddr, IpAddr)>, protocol: u8, ports: (u16, u16)) -> u32 {
    let words = [0, 0, 0, protocol].into_iter().chain(ports.0.to_be_bytes()).chain(ports.1.to_be_bytes());
    let mut all: Vec<u8> = words.collect();
    if let Some((src, dst)) = addresses {
        all.extend(bytes(src));
        all.extend(bytes(dst));
    }
    let mut hash = u64::from_be_bytes(*b"meridio1");
    for word in all.chunks(8) {
        hash = mix(hash, word.iter().fold(0, |n, byte| n * 256 + u64::from(*byte)));
    }
    (mix(hash, hash / (1 << 32)) / (1 << 32)) as u32
}

/// The share of all hashes that a row has is the same for each.
pub(super) fn row(hash: u32, rows: u32) -> u32 {
    (u128::from(hash) * u128::from(rows) / (1 << 32)) as u32
}

/// Rows of a table: see [`crate::table`].
pub(super) fn rows(max_targets: u32) -> Option<u32> {
    let sizes = [(600, 65_537), (1_300, 131_071), (10_000, 1_048_573)];
    sizes.into_iter().find(|(most, _)| (1..=*most).contains(&max_targets)).map(|(_, rows)| rows)
}

/// The identifier in a row, straight from the definition in [`crate::table`].
pub fn row_owner(base: &[u16], max_targets: u32, ready: &[u32], row: u32) -> Option<u32> {
    let m = rows(max_targets)? as u64;
    for k in 0..16 {
        let offset = if k == 0 { 0 } else { pair(0x0070_726f_6265, k) % m };
        let id = *base.get(((row as u64 + offset) % m) as usize)? as u32;
        if ready.contains(&id) {
            return Some(id);
        }
    }
    ready.iter().copied().max_by_key(|id| (pair(*id as u64, row as u64) & !0xffff) | *id as u64)
}

/// The base table of a stream: textbook Maglev, one preference at a time.
pub fn base_table(max_targets: u32) -> Vec<u16> {
    let Some(m) = rows(max_targets) else { return Vec::new() };
    let m = m as u64;
    let mut table = vec![0u16; m as usize];
    let mut next = vec![0u64; max_targets as usize];
    let mut left = m;
    while left > 0 {
        for id in 1..=max_targets as u64 {
            let (offset, skip) = (pair(1, id) % m, pair(2, id) % (m - 1) + 1);
            let j = &mut next[id as usize - 1];
            while table[((offset + *j * skip) % m) as usize] != 0 {
                *j += 1;
            }
            table[((offset + *j * skip) % m) as usize] = id as u16;
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    table
}
