//! Next hops of ready targets, and the tables that the slow path has for them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use meridio_maglev::Engine;

use crate::desired::Ready;
use crate::routing::Wanted;

/// Next hops by the tables of the slow path, of the streams that the engine has.
pub(crate) fn slow_path(engine: &Engine, ready: &Ready) -> Wanted {
    let mut wanted = Wanted::new();
    let places = ready.targets.iter().flat_map(|(stream, targets)| {
        engine.places(stream).into_iter().map(move |(offset, limit)| (offset, limit, targets))
    });
    for (offset, limit, targets) in places {
        // Behind the limit are the tables of another stream.
        for (identifier, target) in targets.range(..=limit) {
            if let Some((ip, index)) = target.v4 {
                wanted.insert((false, offset + identifier), (ip.into(), index));
            }
            if let Some((ip, index)) = target.v6 {
                wanted.insert((true, offset + identifier), (ip.into(), index));
            }
        }
    }
    wanted
}

/// Interface and address of each next hop.
pub(crate) fn hops(ready: &Ready) -> BTreeSet<(u32, IpAddr)> {
    let targets = ready.targets.values().flat_map(|t| t.values());
    targets
        .flat_map(|t| [t.v4.map(|(ip, index)| (index, ip.into())), t.v6.map(|(ip, index)| (index, ip.into()))])
        .flatten()
        .collect()
}

/// Next hops whose link-layer address has changed, each with the number of its last change, as far as packets go by it.
#[derive(Debug, Default)]
pub(crate) struct Followed(BTreeMap<(u32, IpAddr), u64>);

impl Followed {
    /// Has packets ask for the addresses that have changed since the last time; `false`: try again.
    pub(crate) fn follow(&mut self, changes: &BTreeMap<(u32, IpAddr), u64>, engine: &mut Engine) -> bool {
        let new = self.fresh(changes);
        if new.is_empty() {
            return true;
        }
        match engine.look_again(&new) {
            Ok(()) => self.0.clone_from(changes),
            Err(error) => tracing::warn!(%error, "new link-layer addresses are used a little later"),
        }
        self.0 == *changes
    }

    fn fresh(&self, changes: &BTreeMap<(u32, IpAddr), u64>) -> BTreeSet<(u32, IpAddr)> {
        changes.iter().filter(|(hop, number)| self.0.get(hop) != Some(number)).map(|(hop, _)| *hop).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_change_is_followed_once() {
        let [a, b] = [(3, "172.16.0.2".parse().unwrap()), (3, "fd00::2".parse().unwrap())];
        let mut followed = Followed::default();
        assert_eq!(followed.fresh(&BTreeMap::from([(a, 1), (b, 2)])), [a, b].into());
        followed.0 = BTreeMap::from([(a, 1), (b, 2)]);
        assert_eq!(followed.fresh(&BTreeMap::from([(a, 1), (b, 2)])), [].into());
        assert_eq!(followed.fresh(&BTreeMap::from([(a, 3)])), [a].into(), "again, while another one has gone");
    }
}
