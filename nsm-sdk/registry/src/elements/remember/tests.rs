use super::*;
use crate::{Chain, Context, elements::memory::Memory, store::MemoryStore};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::gettid,
};
use std::{collections::BTreeMap, os::unix::net::UnixListener, sync::mpsc};

const MANAGER: &str = "tcp://m";
const OWNER: &str = "spiffe://example.org/nse";

/// One run of a manager: over the registry above, with what the store has kept.
struct Run {
    chain: Chain<NetworkServiceEndpoint>,
    remember: Arc<Remember>,
    bypass: Arc<LocalBypass>,
    sockets: RecvFdServer,
    owners: Owners<NetworkServiceEndpoint>,
}

impl Run {
    fn new(above: &Arc<dyn Element<NetworkServiceEndpoint>>, kept: &Arc<dyn Store>) -> Self {
        let (remember, bypass) = (Arc::new(Remember::new(Some(kept.clone()))), Arc::new(LocalBypass::new(MANAGER)));
        let chain = Chain::new(vec![remember.clone(), bypass.clone(), above.clone()]);
        Self { chain, remember, bypass, sockets: RecvFdServer::default(), owners: Owners::default() }
    }

    async fn recall(&self) -> Vec<String> {
        self.remember.recall(&self.sockets, &self.bypass, &self.owners).await.unwrap()
    }

    async fn register(&self, name: &str, url: &str, pid: i32, life: Duration) {
        let mut endpoint = NetworkServiceEndpoint {
            name: name.into(),
            url: url.into(),
            path_ids: vec![OWNER.into(), "spiffe://example.org/m".into()],
            ..Default::default()
        };
        endpoint.set_expiration(Some(clock::now() + life));
        let ctx = Context { pid: Some(pid), ..Context::new() };
        self.chain.register(Call::new(endpoint, ctx)).await.unwrap();
    }

    /// Name and URL of what is found.
    async fn found(&self) -> BTreeMap<String, String> {
        let all = self.chain.list(NetworkServiceEndpoint::default(), Context::new()).await.unwrap();
        all.into_iter().map(|endpoint| (endpoint.name, endpoint.url)).collect()
    }
}

