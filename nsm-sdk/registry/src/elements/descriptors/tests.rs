use super::*;
use crate::{Context, Next};
use std::os::unix::net::{UnixListener, UnixStream};

fn open(path: &std::path::Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

#[test]
fn a_newer_socket_takes_the_place_of_the_older_one() {
    let folder = tempfile::tempdir().unwrap();
    let files = Files::default();
    let mut urls = Vec::new();
    for inode in 1..=2 {
        let path = folder.path().join(format!("{inode}.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        let url = files.put("e", (1, inode), open(&path)).unwrap();
        UnixStream::connect(url.strip_prefix("unix://").unwrap()).unwrap();
        listener.accept().unwrap();
        urls.push(url);
    }
    assert_eq!(urls[0], urls[1]);
}

// Conformance 90
#[tokio::test]
async fn what_names_no_descriptor_passes() {
    let chain = Next::new(vec![Arc::new(RecvFdServer::default())]);
    let endpoint = Endpoint { name: "e".into(), url: "inode://1/2".into(), ..Default::default() };
    let answer = chain.register(Call::new(endpoint.clone(), Context::new())).await.unwrap();
    assert_eq!(answer, endpoint);
    chain.unregister(Call::new(endpoint, Context::new())).await.unwrap();
}

#[test]
fn inode_urls() {
    for (url, expected) in [
        ("inode://4/4026532548", Some((4, 4026532548))),
        ("inode://4", None),
        ("inode://x/1", None),
        ("unix:///a", None),
    ] {
        assert_eq!(parse_inode(url), expected, "{url}");
    }
    assert_eq!(socket_path("unix:///a/b"), Some("/a/b".into()));
    assert_eq!(socket_path("tcp://127.0.0.1:1"), None);
}

/// Two ends of a unix connection; what the left one queues arrives at the right one with the next bytes.
async fn transport() -> (nsm_transport::FdStream, nsm_transport::FdStream) {
    let (left, right) = tokio::net::UnixStream::pair().unwrap();
    (nsm_transport::FdStream::new(left), nsm_transport::FdStream::new(right))
}

async fn pass(from: &mut nsm_transport::FdStream, to: &mut nsm_transport::FdStream, fd: OwnedFd) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (device, inode) = from.transceiver().queue(fd).unwrap();
    from.write_all(b"x").await.unwrap();
    to.read_exact(&mut [0]).await.unwrap();
    // What the transport keeps is not what is counted here.
    format!("inode://{device}/{inode}")
}

/// Fails on demand, like a registry that is away.
#[derive(Default)]
struct Away(std::sync::atomic::AtomicBool, std::sync::Mutex<Vec<String>>);

#[async_trait::async_trait]
impl Element<Endpoint> for Away {
    fn name(&self) -> &'static str {
        "away"
    }

    async fn register(&self, call: Call<Endpoint>, next: Next<Endpoint>) -> Result<Endpoint, Error> {
        self.1.lock().unwrap().push(call.message.url.clone());
        match self.0.load(std::sync::atomic::Ordering::SeqCst) {
            true => Err(Error::new("away", &call.message.name, "nobody there")),
            false => next.register(call).await,
        }
    }

    async fn unregister(&self, call: Call<Endpoint>, next: Next<Endpoint>) -> Result<(), Error> {
        self.1.lock().unwrap().push(call.message.url.clone());
        next.unregister(call).await
    }
}

/// How many descriptors of this process are of that file.
fn held(path: &std::path::Path) -> usize {
    use std::os::unix::fs::MetadataExt;
    let inode = std::fs::metadata(path).unwrap().ino();
    let fds = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    fds.filter(|fd| std::fs::metadata(fd.path()).is_ok_and(|found| found.ino() == inode)).count()
}

// Conformance 90
#[tokio::test]
async fn a_descriptor_is_held_from_registration_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "").unwrap();
    let (mut left, mut right) = transport().await;
    let (receive, away) = (Arc::new(RecvFdServer::default()), Arc::new(Away::default()));
    let chain = Next::new(vec![receive.clone() as Arc<dyn Element<_>>, away.clone()]);
    let url = pass(&mut left, &mut right, open(&path)).await;
    let (device, inode) = parse_inode(&url).unwrap();
    let call = || {
        let ctx = Context { fds: Some(right.transceiver()), ..Context::new() }.with_timeout(Duration::from_secs(5));
        Call::new(Endpoint { name: "e".into(), url: url.clone(), ..Default::default() }, ctx)
    };
    let inside = || away.1.lock().unwrap().last().cloned().unwrap();

    // A failing first registration keeps nothing.
    away.0.store(true, std::sync::atomic::Ordering::SeqCst);
    chain.register(call()).await.unwrap_err();
    assert!(inside().starts_with("unix:///proc/"), "{}", inside());
    assert!(!receive.files.contains("e"));

    away.0.store(false, std::sync::atomic::Ordering::SeqCst);
    let answer = chain.register(call()).await.unwrap();
    assert_eq!(answer.url, url, "outside it has the name it came under");
    let first = inside();
    // From here on only the element holds it.
    right.transceiver().release(device, inode);
    assert_eq!(held(&path), 1);

    // A failing refresh keeps what works, and so does the same descriptor a second time.
    away.0.store(true, std::sync::atomic::Ordering::SeqCst);
    chain.register(call()).await.unwrap_err();
    assert_eq!((inside(), held(&path)), (first.clone(), 1));

    chain.unregister(call()).await.unwrap();
    assert_eq!((inside(), held(&path)), (first, 0), "the end names what the registration named");
}

