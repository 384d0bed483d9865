//! Wires: the link of one connection, made by a forwarder between two namespaces of one node (veth) or between a
//! namespace and another node (VXLAN).
//!
//! Interfaces are found again by alias. One that carries our alias and leads to the right peer is adopted (same index,
//! nothing lost); one that carries our alias and leads elsewhere is stale and is replaced; one that has our
//! name and somebody else's alias is an error, never touched.
//!
//! The alias has the forwarder's own id of the connection in it, which nobody else can choose: clients may well call their
//! connections alike ([`Names`]).

use crate::error::ignore_missing;
use crate::netlink::{Link, LinkChange, VXLAN, VethEnd, VxlanParameters, mac_from_seed};
use crate::{Error, Netns, aliases, sysctl};

pub use crate::aliases::{Alias, Names};

const VETH: &str = "veth";
/// Longest name of an interface in bytes (`IFNAMSIZ - 1`).
pub const NAME_MAX: usize = 15;

/// One end of a wire: where, under which name, recognised by which alias.
#[derive(Clone, Debug)]
pub struct End {
    /// Namespace of the interface.
    pub netns: Netns,
    /// Its final name.
    pub name: String,
    /// Its alias, and what it may have been.
    pub alias: Alias,
}

/// A wire that shall exist.
#[derive(Clone, Debug)]
pub enum Wire {
    /// Both ends on this node.
    Veth {
        /// The client's end.
        client: End,
        /// The endpoint's end.
        endpoint: End,
    },
    /// One end on this node, the other one on another.
    Vxlan {
        /// The end on this node.
        end: End,
        /// The node's own namespace: the underlay socket stays in it.
        underlay: Netns,
        /// Tunnel parameters.
        tunnel: VxlanParameters,
    },
}

/// A wire that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    /// True if it had to be made, false if it was adopted.
    pub created: bool,
    /// Interface index of the client's end, or of the only end on this node.
    pub first: u32,
    /// Interface index of the endpoint's end, of a veth.
    pub second: Option<u32>,
}

/// What has to be done for a wire; computed from what was read.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct WirePlan {
    /// Indexes of stale interfaces in the first end's namespace.
    pub delete_first: Vec<u32>,
    /// Indexes of stale interfaces in the second end's namespace.
    pub delete_second: Vec<u32>,
    /// The ends that can be adopted, under whatever name; otherwise the wire has to be made.
    pub adopt: Option<(u32, Option<u32>)>,
}

fn check_name(end: &End) -> Result<(), Error> {
    let name = &end.name;
    let fit = !name.is_empty() && name.len() <= NAME_MAX && name != "." && name != "..";
    if fit && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
        return Ok(());
    }
    Err(Error::Invalid(format!("{name:?} is not an interface name (1 to {NAME_MAX} bytes, no space, '/' or ':')")))
}

/// Interfaces with our alias, unless one with our name is foreign.
fn ours<'a>(end: &End, links: &'a [Link]) -> Result<Vec<&'a Link>, Error> {
    if let Some(other) = links.iter().find(|l| l.name == end.name && !end.alias.replaces(&l.alias)) {
        let (name, alias, wanted) = (end.name.clone(), other.alias.clone(), end.alias.to_string());
        return Err(Error::Foreign { name, alias, wanted });
    }
    Ok(links.iter().filter(|l| end.alias.replaces(&l.alias)).collect())
}

/// The interface that may be this end: ours by alias, or one without an alias that we may have been interrupted at.
fn candidates<'a>(end: &'a End, links: &'a [Link]) -> impl Iterator<Item = &'a Link> {
    let unfinished = |l: &Link| l.name == end.name && l.alias.is_empty();
    links.iter().filter(move |l| l.kind == VETH && (end.alias.is(&l.alias) || unfinished(l)))
}

/// The pair that an earlier connection of the same client has left: both ends have its aliases and lead to each other.
fn inherited<'a>(a: &End, b: &End, in_a: &'a [Link], in_b: &'a [Link]) -> Option<(&'a Link, &'a Link)> {
    let pair = |la: &'a Link| {
        let other = b.alias.counterpart(&a.alias, &la.alias)?;
        let joined = |lb: &&Link| lb.alias == other && la.peer == Some(lb.index) && lb.peer == Some(la.index);
        in_b.iter().filter(|lb| lb.kind == VETH).find(joined).map(|lb| (la, lb))
    };
    in_a.iter().filter(|la| la.kind == VETH).find_map(pair)
}

