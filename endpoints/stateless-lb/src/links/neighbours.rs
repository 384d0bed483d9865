//! What the kernel has told of the targets' neighbour entries, and what follows from it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use meridio_proto::nsp::v1 as nsp;
use nsm_kernel::netlink::{Mac, Neighbour, NeighbourState};
use tokio::time::Instant;

use super::suspects::Suspects;
use crate::desired::address;

/// A neighbour entry that is deleted is reported as failed just before; a failure counts once it has lasted this long.
pub(super) const CONFIRM: Duration = Duration::from_millis(30);

/// The neighbours of one network namespace, as far as they are targets.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    /// Addresses of the targets. `None`: not told yet, so each address behind an NSM interface may be one.
    targets: Option<BTreeSet<IpAddr>>,
    /// Indexes of the NSM interfaces.
    interfaces: BTreeSet<u32>,
    /// When a failure counts that has been told.
    doubted: BTreeMap<IpAddr, Instant>,
    suspects: Suspects,
    links: LinkAddresses,
}

impl Neighbours {
    /// The registered targets are these now. What is no address cannot be a neighbour.
    pub(super) fn targets(&mut self, targets: Option<&[nsp::Target]>) {
        let addresses =
            |targets: &[nsp::Target]| targets.iter().flat_map(|t| &t.ips).filter_map(|ip| address(ip)).collect();
        self.targets = targets.map(addresses);
        let Some(targets) = &self.targets else { return };
        self.doubted.retain(|ip, _| targets.contains(ip));
        self.suspects.retain(|ip| targets.contains(&ip));
        self.links.retain(|(_, ip)| targets.contains(&ip));
    }

    /// These are the NSM interfaces; an index of another one may be given again.
    pub(super) fn interfaces(&mut self, indexes: &BTreeSet<u32>) {
        self.interfaces.clone_from(indexes);
        self.links.retain(|(index, _)| indexes.contains(&index));
    }

    fn may_be_target(&self, neighbour: &Neighbour) -> bool {
        match &self.targets {
            Some(targets) => targets.contains(&neighbour.ip),
            None => self.interfaces.contains(&neighbour.index),
        }
    }

    /// Takes in what is told of a neighbour; `true`: its link-layer address has changed.
    pub(super) fn told(&mut self, neighbour: &Neighbour, now: Instant) -> bool {
        let ip = neighbour.ip;
        if !self.may_be_target(neighbour) {
            return false;
        }
        match neighbour.state {
            NeighbourState::Failed => _ = self.doubted.entry(ip).or_insert_with(|| now + CONFIRM),
            NeighbourState::Reachable => {
                self.doubted.remove(&ip);
                self.suspects.answer(ip);
            }
            // It has spoken since.
            _ if neighbour.mac.is_some() => _ = self.doubted.remove(&ip),
            _ => {}
        }
        self.links.told(neighbour)
    }

    /// Its entry is gone, which says nothing about the neighbour.
    pub(super) fn gone(&mut self, ip: IpAddr) {
        self.doubted.remove(&ip);
    }

    /// Takes in all there is. Returns the addresses that have failed or are being resolved, unless another interface has them
    /// resolved: who fails is resolved anew for as long as somebody sends to it, so that either says that nobody answers.
    pub(super) fn read(&mut self, all: &[Neighbour], now: Instant) -> BTreeSet<IpAddr> {
        let resolved: BTreeSet<IpAddr> = all.iter().filter(|n| n.mac.is_some()).map(|n| n.ip).collect();
        let mut silent = BTreeSet::new();
        for neighbour in all.iter().filter(|n| n.mac.is_some() || !resolved.contains(&n.ip)) {
            let asked = matches!(neighbour.state, NeighbourState::Failed | NeighbourState::Probing);
            if asked && neighbour.mac.is_none() && self.may_be_target(neighbour) {
                silent.insert(neighbour.ip);
            }
            self.told(neighbour, now);
        }
        silent
    }

    /// A target does not answer; `true`: it goes out of the tables.
    pub(super) fn silent(&mut self, ip: IpAddr, now: Instant) -> bool {
        self.doubted.remove(&ip);
        self.suspects.fail(ip, now)
    }

    /// When the next failure counts.
    pub(super) fn doubt(&self) -> Option<Instant> {
        self.doubted.values().min().copied()
    }

    /// Failures that have lasted by now: these addresses go out of the tables.
    pub(super) fn confirm(&mut self, now: Instant) -> Vec<IpAddr> {
        let failed: Vec<IpAddr> = self.doubted.extract_if(.., |_, at| *at <= now).map(|(ip, _)| ip).collect();
        failed.into_iter().filter(|ip| self.suspects.fail(*ip, now)).collect()
    }

