use super::*;
use crate::{
    Chain, Remote,
    core::testing::Spy,
    elements::{
        kernel_mechanism::{KERNEL, OWN_NETNS, open},
        metadata::MetadataElement,
        sendfd::{SendFdClient, SendFdServer},
    },
    remote::inprocess::{Caller, Identity, LocalService, remote},
};

fn mechanism(url: &str) -> Mechanism {
    let parameters = [(INODE_URL.to_owned(), url.to_owned())].into();
    Mechanism { r#type: KERNEL.into(), parameters, ..Default::default() }
}

fn request(preferences: &[&str]) -> RequestCall {
    let mut call = crate::core::testing::request_id("c", Context::new());
    call.message.mechanism_preferences = preferences.iter().map(|url| mechanism(url)).collect();
    call
}

/// Chooses the first preference.
struct Choose;

#[async_trait::async_trait]
impl Element for Choose {
    fn name(&self) -> &'static str {
        "choose"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        if call.connection().mechanism.is_none() {
            call.connection_mut().mechanism = call.message.mechanism_preferences.first().cloned();
        }
        next.request(call).await
    }
}

/// Sets the remote, as dial would.
struct To(Remote);

#[async_trait::async_trait]
impl Element for To {
    fn name(&self) -> &'static str {
        "to"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        call.ctx.remote = Some(self.0.clone());
        next.request(call).await
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        call.ctx.remote = Some(self.0.clone());
        next.close(call).await
    }
}

/// A client of `server` by an in-process transport.
fn client(server: Chain) -> Chain {
    let service = LocalService { chain: server, hub: Default::default(), peer: Identity::default() };
    Chain::builder()
        .element(MetadataElement::new())
        .element(To(remote("test", service, Caller::default())))
        .element(RecvFdClient::new())
        .element(SendFdClient)
        .element(crate::elements::connect::Connect)
        .build()
}

fn url(connection: &Connection) -> String {
    connection.mechanism.as_ref().unwrap().parameters[INODE_URL].clone()
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

// Conformance 88
#[tokio::test]
async fn a_file_inside_an_inode_outside() {
    let spy = Arc::new(Spy::default());
    let files = (tempfile::NamedTempFile::new().unwrap(), tempfile::NamedTempFile::new().unwrap());
    let [used, unused] = [&files.0, &files.1].map(|file| format!("file://{}", file.path().display()));
    let server = Chain::builder()
        .element(MetadataElement::new())
        .element(RecvFdServer::new())
        .element(Choose)
        .element(spy.clone())
        .build();
    let client = client(server);
    let connection = client.request(request(&[&used, &unused])).await.unwrap();
    // The client sees its own file again, the server saw a descriptor of the same file.
    assert_eq!(url(&connection), used);
    let seen = url(spy.last_request().connection.as_ref().unwrap());
    assert!(seen.starts_with("file:///proc/self/fd/"), "{seen}");
    let inode = |url: &str| crate::core::inode_of(open(url).unwrap()).unwrap();
    assert_eq!(inode(&seen), inode(&used));
    // The chosen one stays open until the close, which sees it too.
    client.close(CloseCall::new(connection, Context::new())).await.unwrap();
    assert_eq!(url(&spy.last_close()), seen);
    assert!(open(&seen).is_err() || inode(&seen) != inode(&used));
}

// Conformance 88
#[tokio::test(flavor = "current_thread")]
async fn nothing_stays_open() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let file = format!("file://{}", file.path().display());
    let server = Chain::builder().element(MetadataElement::new()).element(RecvFdServer::new()).element(Choose).build();
    let run = async || {
        let client = client(server.clone());
        let connection = client.request(request(&[&file, OWN_NETNS, &file])).await.unwrap();
        client.close(CloseCall::new(connection, Context::new())).await.unwrap();
    };
    run().await;
    let before = open_files();
    for _ in 0..50 {
        run().await;
    }
    // Other tests of this process open a few files meanwhile, but not fifty.
    assert!(open_files() < before + 40);
}

// Conformance 88
#[tokio::test]
async fn the_answers_namespace_reaches_the_client() {
    let server = Chain::builder().element(MetadataElement::new()).element(SendFdServer).element(Choose).build();
    let client = client(server);
    // Over a transport the server's own file URL would mean nothing to the client.
    let mut call = request(&[]);
    call.connection_mut().mechanism = Some(Mechanism { r#type: KERNEL.into(), ..Default::default() });
    let connection = client.request(call).await.unwrap();
    assert!(connection.mechanism.unwrap().parameters.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_descriptor_that_does_not_come_ends_at_the_deadline() {
    let server = Chain::builder().element(MetadataElement::new()).element(RecvFdServer::new()).build();
    for (bad, code) in [
        ("inode://1/1", Code::DeadlineExceeded),
        ("inode://1", Code::InvalidArgument),
        ("inode://-1/x", Code::InvalidArgument),
        ("inode://", Code::InvalidArgument),
    ] {
        let (_, fds) = FdTransceiver::pair();
        let mut call = request(&[bad]);
        *call.ctx = Context { fds: Some(fds), ..Context::new().with_timeout(Duration::from_secs(5)) };
        assert_eq!(server.request(call).await.unwrap_err().code(), code, "{bad}");
    }
}