// Conformance 90
#[tokio::test]
async fn what_is_found_is_held_until_it_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nse.sock");
    let _listener = UnixListener::bind(&path).unwrap();
    let (mut left, mut right) = transport().await;
    let found = Endpoint { name: "e".into(), url: format!("unix://{}", path.display()), ..Default::default() };

    // The server's side replaces the path by a descriptor ...
    struct Finds(Endpoint);
    #[async_trait::async_trait]
    impl Element<Endpoint> for Finds {
        fn name(&self) -> &'static str {
            "finds"
        }
        async fn find(&self, _: Call<Query<Endpoint>>, _: Next<Endpoint>) -> Result<Events<Endpoint>, Error> {
            let events = [crate::Event::present(self.0.clone()), crate::Event::gone(self.0.clone())].map(Ok);
            Ok(Box::pin(futures_util::stream::iter(events)))
        }
    }
    let server = Next::new(vec![Arc::new(SendFdServer) as Arc<dyn Element<_>>, Arc::new(Finds(found.clone()))]);
    let ctx = Context { fds: Some(left.transceiver()), ..Context::new() };
    let query = || Query::watch(Endpoint::default());
    let mut events = server.find(Call::new(query(), ctx)).await.unwrap();
    let sent = events.next().await.unwrap().unwrap();
    assert!(sent.object.url.starts_with("inode://"), "{}", sent.object.url);
    assert_eq!(events.next().await.unwrap().unwrap(), crate::Event::gone(found), "a removal needs no descriptor");

    // ... and the client's side makes a path of it again.
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    left.write_all(b"x").await.unwrap();
    right.read_exact(&mut [0]).await.unwrap();
    let client = Client::new(right.transceiver()).await;
    let url = client.list(sent.object.clone()).await;
    UnixStream::connect(url.strip_prefix("unix://").unwrap()).unwrap();
    assert_eq!(client.list(sent.object.clone()).await, url, "what is held is not made anew");
    client.find(crate::Event::gone(sent.object)).await;
    assert!(UnixStream::connect(url.strip_prefix("unix://").unwrap()).is_err());
}

/// The client's side of a connection with these descriptors, above a registry that answers what it is told.
struct Client(crate::Chain<Endpoint>, Arc<std::sync::Mutex<Vec<crate::Event<Endpoint>>>>);

