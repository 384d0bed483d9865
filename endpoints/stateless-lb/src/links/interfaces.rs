//! NSM interfaces and the external one, read from the kernel.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nsm_kernel::netlink::{Address, Link, LinkChange, Netlink};

use crate::inputs::Subnet;

/// What interfaces there are.
pub(super) struct Interfaces {
    pub(super) subnets: BTreeSet<Subnet>,
    pub(super) unusable: BTreeSet<String>,
    pub(super) external: Option<u32>,
    /// Indexes of the NSM interfaces, up or not.
    pub(super) nsm: BTreeSet<u32>,
}

/// Reads them: NSM's are those whose name begins with `prefix`. Sets interfaces down that a newer one has replaced.
pub(super) async fn read(netlink: &Netlink, prefix: &str, external: &str) -> Result<Interfaces, nsm_kernel::Error> {
    let links = netlink.links().await?;
    let outside = links.iter().find(|l| l.name == external && l.up).map(|l| l.index);
    let ours: Vec<&Link> = links.iter().filter(|l| l.name.starts_with(prefix) && l.name != external).collect();
    let nsm = ours.iter().map(|l| l.index).collect();
    let (usable, unusable): (Vec<&Link>, Vec<&Link>) = ours.into_iter().filter(|l| l.up).partition(|l| l.mac.is_some());
    let ours: BTreeMap<u32, (u32, bool)> =
        usable.iter().map(|l| (l.index, (l.mtu, l.kind == "veth" && l.peer_nsid.is_some()))).collect();
    let mut addresses: Vec<Address> = netlink.addresses(None).await?.into_iter().filter(|a| a.global).collect();
    for index in replaced(&addresses, &ours) {
        let name = usable.iter().find(|l| l.index == index).map_or("", |l| l.name.as_str());
        tracing::warn!(interface = name, "a newer interface has its address: set down");
        // It may go while we look, and what it is in the way of is to be served in any case.
        if let Err(error) = netlink.link_change(index, &LinkChange { up: Some(false), ..LinkChange::default() }).await {
            tracing::warn!(interface = name, %error, "not set down");
        }
        addresses.retain(|a| a.index != index);
    }
    let subnets = addresses
        .into_iter()
        .filter_map(|a| {
            let (mtu, direct) = *ours.get(&a.index)?;
            Some(Subnet { net: a.net, index: a.index, mtu, direct })
        })
        .collect();
    let unusable = unusable.iter().map(|l| l.name.clone()).collect();
    Ok(Interfaces { subnets, unusable, external: outside, nsm })
}

/// Interfaces whose address a newer one of ours has. Proxy and NSM of a node may have forgotten the connection that an interface belongs
/// to, and have made another beside it: what is sent over the old one gets nowhere, and the kernel would prefer it.
///
/// An interface is as new as its newest address: one that was down has got its IPv6 addresses later than its IPv4 ones. Whatever the
/// times are, each address stays with the newest interface that has it.
fn replaced(addresses: &[Address], ours: &BTreeMap<u32, (u32, bool)>) -> BTreeSet<u32> {
    let mut interfaces: BTreeMap<u32, (u32, Vec<IpAddr>)> = BTreeMap::new();
    for address in addresses.iter().filter(|a| ours.contains_key(&a.index)) {
        let (newest, ips) = interfaces.entry(address.index).or_default();
        *newest = address.since.max(*newest);
        ips.push(address.net.addr());
    }
    let mut newest_first: Vec<_> = interfaces.into_iter().collect();
    newest_first.sort_by_key(|(index, (newest, _))| Reverse((*newest, *index)));
    let mut held = BTreeSet::new();
    let mut old = BTreeSet::new();
    for (index, (_, ips)) in newest_first {
        if ips.iter().any(|ip| held.contains(ip)) {
            old.insert(index);
        } else {
            held.extend(ips);
        }
    }
    old
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_stays_with_the_newest_interface_that_has_it() {
        let ours: BTreeMap<u32, (u32, bool)> = (1..5).map(|index| (index, (1500, true))).collect();
        let old = |addresses: &[(u32, &str, u32)]| -> Vec<u32> {
            let address = |&(index, net, since): &(u32, &str, u32)| Address {
                index,
                net: net.parse().unwrap(),
                global: true,
                tentative: false,
                since,
            };
            replaced(&addresses.iter().map(address).collect::<Vec<_>>(), &ours).into_iter().collect()
        };
        let (v4, v6) = ("172.31.0.1/24", "fd00::1/64");
        assert_eq!(old(&[(1, v4, 10), (1, v6, 10), (2, v4, 20), (2, v6, 20)]), [1]);
        assert_eq!(old(&[(1, v4, 20), (2, v4, 10), (1, v6, 20)]), [2], "in one family only");
        // The first one was down meanwhile, which cost it its IPv6 address: one of the two has to stay.
        assert_eq!(old(&[(1, v4, 10), (2, v4, 20), (1, v6, 30), (2, v6, 20)]), [2]);
        assert_eq!(
            old(&[(1, v4, 10), (2, v4, 10), (2, v6, 10), (1, v6, 10)]),
            [1],
            "in the same instant, whatever the order"
        );
        // What goes because of one takes nothing with it.
        assert_eq!(old(&[(1, v4, 10), (2, v4, 20), (2, v6, 20), (3, v6, 30)]), [2]);
        assert!(old(&[(1, v4, 10), (2, "172.31.1.1/24", 20), (9, v4, 30)]).is_empty(), "nobody else's counts");
    }
}
