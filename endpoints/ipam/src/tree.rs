//! The tree of one family: trench, conduits, nodes, children. Pure: it chooses and remembers, somebody else stores.
//!
//! Names are keys of maps, never parts of a joined text: a conduit `a-b` with node `c` is not a conduit `a` with node `b-c`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::prefix::{bounds, first_free};

/// The child that holds a node's bridge; it lives as long as its node.
pub const BRIDGE: &str = "bridge";

/// Seconds since 1970.
pub type Seconds = u64;

/// One address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child {
    /// The address.
    pub address: IpAddr,
    /// Last time it was asked for.
    pub updated: Seconds,
    /// The same as far as the store knows.
    pub stored: Seconds,
}

/// What one node has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its prefix.
    pub prefix: IpNet,
    /// Last time one of its children was asked for.
    pub updated: Seconds,
    /// The same as far as the store knows.
    pub stored: Seconds,
    /// Its addresses by name.
    pub children: BTreeMap<String, Child>,
}

/// What one conduit has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conduit {
    /// Its prefix.
    pub prefix: IpNet,
    /// Since when the NSP does not list it; none while it does.
    pub absent_since: Option<Seconds>,
    /// Its nodes by name.
    pub nodes: BTreeMap<String, Node>,
}

/// The tree of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tree {
    /// The pool.
    pub prefix: IpNet,
    /// Length of a conduit's prefix.
    pub conduit_length: u8,
    /// Length of a node's prefix.
    pub node_length: u8,
    /// Conduits by name.
    pub conduits: BTreeMap<String, Conduit>,
}

/// What an allocation chose; nothing is remembered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The node's prefix.
    pub node: IpNet,
    /// Whether the node is new.
    pub new_node: bool,
    /// The child's address.
    pub address: IpAddr,
    /// Whether the child is new.
    pub new_child: bool,
}

/// Why nothing could be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The conduit is not known (any more).
    UnknownConduit,
    /// The conduit has no room for another node.
    NoNode,
    /// The node has no free address.
    NoAddress,
}

impl Tree {
    /// An empty tree.
    pub fn new(prefix: IpNet, conduit_length: u8, node_length: u8) -> Self {
        Self { prefix, conduit_length, node_length, conduits: BTreeMap::new() }
    }

    /// A free prefix for a conduit that is not in the tree.
    pub fn choose_conduit(&self) -> Option<IpNet> {
        first_free(&self.prefix, self.conduit_length, self.conduits.values().map(|c| bounds(&c.prefix)))
    }

    /// The address of a child: the one it has, or the first free one, in a new node if need be.
    ///
    /// # Errors
    /// When the conduit is not known or full.
    pub fn choose(&self, conduit: &str, node: &str, child: &str) -> Result<Choice, Refusal> {
        let known = self.conduits.get(conduit).filter(|c| c.absent_since.is_none()).ok_or(Refusal::UnknownConduit)?;
        let Some(existing) = known.nodes.get(node) else {
            let taken = known.nodes.values().map(|n| bounds(&n.prefix));
            let prefix = first_free(&known.prefix, self.node_length, taken).ok_or(Refusal::NoNode)?;
            let address = free_address(&prefix, &BTreeMap::new()).ok_or(Refusal::NoAddress)?;
            return Ok(Choice { node: prefix, new_node: true, address, new_child: true });
        };
        let (address, new_child) = match existing.children.get(child) {
            Some(child) => (child.address, false),
            None => (free_address(&existing.prefix, &existing.children).ok_or(Refusal::NoAddress)?, true),
        };
        Ok(Choice { node: existing.prefix, new_node: false, address, new_child })
    }

    /// Remembers a choice, or that it was asked for again. `stored` says whether the store has the time, too.
    pub fn remember(&mut self, conduit: &str, node: &str, child: &str, choice: &Choice, now: Seconds, stored: bool) {
        let Some(conduit) = self.conduits.get_mut(conduit) else { return };
        let fresh = || Node { prefix: choice.node, updated: now, stored: now, children: BTreeMap::new() };
        let node = conduit.nodes.entry(node.to_owned()).or_insert_with(fresh);
        let fresh = Child { address: choice.address, updated: now, stored: now };
        let child = node.children.entry(child.to_owned()).or_insert(fresh);
        (node.updated, child.updated) = (now, now);
        if stored {
            (node.stored, child.stored) = (now, now);
        }
    }

