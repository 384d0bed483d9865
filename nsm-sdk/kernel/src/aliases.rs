//! Under which aliases of ours a namespace has no interface, so that a new wire does not have to look at every other one.
//!
//! Interfaces with such an alias are made by this process, or were made by a former run of it. So a namespace is listed once; an
//! alias that was not there then, and that nobody here has used since, is absent. Everything else may be there, and is looked for.

use crate::{NetnsId, netlink::Link};
use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

/// Namespaces come and go without a word; beyond so many all are forgotten, and each is listed once more.
const NAMESPACES: usize = 4096;

/// The aliases that may be in use, by namespace.
static USED: LazyLock<Mutex<HashMap<NetnsId, HashSet<u64>>>> = LazyLock::new(Mutex::default);

fn used() -> MutexGuard<'static, HashMap<NetnsId, HashSet<u64>>> {
    USED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Two aliases of one hash are taken for one, which costs a look.
fn hash(alias: &str) -> u64 {
    BuildHasherDefault::<DefaultHasher>::default().hash_one(alias)
}

/// Whether the namespace certainly has no interface with this alias.
pub(crate) fn absent(netns: NetnsId, alias: &str) -> bool {
    used().get(&netns).is_some_and(|aliases| !aliases.contains(&hash(alias)))
}

/// All interfaces of the namespace were seen.
pub(crate) fn listed(netns: NetnsId, links: &[Link]) {
    let mut used = used();
    if used.len() >= NAMESPACES && !used.contains_key(&netns) {
        used.clear();
    }
    let aliases = links.iter().filter(|link| !link.alias.is_empty()).map(|link| hash(&link.alias));
    used.entry(netns).or_default().extend(aliases);
}

/// An interface with this alias is about to be made.
pub(crate) fn using(netns: NetnsId, alias: &str) {
    if let Some(aliases) = used().get_mut(&netns) {
        aliases.insert(hash(alias));
    }
}

/// The interface with this alias was removed.
pub(crate) fn removed(netns: NetnsId, alias: &str) {
    if let Some(aliases) = used().get_mut(&netns) {
        aliases.remove(&hash(alias));
    }
}