impl Client {
    async fn new(fds: FdTransceiver) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::parse(&format!("unix://{}", folder.path().join("s").display())).unwrap();
        let listener = nsm_transport::Listener::bind(&address).await.unwrap();
        let stop = tokio_util::sync::CancellationToken::new();
        let (ended, serving) = (stop.clone(), nsm_transport::Transport::insecure());
        tokio::spawn(async move { serving.serve(vec![listener], tonic::service::Routes::default(), ended).await });
        let mut link = nsm_transport::Transport::insecure().dial(&address, Duration::from_secs(5)).await.unwrap();
        stop.cancel();
        link.fds = Some(fds);
        let answers = Arc::default();
        let elements: Vec<Arc<dyn Element<Endpoint>>> = vec![
            Arc::new(Linked(Arc::new(link))),
            Arc::<RecvFdClient>::default(),
            Arc::new(Answers(Arc::clone(&answers))),
        ];
        Self(Next::new(elements), answers)
    }

    async fn find(&self, answer: crate::Event<Endpoint>) -> Vec<crate::Event<Endpoint>> {
        *self.1.lock().unwrap() = vec![answer];
        let events = self.0.find(Call::new(Query::list(Endpoint::default()), Context::new())).await.unwrap();
        events.map(Result::unwrap).collect().await
    }

    /// The URL that an endpoint has here which the registry lists as this.
    async fn list(&self, endpoint: Endpoint) -> String {
        self.find(crate::Event::present(endpoint)).await.remove(0).object.url
    }
}

/// Sets the link, as dial would.
struct Linked(Arc<nsm_transport::Link>);

#[async_trait::async_trait]
impl Element<Endpoint> for Linked {
    fn name(&self) -> &'static str {
        "linked"
    }

    async fn find(&self, mut call: Call<Query<Endpoint>>, next: Next<Endpoint>) -> Result<Events<Endpoint>, Error> {
        call.ctx.link = Some(self.0.clone());
        next.find(call).await
    }
}

struct Answers(Arc<std::sync::Mutex<Vec<crate::Event<Endpoint>>>>);

#[async_trait::async_trait]
impl Element<Endpoint> for Answers {
    fn name(&self) -> &'static str {
        "answers"
    }

    async fn find(&self, _: Call<Query<Endpoint>>, _: Next<Endpoint>) -> Result<Events<Endpoint>, Error> {
        let answers = self.0.lock().unwrap().clone();
        Ok(Box::pin(futures_util::stream::iter(answers).map(Ok)))
    }
}

// Conformance 90
#[tokio::test(start_paused = true)]
async fn what_is_only_listed_is_let_go_some_time_after_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let (mut left, mut right) = transport().await;
    let client = Client::new(right.transceiver()).await;
    let mut paths = Vec::new();
    for n in 0..5 {
        let path = folder.path().join(n.to_string());
        std::fs::write(&path, "").unwrap();
        let url = pass(&mut left, &mut right, open(&path)).await;
        let mut endpoint = Endpoint { name: n.to_string(), url, ..Default::default() };
        endpoint.set_expiration(Some(clock::now() + Duration::from_secs(60)));
        // Found again in the middle of its life, with a later end.
        client.list(endpoint.clone()).await;
        tokio::time::advance(Duration::from_secs(30)).await;
        endpoint.set_expiration(Some(clock::now() + Duration::from_secs(60)));
        client.list(endpoint.clone()).await;
        let (device, inode) = parse_inode(&endpoint.url).unwrap();
        right.transceiver().release(device, inode);
        paths.push(path);
        tokio::time::advance(Duration::from_secs(310)).await;
    }
    // Each is let go ten minutes after its last known end: when the last one was found, the third had been for 20 s.
    let counts: Vec<_> = paths.iter().map(|path| held(path)).collect();
    assert_eq!(counts, [0, 0, 0, 1, 1]);
    tokio::time::advance(KEPT).await;
    client.find(crate::Event::gone(Endpoint { name: "other".into(), ..Default::default() })).await;
    assert_eq!(paths.iter().map(|path| held(path)).sum::<usize>(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_descriptor_that_does_not_come_ends_the_registration() {
    let (_left, right) = transport().await;
    let chain = Next::new(vec![Arc::new(RecvFdServer::default())]);
    let ctx = Context { fds: Some(right.transceiver()), ..Context::new() };
    let endpoint = Endpoint { name: "e".into(), url: "inode://1/2".into(), ..Default::default() };
    let before = Instant::now();
    let error = chain.register(Call::new(endpoint, ctx)).await.unwrap_err();
    assert_eq!(before.elapsed(), WAIT);
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded, "{error}");
}