/// Compares a veth wire with the interfaces of both namespaces. A pair of ours under another name is adopted too, and renamed:
/// the name is the endpoint's choice and may differ after one of the two has been restarted.
pub fn plan_veth(a: &End, b: &End, in_a: &[Link], in_b: &[Link]) -> Result<WirePlan, Error> {
    let (ours_a, ours_b) = (ours(a, in_a), ours(b, in_b));
    let own = candidates(a, in_a).find_map(|la| {
        let joined = |lb: &&Link| la.peer == Some(lb.index) && lb.peer == Some(la.index);
        candidates(b, in_b).find(joined).map(|lb| (la, lb))
    });
    if let Some((la, lb)) = own.or_else(|| inherited(a, b, in_a, in_b))
        && (ours_a.is_ok() || la.name == a.name)
        && (ours_b.is_ok() || lb.name == b.name)
    {
        return Ok(WirePlan { adopt: Some((la.index, Some(lb.index))), ..Default::default() });
    }
    let index = |links: Vec<&Link>| links.iter().map(|l| l.index).collect();
    Ok(WirePlan { delete_first: index(ours_a?), delete_second: index(ours_b?), adopt: None })
}

/// Compares a VXLAN wire with the interfaces of the end's namespace.
pub fn plan_vxlan(end: &End, tunnel: &VxlanParameters, links: &[Link]) -> Result<WirePlan, Error> {
    let ours = ours(end, links);
    let fits = |l: &&Link| l.kind == VXLAN && l.vxlan.as_ref() == Some(tunnel);
    let known =
        |exact: bool| links.iter().filter(fits).find(|l| end.alias.is(&l.alias) || !exact && end.alias.was(&l.alias));
    if let Some(link) = known(true).or_else(|| known(false))
        && (ours.is_ok() || link.name == end.name)
    {
        return Ok(WirePlan { adopt: Some((link.index, None)), ..Default::default() });
    }
    Ok(WirePlan { delete_first: ours?.iter().map(|l| l.index).collect(), ..Default::default() })
}

/// Sees to it that the wire exists, by adopting, replacing or making it; both ends are up afterwards.
pub async fn ensure(wire: &Wire) -> Result<Made, Error> {
    match wire {
        Wire::Veth { client, endpoint } => ensure_veth(client, endpoint).await,
        Wire::Vxlan { end, underlay, tunnel } => ensure_vxlan(end, underlay, tunnel).await,
    }
}

/// Every interface of the end's namespace.
async fn all(end: &End) -> Result<Vec<Link>, Error> {
    let links = end.netns.netlink().await?.links().await?;
    aliases::listed(end.netns.id(), &links);
    Ok(links)
}

/// Every interface of the namespace that matters for this end: all of them, unless none has its alias for certain.
async fn relevant(end: &End, named: &[Link]) -> Result<Vec<Link>, Error> {
    if end.alias.absent(end.netns.id()) { Ok(named.to_vec()) } else { all(end).await }
}

async fn named(end: &End) -> Result<Vec<Link>, Error> {
    Ok(end.netns.netlink().await?.link_by_name(&end.name).await?.into_iter().collect())
}

async fn ensure_veth(a: &End, b: &End) -> Result<Made, Error> {
    check_name(a)?;
    check_name(b)?;
    let (na, nb) = (a.netns.netlink().await?, b.netns.netlink().await?);
    // What is as it should be is found by its names, however many others there are.
    let (named_a, named_b) = (named(a).await?, named(b).await?);
    let mut plan = plan_veth(a, b, &named_a, &named_b).unwrap_or_default();
    if plan.adopt.is_none() {
        let in_a = relevant(a, &named_a).await?;
        // Nothing is inherited but what begins in the client's namespace; in the endpoint's there may be a thousand others.
        let inherits = in_a.iter().any(|link| a.alias.was(&link.alias));
        let unknown = !inherits && aliases::absent(b.netns.id(), &b.alias.text);
        let in_b = if unknown { named_b.clone() } else { all(b).await? };
        plan = plan_veth(a, b, &in_a, &in_b)?;
    }
    for index in &plan.delete_first {
        ignore_missing(na.link_delete(*index).await)?;
    }
    for index in &plan.delete_second {
        ignore_missing(nb.link_delete(*index).await)?;
    }
    if plan.adopt.is_none() {
        let end = |e: &End| {
            aliases::using(e.netns.id(), &e.alias.text);
            VethEnd { netns: e.netns.clone(), name: e.name.clone(), mac: mac_from_seed(&e.alias.text) }
        };
        na.veth_create(&end(a), &end(b), None).await?;
    }
    let found = plan.adopt.map_or((None, None), |(first, second)| (Some(first), second));
    let (first, second) = (activate(a, found.0, &named_a).await?, activate(b, found.1, &named_b).await?);
    Ok(Made { created: plan.adopt.is_none(), first, second: Some(second) })
}