    /// The older of the stored times of a child and its node.
    pub fn stored(&self, conduit: &str, node: &str, child: &str) -> Option<Seconds> {
        let node = self.conduits.get(conduit)?.nodes.get(node)?;
        Some(node.stored.min(node.children.get(child)?.stored))
    }

    /// Whether the child exists.
    pub fn has(&self, conduit: &str, node: &str, child: &str) -> bool {
        self.conduits.get(conduit).and_then(|c| c.nodes.get(node)).is_some_and(|n| n.children.contains_key(child))
    }

    /// Forgets a child; never makes anything.
    pub fn release(&mut self, conduit: &str, node: &str, child: &str) {
        if let Some(node) = self.conduits.get_mut(conduit).and_then(|c| c.nodes.get_mut(node)) {
            node.children.remove(child);
        }
    }

    /// Nodes and children that were last asked for before `limit`: a node goes with all its children, a bridge only with its node.
    pub fn stale(&self, limit: Seconds) -> Vec<Stale> {
        let mut stale = Vec::new();
        for (conduit, entry) in &self.conduits {
            for (name, node) in &entry.nodes {
                if node.updated < limit {
                    stale.push(Stale { conduit: conduit.clone(), node: name.clone(), child: None });
                    continue;
                }
                let old = node.children.iter().filter(|(child, entry)| *child != BRIDGE && entry.updated < limit);
                stale.extend(old.map(|(child, _)| Stale {
                    conduit: conduit.clone(),
                    node: name.clone(),
                    child: Some(child.clone()),
                }));
            }
        }
        stale
    }

    /// Forgets what [`Tree::stale`] found.
    pub fn remove(&mut self, stale: &Stale) {
        match &stale.child {
            Some(child) => self.release(&stale.conduit, &stale.node, child),
            None => {
                if let Some(conduit) = self.conduits.get_mut(&stale.conduit) {
                    conduit.nodes.remove(&stale.node);
                }
            }
        }
    }

    /// Overlaps, or prefixes outside their parent: what a damaged database could bring.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let conduits = self.conduits.iter().map(|(name, c)| (format!("conduit {name}"), c.prefix));
        siblings(&self.prefix, conduits.collect(), &mut faults);
        for (conduit, entry) in &self.conduits {
            let nodes = entry.nodes.iter().map(|(name, n)| (format!("conduit {conduit} node {name}"), n.prefix));
            siblings(&entry.prefix, nodes.collect(), &mut faults);
            for (node, inner) in &entry.nodes {
                let children = inner
                    .children
                    .iter()
                    .map(|(name, c)| (format!("conduit {conduit} node {node} child {name}"), c.address.into()));
                siblings(&inner.prefix, children.collect(), &mut faults);
            }
        }
        faults
    }
}

/// An entry whose lease ended; without a child the whole node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stale {
    /// Conduit.
    pub conduit: String,
    /// Node.
    pub node: String,
    /// Child; none means the node and all it has.
    pub child: Option<String>,
}

/// First and last address of a node's prefix are never given out, also with IPv6.
fn free_address(node: &IpNet, children: &BTreeMap<String, Child>) -> Option<IpAddr> {
    let (first, last) = bounds(node);
    let taken = children.values().map(|child| bounds(&child.address.into())).chain([(first, first), (last, last)]);
    first_free(node, node.max_prefix_len(), taken).map(|net| net.addr())
}

