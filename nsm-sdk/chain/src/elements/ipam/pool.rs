//! Addresses of one prefix.

use ipnet::IpNet;
use std::{collections::BTreeSet, net::IpAddr};

/// Hands out single addresses of a prefix, lowest first. Network and broadcast addresses are addresses like others.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    net: IpNet,
    taken: BTreeSet<IpAddr>,
}

/// The address after this one; `None` after the last.
fn after(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(v4) => u32::from(v4).checked_add(1).map(|next| IpAddr::V4(next.into())),
        IpAddr::V6(v6) => u128::from(v6).checked_add(1).map(|next| IpAddr::V6(next.into())),
    }
}

impl Pool {
    pub(super) fn new(net: IpNet) -> Self {
        Self { net: net.trunc(), taken: BTreeSet::new() }
    }

    pub(super) fn net(&self) -> IpNet {
        self.net
    }

    /// The lowest free address outside `excluded`.
    pub(super) fn pull(&mut self, excluded: &[IpNet]) -> Option<IpAddr> {
        let mut next = self.net.network();
        loop {
            if !self.net.contains(&next) {
                return None;
            }
            if let Some(range) = excluded.iter().find(|range| range.contains(&next)) {
                next = after(range.broadcast())?;
            } else if self.taken.contains(&next) {
                next = after(next)?;
            } else {
                self.taken.insert(next);
                return Some(next);
            }
        }
    }

    /// This address, if it is free and allowed.
    pub(super) fn pull_this(&mut self, address: IpAddr, excluded: &[IpNet]) -> bool {
        let allowed = self.net.contains(&address) && !excluded.iter().any(|range| range.contains(&address));
        allowed && self.taken.insert(address)
    }

    pub(super) fn free(&mut self, address: IpAddr) {
        self.taken.remove(&address);
    }
}

/// Prefixes of a list of texts; what is none is left out.
pub(super) fn nets(texts: &[String]) -> Vec<IpNet> {
    texts.iter().filter_map(|text| text.parse::<IpNet>().ok()).map(|net| net.trunc()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    // Conformance 96
    #[test]
    fn lowest_first_around_exclusions_to_the_end() {
        let mut pool = Pool::new(net("10.0.0.0/29"));
        let excluded = [net("10.0.0.2/31"), net("10.0.0.6/32")];
        let all: Vec<_> = std::iter::from_fn(|| pool.pull(&excluded)).map(|ip| ip.to_string()).collect();
        assert_eq!(all, ["10.0.0.0", "10.0.0.1", "10.0.0.4", "10.0.0.5", "10.0.0.7"]);
        pool.free("10.0.0.4".parse().unwrap());
        assert_eq!(pool.pull(&excluded), Some("10.0.0.4".parse().unwrap()));
        assert!(!pool.pull_this("10.0.0.4".parse().unwrap(), &[]));
        assert!(!pool.pull_this("10.0.1.4".parse().unwrap(), &[]));
        let mut end = Pool::new(net("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"));
        assert!(end.pull(&[]).is_some() && end.pull(&[]).is_none());
    }

    proptest! {
        /// Never twice, never outside, never excluded.
        #[test]
        fn addresses_are_distinct_and_allowed(len in 24_u8..=32, excluded_at: u8, excluded_len in 24_u8..=32) {
            let base: IpNet = format!("10.0.0.0/{len}").parse().unwrap();
            let excluded = [format!("10.0.0.{excluded_at}/{excluded_len}").parse::<IpNet>().unwrap().trunc()];
            let mut pool = Pool::new(base);
            let all: Vec<_> = std::iter::from_fn(|| pool.pull(&excluded)).collect();
            prop_assert!(all.iter().all(|ip| base.contains(ip) && !excluded[0].contains(ip)));
            let distinct: BTreeSet<_> = all.iter().collect();
            prop_assert_eq!(distinct.len(), all.len());
        }
    }
}