/// As `recvfd` holds the socket of an endpoint, and the URL it gives it.
fn held(path: &Path) -> (OwnedFd, String) {
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let url = format!("unix:///proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
    (fd, url)
}

/// A listening socket that no other thread sees at its path, but in a file system that only the thread has; the thread's id, and
/// what ends it.
fn elsewhere(folder: &Path) -> (OwnedFd, String, i32, mpsc::Sender<()>) {
    let (ready, started) = mpsc::channel();
    let (stop, stopped) = mpsc::channel::<()>();
    let folder = folder.to_owned();
    std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(none, &folder, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        let path = folder.join("listen.on");
        let _listener = UnixListener::bind(&path).unwrap();
        let (fd, url) = held(&path);
        ready.send((fd, url, gettid().as_raw())).unwrap();
        let _ = stopped.recv();
    });
    let (fd, url, pid) = started.recv().unwrap();
    (fd, url, pid, stop)
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_that_are_still_there_are_found_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let above: Arc<dyn Element<_>> = Arc::new(Memory::new(store.clone()));
    let kept: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let (life, own) = (Duration::from_secs(60), i32::try_from(std::process::id()).unwrap());

    let former = Run::new(&above, &kept);
    let mut listeners = Vec::new();
    for name in ["path", "descriptor", "replaced", "dead", "expired", "gone", "another"] {
        listeners.push((name, UnixListener::bind(file(name)).unwrap()));
    }
    former.register("path", &format!("unix://{}", file("path").display()), own, life).await;
    let mut held_by_the_former = Vec::new();
    for name in ["descriptor", "replaced", "dead", "gone", "another"] {
        let (fd, url) = held(&file(name));
        held_by_the_former.push(fd);
        former.register(name, &url, own, life).await;
    }
    let (fd, url) = held(&file("expired"));
    former.register("expired", &url, own, Duration::ZERO).await;
    held_by_the_former.push(fd);
    let (fd, url, pid, _stop) = elsewhere(&folder.path().join(".").canonicalize().unwrap());
    former.register("elsewhere", &url, pid, life).await;
    held_by_the_former.push(fd);
    let tcp = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    former.register("tcp", &format!("tcp://{}", tcp.local_addr().unwrap()), own, life).await;
    former.register("inside", "inproc://forwarder", own, life).await;
    former.register("left", &format!("unix://{}", file("path").display()), own, life).await;
    former.chain.unregister(Call::new(endpoint("left"), Context::new())).await.unwrap();

    // The manager dies, and other things happen meanwhile.
    drop((former, held_by_the_former));
    // The clock of files ticks every few milliseconds only.
    tokio::time::sleep(Duration::from_millis(20)).await;
    listeners.retain(|(name, _)| *name != "dead");
    for name in ["replaced", "gone"] {
        listeners.retain(|(other, _)| *other != name);
        std::fs::remove_file(file(name)).unwrap();
    }
    listeners.push(("replaced", UnixListener::bind(file("replaced")).unwrap()));

    let run = Run::new(&above, &kept);
    assert_eq!(run.recall().await, ["another", "descriptor", "elsewhere", "path", "tcp"]);
    // Somebody else has registered the name above.
    let theirs = endpoint("another");
    let theirs = NetworkServiceEndpoint { path_ids: vec!["spiffe://example.org/other".into()], ..theirs };
    above.register(Call::new(theirs, Context::new()), Chain::new(Vec::new())).await.unwrap();
    let found = run.found().await;
    assert_eq!(found.keys().collect::<Vec<_>>(), ["descriptor", "elsewhere", "path", "tcp"]);
    for (name, url) in &found {
        if let Address::Unix(path) = Address::parse(url).unwrap() {
            net::UnixStream::connect(&path).await.unwrap_or_else(|cause| panic!("{name} at {url}: {cause}"));
        }
    }
    // Its name is its owner's as before.
    assert_eq!(run.owners.owner("descriptor").as_deref(), Some(OWNER));
    // What was not taken over is forgotten, and what registers again is no adopted one any more.
    assert_eq!(kept.list(TABLE).await.unwrap().0.len(), 5);
    run.register("descriptor", "unix:///run/new", own, life).await;
    assert_eq!(run.found().await["descriptor"], "unix:///run/new");
}

fn endpoint(name: &str) -> NetworkServiceEndpoint {
    NetworkServiceEndpoint { name: name.into(), url: MANAGER.into(), ..Default::default() }
}

#[tokio::test]
async fn what_was_taken_over_ends_when_it_would_have() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let above: Arc<dyn Element<_>> = Arc::new(Memory::new(store.clone()));
    let run = Run::new(&above, &store);
    let published = NetworkServiceEndpoint { path_ids: vec![OWNER.into()], ..endpoint("e") };
    above.register(Call::new(published, Context::new()), Chain::new(Vec::new())).await.unwrap();
    run.bypass.adopt("e", "unix:///e".into(), OWNER.into(), clock::now() + Duration::from_secs(60));
    assert_eq!(run.found().await["e"], "unix:///e");
    run.bypass.adopt("e", "unix:///e".into(), OWNER.into(), clock::now());
    assert!(run.found().await.is_empty());
}

#[tokio::test]
async fn a_record_that_makes_no_sense_is_dropped() {
    let kept: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let known = Known {
        name: "b".into(),
        url: "unix:///b".into(),
        expires: Some(prost_types::Timestamp::from(clock::now() + Duration::from_secs(60))),
        ..Default::default()
    };
    for (key, value) in [("a", b"\xff\xff".to_vec()), ("x", known.encode_to_vec()), ("b", known.encode_to_vec())] {
        kept.put_if(TABLE, key, value, Expect::Any).await.unwrap();
    }
    let above: Arc<dyn Element<_>> = Arc::new(Memory::new(Arc::new(MemoryStore::default())));
    let run = Run::new(&above, &kept);
    assert!(run.recall().await.is_empty());
    assert!(kept.list(TABLE).await.unwrap().0.is_empty());
}
