//! Whether a connection whose client has stopped refreshing still works, so that its expiry must not cut it.

use nsm_chain::{
    CloseCall, Connection, Element, Error, Mechanism, Next, RequestCall,
    elements::{kernel_mechanism::INODE_URL, timeout::KeepAlive},
    path,
};
use nsm_kernel::{Netns, ping};
use nsm_registry::elements::descriptors::parse_inode;
use std::{
    collections::HashMap,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// What one echo may take, and how many are sent before the data path counts as dead.
const PROBE: Duration = Duration::from_secs(1);
const PROBES: u32 = 3;

/// The namespaces of the connections of a forwarder, by the id of its path segment. Device and inode only: nothing here keeps
/// the namespace of a dead pod.
#[derive(Clone, Debug, Default)]
pub struct Ends(Arc<Mutex<HashMap<String, End>>>);

/// Device and inode of a namespace.
type Inode = (u64, u64);

#[derive(Clone, Debug, Default)]
struct End {
    client: Option<Inode>,
    endpoint: Option<Inode>,
}

impl Ends {
    fn update(&self, id: &str, change: impl FnOnce(&mut End)) {
        let mut ends = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(ends.entry(id.to_owned()).or_default());
    }

    fn remove(&self, id: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    fn get(&self, id: &str) -> Option<End> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// The element for below the server's `mechanisms`: notes the client's namespace.
    pub fn client(&self) -> impl Element + use<> {
        Note { ends: self.clone(), set: |end, inode| end.client = inode, last: true }
    }

    /// The element for right below `mechanismtranslation`.
    pub fn without_namespace(&self) -> WithoutNamespace {
        WithoutNamespace(self.clone())
    }

    /// The element for below `mechanismtranslation`: notes the endpoint's namespace.
    pub fn endpoint(&self) -> impl Element + use<> {
        Note { ends: self.clone(), set: |end, inode| end.endpoint = inode, last: false }
    }
}

struct Note {
    ends: Ends,
    set: fn(&mut End, Option<Inode>),
    /// Forgets the connection at its close.
    last: bool,
}

/// Below `recvfd` a namespace is the URL of an open file, as long as the operation lasts.
fn namespace(mechanism: Option<&Mechanism>) -> Option<Inode> {
    let url = mechanism?.parameters.get(INODE_URL)?;
    let found = std::fs::metadata(url.strip_prefix("file://")?).ok()?;
    Some((found.dev(), found.ino()))
}

/// Stands below `mechanismtranslation`, which remembers the mechanism of the endpoint's side: takes the URL of the
/// namespace out of it, whose file is closed by then. The endpoint names its namespace again in each answer. For a close it is opened once
/// more, so that it can be sent along: an endpoint made of NSM's Go SDK waits for the descriptor before it closes anything.
#[derive(Clone, Debug)]
pub struct WithoutNamespace(Ends);

fn strip(mechanism: Option<&mut Mechanism>) {
    if let Some(mechanism) = mechanism {
        mechanism.parameters.retain(|key, url| key != INODE_URL || !url.starts_with("file:"));
    }
}

#[async_trait::async_trait]
impl Element for WithoutNamespace {
    fn name(&self) -> &'static str {
        "withoutnamespace"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        strip(call.connection_mut().mechanism.as_mut());
        next.request(call).await
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        strip(call.message.mechanism.as_mut());
        let id = call.id().to_owned();
        if let Some(mechanism) = &mut call.message.mechanism
            && let Some(inode) = self.0.get(&id).and_then(|end| end.endpoint)
            && let Some(path) = find(inode).await
        {
            mechanism.parameters.insert(INODE_URL.to_owned(), format!("file://{}", path.display()));
        }
        next.close(call).await
    }
}

#[async_trait::async_trait]
impl Element for Note {
    fn name(&self) -> &'static str {
        "ends"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let connection = next.request(call).await?;
        let inode = namespace(connection.mechanism.as_ref());
        self.ends.update(&connection.id, |end| (self.set)(end, inode));
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let id = call.id().to_owned();
        let result = next.close(call).await;
        if self.last {
            self.ends.remove(&id);
        }
        result
    }
}

/// Answers `timeout`'s question, for the manager or the forwarder of a node.
pub struct Alive {
    ends: Ends,
    /// Where the forwarder's segment is, seen from whoever asks.
    offset: isize,
}

