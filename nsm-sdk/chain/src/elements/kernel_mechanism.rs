//! The mechanism KERNEL: an interface in a network namespace.

use crate::{CloseCall, Connection, Element, Error, Key, Mechanism, Next, RequestCall, Side, core::inode_of};
use rand::{Rng, distr::Alphanumeric};
use rustix::fs::{Mode, OFlags};
use std::{
    collections::{BTreeMap, HashMap},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Type of the mechanism.
pub const KERNEL: &str = "KERNEL";
/// Class of mechanisms within one node.
pub const LOCAL: &str = "LOCAL";
/// Class of mechanisms between nodes.
pub const REMOTE: &str = "REMOTE";
/// Parameter: URL of the network namespace.
pub const INODE_URL: &str = "inodeURL";
/// Parameter: name of the interface.
pub const NAME: &str = "name";
/// URL of this process's own namespace.
pub const OWN_NETNS: &str = "file:///proc/thread-self/ns/net";
/// Longest name of an interface, in bytes.
pub const NAME_LIMIT: usize = 15;

/// The start of `name` that fits into an interface name.
pub fn limit(name: &str) -> &str {
    name.get(..NAME_LIMIT.min(name.len())).unwrap_or_else(|| {
        let end = (0..NAME_LIMIT).rev().find(|&end| name.is_char_boundary(end)).unwrap_or(0);
        &name[..end]
    })
}

/// A name for an interface to `service`: its first 10 bytes, a dash, and random letters and digits, as NSM names it.
pub fn random_name(service: &str) -> String {
    name_from(service, rand::rng().sample_iter(Alphanumeric).map(char::from))
}

/// The same name for the same service and id, everywhere and always; another one for each `number` (hash: FNV-1a).
fn name_of(service: &str, id: &str, number: u8) -> String {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let mut hash = id.bytes().chain([number]).fold(0xcbf2_9ce4_8422_2325, step);
    let digits = std::iter::repeat_with(|| {
        hash = step(hash, 0);
        char::from(DIGITS[(hash >> 32) as usize % DIGITS.len()])
    });
    name_from(service, digits)
}

fn name_from(service: &str, characters: impl Iterator<Item = char>) -> String {
    let end = (0..=10.min(service.len())).rev().find(|&end| service.is_char_boundary(end)).unwrap_or(0);
    let mut name = format!("{}-", service[..end].replace(['/', ' '], "-"));
    let missing = NAME_LIMIT - name.len();
    name.extend(characters.take(missing));
    name
}

/// Replaces an `inode://` URL of this process's own namespace by one that `sendfd` can open.
pub fn own_netns_again(connection: &mut Connection) {
    let Some(mechanism) = connection.mechanism.as_mut().filter(|mechanism| mechanism.r#type == KERNEL) else { return };
    let Some(url) = mechanism.parameters.get_mut(INODE_URL) else { return };
    if open(OWN_NETNS).and_then(inode_of).is_ok_and(|(dev, ino)| *url == format!("inode://{dev}/{ino}")) {
        *url = OWN_NETNS.to_owned();
    }
}

/// A descriptor (`O_PATH`) of the file that a `file://` URL names.
pub(crate) fn open(url: &str) -> std::io::Result<OwnedFd> {
    let path = url.strip_prefix("file://").unwrap_or(url);
    Ok(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
}

/// Offers an interface in this process's namespace.
#[derive(Clone, Debug, Default)]
pub struct KernelClient {
    interface: Option<String>,
    /// Whose each name is that was made up.
    given: Arc<Mutex<HashMap<String, String>>>,
}

impl KernelClient {
    /// Names interfaces after their service and the id of their connection: the same name after a restart, also of everybody who might
    /// remember it. (To rename an interface, kernels before 6.2 take it down.)
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives each interface this name, cut to 15 bytes.
    pub fn with_name(name: &str) -> Self {
        Self { interface: Some(limit(name).to_owned()), ..Self::default() }
    }

    /// The name, and whether it was given just now.
    fn made_up(&self, service: &str, id: &str) -> (String, bool) {
        let mut given = self.given();
        let free = |name: &String| given.get(name).is_none_or(|other| other == id);
        let name = (0..ATTEMPTS).map(|number| name_of(service, id, number)).find(free);
        let name = name.unwrap_or_else(|| random_name(service));
        let new = given.insert(name.clone(), id.to_owned()).is_none();
        (name, new)
    }

    /// Gives up the name of a connection that is none.
    fn take_back(&self, service: &str, id: &str) {
        let mut given = self.given();
        for name in (0..ATTEMPTS).map(|number| name_of(service, id, number)) {
            if given.get(&name).is_some_and(|other| other == id) {
                given.remove(&name);
                break;
            }
        }
    }

    fn given(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// So many names are tried for a connection before one is made up at random.
const ATTEMPTS: u8 = 16;

/// Own namespace, and the name that `name` makes up if there is none.
fn complete(parameters: &mut BTreeMap<String, String>, name: impl FnOnce() -> String) {
    parameters.insert(INODE_URL.into(), OWN_NETNS.into());
    if parameters.get(NAME).is_none_or(String::is_empty) {
        parameters.insert(NAME.into(), name());
    }
}

#[async_trait::async_trait]
impl Element for KernelClient {
    fn name(&self) -> &'static str {
        "kernel"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let (service, id) = (call.connection().network_service.clone(), call.id().to_owned());
        // One that has its mechanism already is taken up after a restart.
        let established = call.connection().mechanism.is_some();
        let preferences = &mut call.message.mechanism_preferences;
        if !preferences.iter().any(|preference| preference.r#type == KERNEL) {
            preferences.push(Mechanism { cls: LOCAL.into(), r#type: KERNEL.into(), ..Default::default() });
        }
        let mut new = false;
        let mut made_up = || {
            let (name, first) = self.made_up(&service, &id);
            new |= first;
            name
        };
        for preference in preferences.iter_mut().filter(|preference| preference.r#type == KERNEL) {
            complete(&mut preference.parameters, || self.interface.clone().unwrap_or_else(&mut made_up));
        }
        let result = next.request(call).await;
        // A refresh that fails leaves the connection as it is.
        if new && !established && result.is_err() {
            self.take_back(&service, &id);
        }
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let (service, id) = (call.message.network_service.clone(), call.id().to_owned());
        let result = next.close(call).await;
        self.take_back(&service, &id);
        result
    }
}

/// Accepts an interface in this process's namespace. Others make it.
///
/// A name that was made up stays with its connection: a forwarder that has forgotten it (restart) finds its interface again.
#[derive(Clone, Debug)]
pub struct KernelServer {
    interface: Option<String>,
    given: Key<String>,
}

impl Default for KernelServer {
    fn default() -> Self {
        Self::new()
    }
}

impl KernelServer {
    /// Names interfaces after their service.
    pub fn new() -> Self {
        Self { interface: None, given: Key::new(Side::Server) }
    }

    /// Gives each interface this name, cut to 15 bytes.
    pub fn with_name(name: &str) -> Self {
        Self { interface: Some(limit(name).to_owned()), ..Self::new() }
    }
}

#[async_trait::async_trait]
impl Element for KernelServer {
    fn name(&self) -> &'static str {
        "kernel"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata.clone();
        let connection = call.connection_mut();
        let service = connection.network_service.clone();
        let Some(mechanism) = connection.mechanism.as_mut().filter(|mechanism| mechanism.r#type == KERNEL) else {
            return next.request(call).await;
        };
        let given = metadata.as_ref().and_then(|metadata| metadata.get(&self.given));
        if let Some(name) = given.filter(|_| mechanism.parameters.get(NAME).is_none_or(String::is_empty)) {
            mechanism.parameters.insert(NAME.into(), name);
        }
        complete(&mut mechanism.parameters, || self.interface.clone().unwrap_or_else(|| random_name(&service)));
        let name = mechanism.parameters.get(NAME).cloned();
        let connection = next.request(call).await?;
        if let (Some(metadata), Some(name)) = (metadata, name) {
            metadata.insert(&self.given, name);
        }
        Ok(connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context,
        core::testing::{Spy, request_id, request_with},
    };
    use std::sync::Arc;

    async fn offered(client: KernelClient, preferences: Vec<Mechanism>) -> Vec<Mechanism> {
        let spy = Arc::new(Spy::default());
        let mut call = request_id("c", Context::new());
        call.connection_mut().network_service = "conduit-a-1.trench".into();
        call.message.mechanism_preferences = preferences;
        Chain::builder().element(client).element(spy.clone()).build().request(call).await.unwrap();
        spy.last_request().mechanism_preferences
    }

    // Conformance 86
    #[tokio::test]
    async fn names_are_kept_limited_or_random() {
        let random = offered(KernelClient::new(), vec![]).await;
        assert_eq!((random.len(), random[0].cls.as_str()), (1, LOCAL));
        assert_eq!(random[0].parameters[INODE_URL], OWN_NETNS);
        let name = &random[0].parameters[NAME];
        assert!(name.starts_with("conduit-a--") && name.len() == 15, "{name}");

        let limited = offered(KernelClient::with_name("an-interface-name-too-long"), vec![]).await;
        assert_eq!(limited[0].parameters[NAME], "an-interface-na");

        let own = [(NAME.to_owned(), "nsm-1".to_owned())].into();
        let given = Mechanism { r#type: KERNEL.into(), parameters: own, ..Default::default() };
        let given = offered(KernelClient::with_name("other"), vec![given]).await;
        assert_eq!((given.len(), given[0].parameters[NAME].as_str()), (1, "nsm-1"));
    }

    #[tokio::test]
    async fn a_name_that_was_made_up_is_the_same_after_a_restart_and_nobody_elses() {
        let run = |client: KernelClient| {
            let spy = Arc::new(Spy::default());
            let chain = Chain::builder().element(client).element(spy.clone()).build();
            async move |id: &str| {
                let mut call = request_id(id, Context::new());
                call.connection_mut().network_service = "svc".into();
                chain.request(call).await.unwrap();
                let name = spy.last_request().mechanism_preferences[0].parameters[NAME].clone();
                (chain.clone(), name)
            }
        };
        let (first, second) = (run(KernelClient::new()), run(KernelClient::new()));
        let (_, name) = first("a").await;
        assert_eq!((first("a").await.1, second("a").await.1), (name.clone(), name.clone()));
        assert!(name.starts_with("svc-") && name.len() == NAME_LIMIT && first("b").await.1 != name, "{name}");
        assert_eq!(name_of("conduit-a-1.trench", "lb-1", 0), "conduit-a--KLqB", "also by another version");

        // Two ids whose names are equal, as among some thousand there are: the later one gets another.
        let long = "conduit-a-1";
        let mut names = HashMap::new();
        let (one, other) =
            (0..100_000).find_map(|n: u32| Some((names.insert(name_of(long, &n.to_string(), 0), n)?, n))).unwrap();
        let client = KernelClient::new();
        let [one, other] = [one, other].map(|n| n.to_string());
        let (shared, _) = client.made_up(long, &one);
        assert_ne!(client.made_up(long, &other).0, shared);
        assert_eq!(client.made_up(long, &one), (shared.clone(), false));
        let connection = Connection { id: one, network_service: long.into(), ..Default::default() };
        let chain = Chain::builder().element(client.clone()).build();
        chain.close(CloseCall::new(connection, Context::new())).await.unwrap();
        assert_eq!(client.made_up(long, &other).0, shared, "free again");
    }

    #[tokio::test]
    async fn a_connection_that_fails_at_first_keeps_no_name() {
        let (client, spy) = (KernelClient::new(), Arc::new(Spy::default()));
        let chain = Chain::builder().element(client.clone()).element(spy.clone()).build();
        spy.fail_requests(true);
        chain.request(request_id("c", Context::new())).await.unwrap_err();
        assert!(client.given().is_empty());
        spy.fail_requests(false);
        chain.request(request_id("c", Context::new())).await.unwrap();
        spy.fail_requests(true);
        chain.request(request_id("c", Context::new())).await.unwrap_err();
        assert_eq!(client.given().len(), 1, "a refresh that fails");
    }

    // Conformance 91
    #[test]
    fn random_names_differ_and_fit() {
        let names: std::collections::HashSet<_> = (0..1000).map(|_| random_name("ééééééééé")).collect();
        // Four characters of 62: in 3 of 100 runs two of a thousand names are equal, ten never.
        assert!(names.len() > 990, "{}", names.len());
        assert!(names.iter().all(|name| name.len() == NAME_LIMIT));
        assert_eq!(limit("ééééééééé").len(), 14);
    }

    // Conformance 86
    #[tokio::test]
    async fn the_server_completes_the_mechanism() {
        let chain = Chain::builder().element(KernelServer::new()).build();
        let mechanism = Some(Mechanism { r#type: KERNEL.into(), ..Default::default() });
        let connection = Connection { id: "c".into(), network_service: "svc".into(), mechanism, ..Default::default() };
        let connection = chain.request(request_with(connection)).await.unwrap();
        let parameters = connection.mechanism.unwrap().parameters;
        assert_eq!(parameters[INODE_URL], OWN_NETNS);
        assert!(parameters[NAME].starts_with("svc-"));
    }

    #[tokio::test]
    async fn a_made_up_name_stays_with_its_connection() {
        let metadata = crate::elements::metadata::MetadataElement::new();
        let chain = Chain::builder().element(metadata).element(KernelServer::new()).build();
        let request = async |id: &str, name: Option<&str>| {
            let parameters = name.map(|name| (NAME.to_owned(), name.to_owned())).into_iter().collect();
            let mechanism = Some(Mechanism { r#type: KERNEL.into(), parameters, ..Default::default() });
            let connection =
                Connection { id: id.into(), network_service: "svc".into(), mechanism, ..Default::default() };
            chain.request(request_with(connection)).await.unwrap().mechanism.unwrap().parameters[NAME].clone()
        };
        let first = request("c", None).await;
        assert_eq!(request("c", None).await, first);
        assert_ne!(request("d", None).await, first);
        assert_eq!(request("c", Some("nsm-1")).await, "nsm-1");
        assert_eq!(request("c", None).await, "nsm-1");
    }

    #[test]
    fn the_own_namespace_is_recognised() {
        let (dev, ino) = inode_of(open(OWN_NETNS).unwrap()).unwrap();
        for (sent, expected) in [(format!("inode://{dev}/{ino}"), OWN_NETNS), ("inode://4/1".into(), "inode://4/1")] {
            let parameters = [(INODE_URL.to_owned(), sent)].into();
            let mechanism = Some(Mechanism { r#type: KERNEL.into(), parameters, ..Default::default() });
            let mut connection = Connection { mechanism, ..Default::default() };
            own_netns_again(&mut connection);
            assert_eq!(connection.mechanism.unwrap().parameters[INODE_URL], expected);
        }
    }
}
