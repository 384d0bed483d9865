use super::*;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};

/// A server that says nothing, with what has been accepted.
struct Server {
    _folder: tempfile::TempDir,
    listener: UnixListener,
    url: String,
}

impl Server {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server.sock");
        let listener = UnixListener::bind(&path).unwrap();
        Self { _folder: folder, listener, url: format!("unix://{}", path.display()) }
    }

    /// The transport connections made since the last call.
    async fn accepted(&self) -> Vec<UnixStream> {
        let mut all = Vec::new();
        while let Ok(Ok((socket, _))) = tokio::time::timeout(Duration::from_millis(50), self.listener.accept()).await {
            all.push(socket);
        }
        all
    }

    async fn connect(&self, grpc: &Grpc, times: usize) -> Vec<Remote> {
        let mut remotes = Vec::new();
        for _ in 0..times {
            remotes.push(grpc.connect(&self.url, Instant::now() + Duration::from_secs(5)).await.unwrap());
        }
        remotes
    }
}

#[tokio::test]
async fn a_socket_is_shared_only_if_told_so() {
    let server = Server::new();
    let _alone = server.connect(&Grpc::new(Transport::insecure()), 3).await;
    assert_eq!(server.accepted().await.len(), 3);
    let _shared = server.connect(&Grpc::new(Transport::insecure()).sharing(), 3).await;
    assert_eq!(server.accepted().await.len(), 1);
}

/// A server bounds the streams of one transport connection: one more would wait without an error.
#[tokio::test]
async fn not_too_many_share_one() {
    let (server, grpc) = (Server::new(), Grpc::new(Transport::insecure()).sharing());
    let mut remotes = server.connect(&grpc, SHARED_BY + 1).await;
    assert_eq!(server.accepted().await.len(), 2);
    remotes.remove(0);
    remotes.extend(server.connect(&grpc, SHARED_BY).await);
    assert_eq!(server.accepted().await.len(), 0, "places that have become free are taken again");
    remotes.clear();
    let _again = server.connect(&grpc, 1).await;
    assert_eq!(server.accepted().await.len(), 1, "the last one closes the transport connection");
}

#[tokio::test]
async fn a_broken_one_is_not_given_to_others() {
    let (server, grpc) = (Server::new(), Grpc::new(Transport::insecure()).sharing());
    let first = server.connect(&grpc, 2).await;
    drop(server.accepted().await);
    while first.iter().any(Remote::alive) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let second = server.connect(&grpc, 2).await;
    assert_eq!(server.accepted().await.len(), 1);
    drop((first, second));
}

/// Its other side may have another identity by now, which it does not show.
#[tokio::test]
async fn one_that_was_refused_is_not_given_to_others() {
    let (server, grpc) = (Server::new(), Grpc::new(Transport::insecure()).sharing());
    let alone = server.connect(&grpc, 1).await;
    assert!(!alone[0].distrust(), "it was made for this one");
    let shared = server.connect(&grpc, 2).await;
    assert_eq!(server.accepted().await.len(), 2);
    assert!(shared.iter().all(|remote| remote.alive() && remote.current()) && shared[1].distrust());
    assert!(!shared[0].current(), "who has it too moves with the next request");
    let _again = server.connect(&grpc, 2).await;
    assert_eq!(server.accepted().await.len(), 1);
}