impl Alive {
    /// For the manager: the forwarder is the next hop.
    pub fn manager(ends: Ends) -> Self {
        Self { ends, offset: 1 }
    }

    /// For the forwarder itself.
    pub fn forwarder(ends: Ends) -> Self {
        Self { ends, offset: 0 }
    }
}

#[async_trait::async_trait]
impl KeepAlive for Alive {
    async fn keep(&self, connection: &Connection) -> bool {
        let client = connection.mechanism.as_ref().and_then(|mechanism| mechanism.parameters.get(INODE_URL));
        if let Some(inode) = client.and_then(|url| parse_inode(url))
            && find(inode).await.is_none()
        {
            tracing::info!(id = connection.id, "the client's network namespace is gone");
            return false;
        }
        let id = path::segment(connection, self.offset).map_or("", |segment| &segment.id);
        let Some(end) = self.ends.get(id) else { return true };
        let context = connection.context.as_ref().and_then(|context| context.ip_context.clone()).unwrap_or_default();
        let (from, sources, destinations) = match (end.client, end.endpoint) {
            (Some(client), _) => (client, context.src_ip_addrs, context.dst_ip_addrs),
            (None, Some(endpoint)) => (endpoint, context.dst_ip_addrs, context.src_ip_addrs),
            (None, None) => return true,
        };
        answers(from, &pairs(&sources, &destinations)).await
    }
}

/// Every address of ours with every one of theirs, of the same family.
fn pairs(ours: &[String], theirs: &[String]) -> Vec<(IpAddr, IpAddr)> {
    let parse = |text: &String| text.split('/').next().and_then(|ip| ip.parse::<IpAddr>().ok());
    let theirs: Vec<IpAddr> = theirs.iter().filter_map(parse).collect();
    ours.iter()
        .filter_map(parse)
        .flat_map(|own| theirs.iter().map(move |other| (own, *other)))
        .filter(|(own, other)| own.is_ipv4() == other.is_ipv4())
        .collect()
}

/// Whether any pair answers. A connection without addresses, or a namespace that cannot be entered, proves nothing.
async fn answers(namespace: Inode, pairs: &[(IpAddr, IpAddr)]) -> bool {
    let Some(path) = find(namespace).await else { return false };
    let Ok(netns) = Netns::from_path(path) else { return true };
    for _ in 0..PROBES {
        for (own, other) in pairs {
            if ping::probe(&netns, Some(*own), *other, PROBE).await {
                return true;
            }
        }
    }
    pairs.is_empty()
}

