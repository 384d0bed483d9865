//! What the interfaces of a connection are recognised by; and under which aliases of ours a namespace has no interface, so that a
//! new wire does not have to look at every other one.
//!
//! Interfaces with such an alias are made by this process, or were made by a former run of it. So a namespace is listed once; an
//! alias that was not there then, and that nobody here has used since, is absent. Everything else may be there, and is looked for.

use crate::{NetnsId, netlink::Link};
use std::{
    collections::{HashMap, HashSet},
    fmt,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

const CLIENT: &str = "server-";
const ENDPOINT: &str = "client-";
/// An id that is longer, or that has other characters than an alias should, is written as its hash.
const ID_MAX: usize = 64;

/// What the interfaces of one connection are called, by its ids on the path.
///
/// The client's end has the alias `server-<id>/<asker>` and the endpoint's end `client-<id>/<asker>`. `id` is the forwarder's own
/// id of the connection: random, the same over restarts because clients send their path again, and out of reach of other clients.
/// `asker` is the id by which the connection is known to whoever has asked the forwarder's manager. Clients choose it, and two of
/// them may choose the same. It only helps one that asks for its connection anew, without the path: what is in its own
/// namespace under its own id is handed on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    id: String,
    asker: String,
    /// Id of the first path segment: an alias had nothing else in former versions.
    first: String,
    anew: bool,
}

impl Names {
    /// The names of a connection whose interfaces are made, or found again by their full alias.
    pub fn new(id: &str, asker: &str, first: &str) -> Self {
        Self { id: written(id), asker: written(asker), first: first.to_owned(), anew: false }
    }

    /// The same for a connection that is new here: it inherits what an earlier one of the same client has left.
    #[must_use]
    pub fn anew(mut self, anew: bool) -> Self {
        self.anew = anew;
        self
    }

    fn alias(&self, prefix: &'static str) -> Alias {
        let heir = self.anew.then(|| (format!("/{}", self.asker), self.first.clone()));
        Alias { text: format!("{prefix}{}/{}", self.id, self.asker), prefix, heir }
    }

    /// Alias of the interface on the client's side.
    pub fn client(&self) -> Alias {
        self.alias(CLIENT)
    }

    /// Alias of the interface on the endpoint's side.
    pub fn endpoint(&self) -> Alias {
        self.alias(ENDPOINT)
    }

    /// Alias that former versions gave to the interface on the client's side.
    pub(crate) fn former(&self) -> String {
        format!("{CLIENT}{}", self.first)
    }
}

fn written(id: &str) -> String {
    let plain = |c: char| c.is_ascii_graphic() && c != '/';
    if id.len() <= ID_MAX && id.chars().all(plain) { id.to_owned() } else { format!("{:016x}", hash(id)) }
}

/// The alias of one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alias {
    /// The alias itself.
    pub text: String,
    prefix: &'static str,
    /// How the aliases end, or what follows the prefix, of what may be inherited.
    heir: Option<(String, String)>,
}

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Alias {
    /// Whether it is this one.
    pub fn is(&self, alias: &str) -> bool {
        self.text == alias
    }

    /// Whether an earlier connection of the same client may have had it.
    pub(crate) fn was(&self, alias: &str) -> bool {
        let Some((kin, former)) = &self.heir else { return false };
        alias.strip_prefix(self.prefix).is_some_and(|rest| rest == former || rest.ends_with(kin))
    }

    /// Whether an interface with this alias is in the way and may go. In its own namespace that is for the client to say; in the
    /// endpoint's there may be those of other clients that call their connections alike.
    pub(crate) fn replaces(&self, alias: &str) -> bool {
        self.is(alias) || self.prefix == CLIENT && self.was(alias)
    }

    /// The alias that this end has if the other end, which is `other`'s, is inherited under the alias `found`.
    pub(crate) fn counterpart(&self, other: &Alias, found: &str) -> Option<String> {
        let rest = found.strip_prefix(other.prefix).filter(|_| other.was(found))?;
        Some(format!("{}{rest}", self.prefix))
    }

    /// Whether the namespace certainly has no interface that it names.
    pub(crate) fn absent(&self, netns: NetnsId) -> bool {
        let inherited = self
            .heir
            .iter()
            .flat_map(|(kin, former)| [format!("{}{kin}", self.prefix), format!("{}{former}", self.prefix)]);
        absent(netns, &self.text) && inherited.into_iter().all(|alias| absent(netns, &alias))
    }
}

/// What is noted of an alias: itself, and what an heir looks for.
fn noted(alias: &str) -> impl Iterator<Item = u64> + use<> {
    let kin = [CLIENT, ENDPOINT].into_iter().find(|prefix| alias.starts_with(prefix)).zip(alias.rfind('/'));
    [Some(hash(alias)), kin.map(|(prefix, at)| hash(&format!("{prefix}{}", &alias[at..])))].into_iter().flatten()
}

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
    let aliases = links.iter().filter(|link| !link.alias.is_empty()).flat_map(|link| noted(&link.alias));
    used.entry(netns).or_default().extend(aliases);
}

/// An interface with this alias is about to be made.
pub(crate) fn using(netns: NetnsId, alias: &str) {
    if let Some(aliases) = used().get_mut(&netns) {
        aliases.extend(noted(alias));
    }
}

/// The interface with this alias was removed.
pub(crate) fn removed(netns: NetnsId, alias: &str) {
    if let Some(aliases) = used().get_mut(&netns) {
        noted(alias).for_each(|hash| _ = aliases.remove(&hash));
    }
}