fn siblings(parent: &IpNet, mut list: Vec<(String, IpNet)>, faults: &mut Vec<String>) {
    list.sort_by_key(|(_, net)| bounds(net));
    for (name, net) in list.iter().filter(|(_, net)| !parent.contains(net)) {
        faults.push(format!("{name}: {net} is not inside {parent}"));
    }
    for pair in list.windows(2) {
        if let [(a, net_a), (b, net_b)] = pair
            && bounds(net_a).1 >= bounds(net_b).0
        {
            faults.push(format!("{a} ({net_a}) overlaps {b} ({net_b})"));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tree(pool: &str, conduit: u8, node: u8) -> Tree {
        let mut tree = Tree::new(pool.parse().unwrap(), conduit, node);
        add(&mut tree, "conduit-a");
        tree
    }

    fn add(tree: &mut Tree, name: &str) {
        let prefix = tree.choose_conduit().unwrap();
        tree.conduits.insert(name.to_owned(), Conduit { prefix, absent_since: None, nodes: BTreeMap::new() });
    }

    fn allocate(tree: &mut Tree, node: &str, child: &str, now: Seconds) -> Result<String, Refusal> {
        let choice = tree.choose("conduit-a", node, child)?;
        tree.remember("conduit-a", node, child, &choice, now, true);
        Ok(format!("{}/{}", choice.address, choice.node.prefix_len()))
    }

    #[test]
    fn addresses_of_the_original() {
        let mut v4 = tree("172.16.0.0/16", 20, 24);
        assert_eq!(allocate(&mut v4, "node-a", BRIDGE, 1).unwrap(), "172.16.0.1/24");
        assert_eq!(allocate(&mut v4, "node-a", "x-src", 1).unwrap(), "172.16.0.2/24");
        assert_eq!(allocate(&mut v4, "node-a", BRIDGE, 1).unwrap(), "172.16.0.1/24", "the same again");
        assert_eq!(allocate(&mut v4, "node-b", BRIDGE, 1).unwrap(), "172.16.1.1/24");
        v4.release("conduit-a", "node-a", "x-src");
        v4.release("conduit-a", "node-x", "x-src");
        assert_eq!(v4.conduits["conduit-a"].nodes.len(), 2, "release makes nothing");
        assert_eq!(allocate(&mut v4, "node-a", "y-src", 1).unwrap(), "172.16.0.2/24");
        add(&mut v4, "conduit-b");
        assert_eq!(v4.conduits["conduit-b"].prefix.to_string(), "172.16.16.0/20");
        assert_eq!(v4.choose("conduit-x", "n", "c"), Err(Refusal::UnknownConduit));
        let mut v6 = tree("fd00::/48", 56, 64);
        assert_eq!(allocate(&mut v6, "node-a", BRIDGE, 1).unwrap(), "fd00::1/64");
        assert_eq!(allocate(&mut v6, "node-b", BRIDGE, 1).unwrap(), "fd00:0:0:1::1/64");
    }

    #[test]
    fn full_nodes_and_conduits_refuse() {
        let mut tree = tree("10.0.0.0/24", 28, 30);
        assert_eq!(allocate(&mut tree, "n0", "a", 1).unwrap(), "10.0.0.1/30");
        assert_eq!(allocate(&mut tree, "n0", "b", 1).unwrap(), "10.0.0.2/30");
        assert_eq!(allocate(&mut tree, "n0", "c", 1), Err(Refusal::NoAddress));
        for node in ["n1", "n2", "n3"] {
            allocate(&mut tree, node, "a", 1).unwrap();
        }
        assert_eq!(allocate(&mut tree, "n4", "a", 1), Err(Refusal::NoNode));
    }

    #[test]
    fn leases() {
        let mut tree = tree("172.16.0.0/16", 20, 24);
        allocate(&mut tree, "old", BRIDGE, 10).unwrap();
        allocate(&mut tree, "kept", BRIDGE, 10).unwrap();
        allocate(&mut tree, "kept", "a", 10).unwrap();
        allocate(&mut tree, "kept", "b", 50).unwrap();
        let stale = tree.stale(50);
        let name = |s: &Stale| (s.node.clone(), s.child.clone());
        assert_eq!(
            stale.iter().map(name).collect::<Vec<_>>(),
            [("kept".to_owned(), Some("a".to_owned())), ("old".to_owned(), None)]
        );
        stale.iter().for_each(|s| tree.remove(s));
        assert!(tree.has("conduit-a", "kept", BRIDGE) && !tree.has("conduit-a", "old", BRIDGE));
    }

    proptest! {
        #[test]
        fn any_history_is_free_of_overlaps_and_idempotent(steps in proptest::collection::vec((0u8..3, 0u8..40, any::<bool>()), 1..300)) {
            let mut tree = tree("10.0.0.0/20", 24, 27);
            for (node, child, release) in steps {
                let (node, child) = (format!("n{node}"), format!("c{child}"));
                if release {
                    tree.release("conduit-a", &node, &child);
                } else if let Ok(first) = allocate(&mut tree, &node, &child, 1) {
                    prop_assert_eq!(allocate(&mut tree, &node, &child, 2), Ok(first));
                } else {
                    // 30 usable addresses: a refusal means that all are held.
                    prop_assert_eq!(tree.conduits["conduit-a"].nodes[&node].children.len(), 30);
                }
                prop_assert_eq!(tree.faults(), Vec::<String>::new());
            }
        }
    }
}
