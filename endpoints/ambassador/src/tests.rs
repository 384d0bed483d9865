use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::*;
use meridio_proto::ambassador::v1::tap_server::{Tap, TapServer};

/// A TAPA that lists what was opened, and can forget it all.
#[derive(Clone)]
struct Fake {
    open: Arc<watch::Sender<Vec<api::Stream>>>,
    opened: Arc<Mutex<usize>>,
}

#[tonic::async_trait]
impl Tap for Fake {
    async fn open(&self, request: Request<api::Stream>) -> Result<Response<()>, Status> {
        *self.opened.lock().unwrap() += 1;
        self.open.send_modify(|list| list.push(request.into_inner()));
        Ok(Response::new(()))
    }

    async fn close(&self, request: Request<api::Stream>) -> Result<Response<()>, Status> {
        let gone = request.into_inner();
        self.open.send_modify(|list| list.retain(|stream| *stream != gone));
        Ok(Response::new(()))
    }

    type WatchStream =
        std::pin::Pin<Box<dyn futures_util::Stream<Item = Result<api::StreamResponse, Status>> + Send + 'static>>;

    async fn watch(&self, _: Request<api::Stream>) -> Result<Response<Self::WatchStream>, Status> {
        let lists = WatchStream::new(self.open.subscribe()).map(|list| {
            let stream_status =
                list.into_iter().map(|stream| api::StreamStatus { status: 0, stream: Some(stream) }).collect();
            Ok(api::StreamResponse { stream_status })
        });
        Ok(Response::new(Box::pin(lists)))
    }
}

fn serve(path: &std::path::Path) -> Fake {
    let fake = Fake { open: Arc::new(watch::channel(Vec::new()).0), opened: Arc::default() };
    let listener = UnixListener::bind(path).unwrap();
    let server = tonic::transport::Server::builder().add_service(TapServer::new(fake.clone()));
    tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
    fake
}

#[tokio::test]
async fn open_watch_close() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ambassador.sock");
    let _fake = serve(&path);
    let tapa = Ambassador::new(path.to_str().unwrap()).unwrap();
    let stream = StreamName::new("trench-a", "conduit-a-1", "stream-a-i");

    tapa.open(&stream).await.unwrap();
    let mut lists = Box::pin(tapa.watch(&StreamName::default()).await.unwrap());
    let list = lists.next().await.unwrap().unwrap();
    assert_eq!(render(&list), "New stream list:\nOPEN - stream-a-i - conduit-a-1 - trench-a\n");
    tapa.close(&stream).await.unwrap();
    assert_eq!(lists.next().await.unwrap().unwrap(), []);
}

#[tokio::test]
async fn a_forgotten_stream_is_opened_again_and_closed_in_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ambassador.sock");
    let tapa = Ambassador::new(&format!("unix://{}", path.display())).unwrap();
    let stream = StreamName::new("t", "c", "s");
    let stop = CancellationToken::new();
    // The TAPA comes up after its application.
    let keeper = tokio::spawn({
        let (tapa, stream, stop) = (tapa.clone(), stream.clone(), stop.clone());
        async move { tapa.keep_open(&stream, stop).await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let fake = serve(&path);
    let mut open = fake.open.subscribe();
    let long = Duration::from_secs(10);
    tokio::time::timeout(long, open.wait_for(|list| list.len() == 1)).await.unwrap().unwrap();
    fake.open.send_modify(Vec::clear);
    tokio::time::timeout(long, open.wait_for(|list| list.len() == 1)).await.unwrap().unwrap();
    stop.cancel();
    tokio::time::timeout(long, open.wait_for(Vec::is_empty)).await.unwrap().unwrap();
    keeper.await.unwrap().unwrap();
    assert_eq!(*fake.opened.lock().unwrap(), 2);
}

#[tokio::test]
async fn a_wrong_address_is_refused_by_name() {
    let error = Ambassador::new("no such thing").unwrap_err();
    assert!(error.to_string().contains("no such thing"), "{error}");
}