    /// The address answers.
    pub(super) fn answer(&mut self, ip: IpAddr) {
        self.suspects.answer(ip);
    }

    /// When the next address comes back unless it fails again.
    pub(super) fn next(&self) -> Option<Instant> {
        self.suspects.next()
    }

    /// Addresses that come back into the tables.
    pub(super) fn back(&mut self, now: Instant) -> Vec<IpAddr> {
        self.suspects.back(now)
    }

    /// Whether any address is out of the tables.
    pub(super) fn any_out(&self) -> bool {
        self.suspects.any()
    }

    /// Addresses that are out of the tables.
    pub(super) fn out(&self) -> Vec<IpAddr> {
        self.suspects.out()
    }

    /// Those of them to be asked: strangers are not.
    pub(super) fn to_ask(&self) -> Vec<IpAddr> {
        if self.targets.is_some() { self.suspects.out() } else { Vec::new() }
    }

    /// Neighbours whose link-layer address has changed, each with the number of its last change.
    pub(super) fn mac_changes(&self) -> &BTreeMap<(u32, IpAddr), u64> {
        &self.links.changes
    }
}

/// Link-layer addresses by interface and address, as they were told last. They outlive the kernel's entries: what replaces an entry
/// that was deleted, or has failed, may have another one.
#[derive(Debug, Default)]
struct LinkAddresses {
    told: BTreeMap<(u32, IpAddr), Mac>,
    changes: BTreeMap<(u32, IpAddr), u64>,
    /// Number of the last change of any.
    last: u64,
}

impl LinkAddresses {
    /// `true`: another one than before.
    fn told(&mut self, neighbour: &Neighbour) -> bool {
        let Some(mac) = neighbour.mac else { return false };
        let key = (neighbour.index, neighbour.ip);
        let changed = self.told.insert(key, mac).is_some_and(|before| before != mac);
        if changed {
            self.last += 1;
            self.changes.insert(key, self.last);
        }
        changed
    }

