//! First-fit search for a free prefix, for both families alike.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// First and last address of a prefix as numbers.
pub fn bounds(net: &IpNet) -> (u128, u128) {
    let number = |address: IpAddr| match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    };
    let last = match net {
        IpNet::V4(v4) => IpAddr::V4(v4.broadcast()),
        IpNet::V6(v6) => IpAddr::V6(v6.broadcast()),
    };
    (number(net.network()), number(last))
}

/// The prefix of `length` bits that starts at `start`, in the family of `parent`.
fn prefix(parent: &IpNet, start: u128, length: u8) -> Option<IpNet> {
    let address = match parent {
        IpNet::V4(_) => IpAddr::V4(Ipv4Addr::from(u32::try_from(start).ok()?)),
        IpNet::V6(_) => IpAddr::V6(Ipv6Addr::from(start)),
    };
    IpNet::new(address, length).ok()
}

/// The lowest prefix of `length` bits inside `parent` that overlaps none of `taken` (first and last address each, any order). None if
/// `length` is not longer than the parent's, or nothing is free.
pub fn first_free(parent: &IpNet, length: u8, taken: impl IntoIterator<Item = (u128, u128)>) -> Option<IpNet> {
    if length <= parent.prefix_len() || length > parent.max_prefix_len() {
        return None;
    }
    let size = 1u128 << (parent.max_prefix_len() - length);
    let (mut candidate, end) = bounds(parent);
    let mut taken: Vec<_> = taken.into_iter().collect();
    taken.sort_unstable();
    for (first, last) in taken {
        // Sorted, so nothing before `candidate + size` is taken by what comes later.
        if first > candidate + (size - 1) {
            break;
        }
        if last >= candidate {
            candidate = last.checked_add(1)?.checked_next_multiple_of(size)?;
            if candidate > end {
                return None;
            }
        }
    }
    prefix(parent, candidate, length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Allocates one after the other; `None` where nothing was free.
    fn sequence(parent: &str, lengths: &[u8]) -> Vec<Option<String>> {
        let parent: IpNet = parent.parse().unwrap();
        let mut taken = Vec::new();
        let mut one = |length: &u8| {
            let net = first_free(&parent, *length, taken.iter().copied())?;
            taken.push(bounds(&net));
            Some(net.to_string())
        };
        lengths.iter().map(&mut one).collect()
    }

    fn check(parent: &str, lengths: &[u8], expected: &[&str]) {
        let expected: Vec<_> = expected.iter().map(|e| (!e.is_empty()).then(|| (*e).to_owned())).collect();
        assert_eq!(sequence(parent, lengths), expected);
    }

    #[test]
    fn vectors_of_the_original() {
        check(
            "169.16.0.0/16",
            &[24, 24, 32, 32, 17],
            &["169.16.0.0/24", "169.16.1.0/24", "169.16.2.0/32", "169.16.2.1/32", "169.16.128.0/17"],
        );
        check("169.16.0.0/24", &[25, 25, 32], &["169.16.0.0/25", "169.16.0.128/25", ""]);
        check(
            "2001:1::/32",
            &[64, 64, 128, 128, 33],
            &["2001:1::/64", "2001:1:0:1::/64", "2001:1:0:2::/128", "2001:1:0:2::1/128", "2001:1:8000::/33"],
        );
        check(
            "2001:1::/64",
            &[66, 66, 66, 66, 66, 66],
            &["2001:1::/66", "2001:1:0:0:4000::/66", "2001:1:0:0:8000::/66", "2001:1:0:0:c000::/66", "", ""],
        );
        check("169.16.0.0/24", &[24, 23, 33], &["", "", ""]);
        check("255.255.255.0/24", &[25, 25, 25], &["255.255.255.0/25", "255.255.255.128/25", ""]);
        check("::/0", &[1, 1, 1], &["::/1", "8000::/1", ""]);
        check("ffff::/16", &[17, 17, 128], &["ffff::/17", "ffff:8000::/17", ""]);
    }

    proptest! {
        /// Whatever is asked for and given back: no two prefixes overlap, all lie in the parent, and a refusal is right (a slow search
        /// finds nothing either).
        #[test]
        fn never_an_overlap_never_a_false_refusal(steps in proptest::collection::vec((25u8..=32, any::<bool>(), any::<prop::sample::Index>()), 1..200)) {
            let parent: IpNet = "10.0.0.0/24".parse().unwrap();
            let mut held: Vec<IpNet> = Vec::new();
            for (length, give_back, which) in steps {
                if give_back && !held.is_empty() {
                    held.swap_remove(which.index(held.len()));
                    continue;
                }
                let free = |net: &IpNet| held.iter().all(|h| !h.contains(net) && !net.contains(h));
                let slow = parent.subnets(length).unwrap().find(free);
                let found = first_free(&parent, length, held.iter().map(bounds));
                prop_assert_eq!(found, slow);
                held.extend(found);
            }
        }
    }
}