/// Name of the endpoint's end of a veth that exists already, found from the client's end `name` in `netns`: only if both carry the aliases of the
/// connection.
pub async fn endpoint_name(netns: &Netns, name: &str, names: &Names) -> Result<Option<String>, Error> {
    let (client, endpoint) = (names.client(), names.endpoint());
    if client.absent(netns.id()) {
        return Ok(None);
    }
    let netlink = netns.netlink().await?;
    let Some(own) = netlink.link_by_name(name).await? else { return Ok(None) };
    let other = if client.is(&own.alias) { Some(endpoint.text) } else { endpoint.counterpart(&client, &own.alias) };
    let (Some(other), Some((peer, nsid))) = (other, own.peer.zip(own.peer_nsid)) else { return Ok(None) };
    let found = netlink.link_in(nsid, peer).await?.filter(|link| link.alias == other);
    Ok(found.map(|link| link.name))
}

/// Name that a VXLAN device has in the node's namespace between being made and being moved: always the same for one
/// connection, so that one that a crash left behind is found.
fn transit_name(alias: &str) -> String {
    let mac = mac_from_seed(alias).0;
    mac.iter().fold(String::from("vx"), |name, byte| format!("{name}{byte:02x}"))
}

async fn ensure_vxlan(end: &End, underlay: &Netns, tunnel: &VxlanParameters) -> Result<Made, Error> {
    check_name(end)?;
    let netlink = end.netns.netlink().await?;
    let named = named(end).await?;
    let mut plan = plan_vxlan(end, tunnel, &named).unwrap_or_default();
    if plan.adopt.is_none() {
        plan = plan_vxlan(end, tunnel, &relevant(end, &named).await?)?;
    }
    if let Some((index, _)) = plan.adopt {
        let first = activate(end, Some(index), &named).await?;
        return Ok(Made { created: false, first, second: None });
    }
    for index in &plan.delete_first {
        ignore_missing(netlink.link_delete(*index).await)?;
    }
    let node = underlay.netlink().await?;
    aliases::using(end.netns.id(), &end.alias.text);
    let transit = transit_name(&end.alias.text);
    if let Some(left) = node.link_by_name(&transit).await? {
        ignore_missing(node.link_delete(left.index).await)?;
    }
    node.vxlan_create(&transit, tunnel, mac_from_seed(&end.alias.text)).await?;
    let made = node.link_by_name(&transit).await?.ok_or_else(|| Error::NoLink(transit.clone()))?;
    let change = LinkChange {
        alias: Some(end.alias.text.clone()),
        move_to: Some((end.netns.clone(), end.name.clone())),
        ..Default::default()
    };
    if let Err(e) = node.link_change(made.index, &change).await {
        ignore_missing(node.link_delete(made.index).await)?;
        return Err(e);
    }
    let first = activate(end, None, &[]).await?;
    Ok(Made { created: true, first, second: None })
}

/// Sets name, alias and "up" where they differ; returns the interface's index. `adopted` is the index of one that was there,
/// perhaps among those that were `seen`.
async fn activate(end: &End, adopted: Option<u32>, seen: &[Link]) -> Result<u32, Error> {
    let netlink = end.netns.netlink().await?;
    let link = match adopted {
        Some(index) => match seen.iter().find(|link| link.index == index) {
            Some(link) => Some(link.clone()),
            None => netlink.link_by_index(index).await?,
        },
        None => {
            let name = end.name.clone();
            end.netns.run(move || sysctl::prepare_interface_here(&name)).await?;
            netlink.link_by_name(&end.name).await?
        }
    };
    let link = link.ok_or_else(|| Error::NoLink(end.name.clone()))?;
    if link.name != end.name {
        netlink.link_rename(link.index, &end.name).await?;
    }
    if !link.up || !end.alias.is(&link.alias) {
        aliases::using(end.netns.id(), &end.alias.text);
        let change = LinkChange { up: Some(true), alias: Some(end.alias.text.clone()), ..Default::default() };
        netlink.link_change(link.index, &change).await?;
    }
    Ok(link.index)
}

/// Deletes the interface with this alias in a namespace. True if there was one.
pub async fn remove_by_alias(netns: &Netns, alias: &str) -> Result<bool, Error> {
    if aliases::absent(netns.id(), alias) {
        return Ok(false);
    }
    let netlink = netns.netlink().await?;
    let (links, mut found) = (netlink.links().await?, false);
    aliases::listed(netns.id(), &links);
    for link in links.iter().filter(|l| l.alias == alias) {
        found = true;
        ignore_missing(netlink.link_delete(link.index).await)?;
    }
    aliases::removed(netns.id(), alias);
    Ok(found)
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