    fn retain(&mut self, keep: impl Fn((u32, IpAddr)) -> bool) {
        self.told.retain(|key, _| keep(*key));
        self.changes.retain(|key, _| keep(*key));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn target(ips: &[&str]) -> nsp::Target {
        nsp::Target { ips: ips.iter().map(|ip| (*ip).to_owned()).collect(), ..nsp::Target::default() }
    }

    fn neighbour(index: u32, address: &str, mac: Option<u8>, state: NeighbourState) -> Neighbour {
        Neighbour { index, ip: ip(address), mac: mac.map(|n| Mac([2, 0, 0, 0, 0, n])), state }
    }

    #[tokio::test(start_paused = true)]
    async fn a_target_is_known_by_its_address_however_it_is_written() {
        let now = Instant::now();
        for written in ["fd00::2", "fd00::2/64", "fd00:0:0::2/64", "FD00::2", "fd00::0:2/128"] {
            let mut known = Neighbours::default();
            known.targets(Some(&[target(&["172.16.0.2/24", written]), target(&["nonsense"])]));
            for address in ["fd00::2", "172.16.0.2", "172.16.0.3"] {
                known.told(&neighbour(7, address, None, NeighbourState::Failed), now);
            }
            assert!(known.confirm(now).is_empty(), "not yet");
            assert_eq!(known.doubt(), Some(now + CONFIRM));
            assert_eq!(known.confirm(now + CONFIRM), [ip("172.16.0.2"), ip("fd00::2")], "{written}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_no_target_any_more_is_forgotten() {
        let now = Instant::now();
        let mut known = Neighbours::default();
        known.targets(Some(&[target(&["172.16.0.2"]), target(&["172.16.0.3"])]));
        let silent = ["172.16.0.2", "172.16.0.9"].map(|address| neighbour(7, address, None, NeighbourState::Failed));
        assert_eq!(known.read(&silent, now), BTreeSet::from([ip("172.16.0.2")]));
        assert!(known.silent(ip("172.16.0.2"), now) && !known.silent(ip("172.16.0.2"), now));
        known.told(&neighbour(7, "172.16.0.3", None, NeighbourState::Failed), now);
        known.targets(Some(&[target(&["172.16.0.4"])]));
        assert_eq!((known.out(), known.doubt()), (vec![], None));
    }

    #[tokio::test(start_paused = true)]
    async fn before_targets_are_told_each_address_behind_an_nsm_interface_may_be_one() {
        let now = Instant::now();
        let mut known = Neighbours::default();
        known.interfaces(&BTreeSet::from([7]));
        for (index, address) in [(7, "172.16.0.2"), (7, "172.16.0.3"), (9, "10.0.0.1")] {
            known.told(&neighbour(index, address, None, NeighbourState::Failed), now);
        }
        assert_eq!(known.confirm(now + CONFIRM), [ip("172.16.0.2"), ip("172.16.0.3")]);
        assert_eq!((known.out().len(), known.to_ask().len()), (2, 0), "strangers are not asked");
        known.targets(Some(&[target(&["172.16.0.2"])]));
        assert_eq!(known.to_ask(), [ip("172.16.0.2")]);
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_failed_or_is_asked_for_is_silent_unless_it_is_resolved_elsewhere() {
        use NeighbourState::{Failed, Other, Permanent, Probing, Reachable, Stale};
        let now = Instant::now();
        let mut known = Neighbours::default();
        known.interfaces(&BTreeSet::from([7, 8]));
        let all = [
            neighbour(7, "172.16.0.2", None, Failed),
            neighbour(7, "172.16.0.3", None, Probing),
            neighbour(7, "172.16.0.4", Some(4), Probing),
            neighbour(7, "172.16.0.5", Some(5), Stale),
            neighbour(7, "172.16.0.6", Some(6), Reachable),
            neighbour(7, "172.16.0.7", Some(7), Permanent),
            neighbour(7, "172.16.0.8", None, Other),
            neighbour(7, "172.16.0.9", None, Failed),
            neighbour(8, "172.16.0.9", Some(9), Stale),
        ];
        assert_eq!(known.read(&all, now), BTreeSet::from([ip("172.16.0.2"), ip("172.16.0.3")]));
        // Later it is one failure among others, and the kernel will tell what becomes of the rest.
        assert_eq!(known.confirm(now + CONFIRM), [ip("172.16.0.2")]);
        let again = [neighbour(7, "172.16.0.2", Some(2), Reachable)];
        assert!(known.read(&again, now + CONFIRM).is_empty() && known.next().is_some(), "it has answered meanwhile");
    }

    #[tokio::test(start_paused = true)]
    async fn another_link_layer_address_is_a_change_with_a_number_of_its_own() {
        use NeighbourState::{Failed, Probing, Reachable, Stale};
        let now = Instant::now();
        let mut known = Neighbours::default();
        known.targets(Some(&[target(&["172.16.0.2/24"]), target(&["172.16.0.3/24"])]));
        let told = |known: &mut Neighbours, index, address: &str, mac, state| {
            known.told(&neighbour(index, address, mac, state), now)
        };
        assert!(!told(&mut known, 7, "172.16.0.2", Some(1), Reachable), "the first one");
        assert!(!told(&mut known, 7, "172.16.0.2", Some(1), Stale), "the same");
        assert!(!told(&mut known, 8, "172.16.0.2", Some(9), Stale), "on another interface");
        assert!(
            !told(&mut known, 7, "172.16.0.9", Some(1), Stale) && !told(&mut known, 7, "172.16.0.9", Some(2), Stale)
        );
        assert!(known.mac_changes().is_empty());

        // Its entry fails and is deleted; who answers then is somebody else.
        told(&mut known, 7, "172.16.0.2", None, Failed);
        known.gone(ip("172.16.0.2"));
        told(&mut known, 7, "172.16.0.2", None, Probing);
        assert!(told(&mut known, 7, "172.16.0.2", Some(2), Reachable));
        let key = (7, ip("172.16.0.2"));
        assert_eq!(*known.mac_changes(), BTreeMap::from([(key, 1)]));
        assert!(told(&mut known, 7, "172.16.0.2", Some(1), Stale), "back again is a change as well");
        assert_eq!(*known.mac_changes(), BTreeMap::from([(key, 2)]));

        // Forgotten with the target or the interface; numbers do not come again.
        known.targets(Some(&[target(&["172.16.0.3/24"])]));
        assert!(known.mac_changes().is_empty());
        told(&mut known, 7, "172.16.0.3", Some(3), Stale);
        assert!(told(&mut known, 7, "172.16.0.3", Some(4), Stale));
        assert_eq!(*known.mac_changes(), BTreeMap::from([((7, ip("172.16.0.3")), 3)]));
        known.interfaces(&BTreeSet::from([8]));
        assert!(known.mac_changes().is_empty());
        assert!(!told(&mut known, 7, "172.16.0.3", Some(5), Stale), "nothing is known of an index that is given again");
    }
}