/// A way to a namespace that is in use: a process lives in it or a name (`ip netns`) holds it.
async fn find(inode: Inode) -> Option<PathBuf> {
    let search = move || {
        let is = |file: &PathBuf| std::fs::metadata(file).is_ok_and(|found| (found.dev(), found.ino()) == inode);
        let entries = |folder: &str| std::fs::read_dir(folder).into_iter().flatten().flatten();
        let named = entries("/run/netns").map(|entry| entry.path());
        let process = |name: &std::ffi::OsStr| name.to_string_lossy().starts_with(|first: char| first.is_ascii_digit());
        let lived_in =
            entries("/proc").filter(|entry| process(&entry.file_name())).map(|entry| entry.path().join("ns/net"));
        named.chain(lived_in).find(is)
    };
    tokio::task::spawn_blocking(search).await.ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_chain::{ConnectionContext, IpContext, Path, PathSegment};
    use nsm_kernel::netlink::{LinkChange, VethEnd, mac_from_seed};

    #[tokio::test]
    async fn a_namespace_is_in_use_while_a_process_is_in_it() {
        let own = std::fs::metadata("/proc/self/ns/net").unwrap();
        assert!(find((own.dev(), own.ino())).await.is_some());
        let id = Netns::anonymous().unwrap().id();
        assert!(find((id.dev, id.ino)).await.is_none());
    }

    /// A namespace that a process lives in, as a pod's is.
    struct Pod(Netns, std::process::Child);

    impl Pod {
        async fn new() -> Self {
            let netns = Netns::anonymous().unwrap();
            let sleep = || std::process::Command::new("sleep").arg("1000").spawn().unwrap();
            let child = netns.run(sleep).await.unwrap();
            Self(netns, child)
        }

        fn inode(&self) -> Inode {
            (self.0.id().dev, self.0.id().ino)
        }

        fn die(&mut self) {
            self.1.kill().unwrap();
            self.1.wait().unwrap();
        }
    }

    impl Drop for Pod {
        fn drop(&mut self) {
            let _ = self.1.kill();
            let _ = self.1.wait();
        }
    }

    async fn set_up(netns: &Netns, name: &str, address: &str, up: bool) {
        let netlink = netns.netlink().await.unwrap();
        let index = netlink.link_by_name(name).await.unwrap().unwrap().index;
        netlink.link_change(index, &LinkChange { up: Some(up), ..Default::default() }).await.unwrap();
        netlink.address_replace(index, address.parse().unwrap()).await.unwrap();
    }

    async fn joined() -> (Pod, Pod) {
        let (client, endpoint) = (Pod::new().await, Pod::new().await);
        let end = |pod: &Pod, name: &str| VethEnd { netns: pod.0.clone(), name: name.into(), mac: mac_from_seed(name) };
        let netlink = client.0.netlink().await.unwrap();
        netlink.veth_create(&end(&client, "nsm-0"), &end(&endpoint, "svc-1"), None).await.unwrap();
        set_up(&client.0, "nsm-0", "10.1.0.2/24", true).await;
        set_up(&endpoint.0, "svc-1", "10.1.0.1/24", true).await;
        (client, endpoint)
    }

    /// What the process at `index` of the path knows of the connection.
    fn connection(index: u32, client: Option<Inode>) -> Connection {
        let segment = |id: &&str| PathSegment { id: (*id).into(), ..Default::default() };
        let ip = IpContext {
            src_ip_addrs: vec!["10.1.0.2/24".into()],
            dst_ip_addrs: vec!["10.1.0.1/24".into()],
            ..Default::default()
        };
        let url = client.map(|(dev, ino)| (INODE_URL.to_owned(), format!("inode://{dev}/{ino}")));
        Connection {
            path: Some(Path { index, path_segments: ["nsc", "mgr", "fwd", "nse"].iter().map(segment).collect() }),
            mechanism: Some(Mechanism { parameters: url.into_iter().collect(), ..Default::default() }),
            context: Some(ConnectionContext { ip_context: Some(ip), ..Default::default() }),
            ..Default::default()
        }
    }

    /// Both the manager, which finds the forwarder's knowledge behind itself on the path, and the forwarder.
    #[tokio::test]
    async fn a_connection_is_kept_while_its_data_path_answers_and_its_namespace_is_in_use() {
        let (mut client, endpoint) = joined().await;
        let ends = Ends::default();
        let askers = [(1, Alive::manager(ends.clone())), (2, Alive::forwarder(ends.clone()))];
        let keeps = async |inode| {
            let mut answers = Vec::new();
            for (index, alive) in &askers {
                answers.push(alive.keep(&connection(*index, inode)).await);
            }
            answers
        };
        let inode = Some(client.inode());
        assert_eq!(keeps(inode).await, [true, true], "nothing is known of it: nothing says that it is dead");
        // Asked from the client's side, and from the endpoint's where the client is on another node.
        for (here, there) in [(inode, Some(endpoint.inode())), (None, Some(endpoint.inode()))] {
            ends.update("fwd", |end| *end = End { client: here, endpoint: there });
            assert_eq!(keeps(here).await, [true, true], "{here:?}");
        }
        ends.update("fwd", |end| *end = End { client: inode, endpoint: Some(endpoint.inode()) });
        let silent = LinkChange { up: Some(false), ..Default::default() };
        let netlink = endpoint.0.netlink().await.unwrap();
        let index = netlink.link_by_name("svc-1").await.unwrap().unwrap().index;
        netlink.link_change(index, &silent).await.unwrap();
        assert_eq!(keeps(inode).await, [false, false], "the data path is dead");
        netlink.link_up(index).await.unwrap();
        assert_eq!(keeps(inode).await, [true, true], "and alive again");
        client.die();
        assert_eq!(keeps(inode).await, [false, false], "nobody is there any more");
        assert_eq!(keeps(None).await, [false, false], "nobody is there, as the forwarder knows");
        ends.remove("fwd");
        assert_eq!(keeps(None).await, [true, true]);
    }

    #[test]
    fn families_do_not_mix() {
        let found = pairs(&["10.0.0.1/24".into(), "fd00::1/64".into()], &["10.0.0.2/24".into(), "fd00::2/64".into()]);
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|(own, other)| own.is_ipv4() == other.is_ipv4()));
    }
}
