//! Server streams that are opened again for ever.

use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic::{Response, Status, Streaming};

use crate::Backoff;

/// Delay before a broken watch is opened again, plus jitter.
const RETRY: Duration = Duration::from_millis(500);

/// What a watch tells its owner.
#[derive(Debug)]
pub enum WatchEvent<M> {
    /// The server sent a message.
    Message(M),
    /// The stream could not be opened or ended; sent once per loss, not per attempt. It says nothing about the objects:
    /// keep what is known.
    Lost(Status),
}

/// Opens a server stream, hands each message to `on_message`, and opens it again 500 ms (plus jitter) after it ended or
/// failed, until `stop`. One log line for each change between working and not.
pub async fn watch_loop<M, Open, Opened, On, Handled>(
    name: impl Display,
    stop: &CancellationToken,
    open: Open,
    mut on_message: On,
) where
    Open: FnMut() -> Opened,
    Opened: Future<Output = Result<Response<Streaming<M>>, Status>>,
    On: FnMut(M) -> Handled,
    Handled: Future<Output = ()>,
{
    let on_event = |event| {
        let handled = match event {
            WatchEvent::Message(message) => Some(on_message(message)),
            WatchEvent::Lost(_) => None,
        };
        async {
            if let Some(handled) = handled {
                handled.await;
            }
        }
    };
    watch_events(name, stop, open, on_event).await;
}

/// As [`watch_loop`], and also tells when the stream is lost (for health).
pub async fn watch_events<M, Open, Opened, On, Handled>(
    name: impl Display,
    stop: &CancellationToken,
    mut open: Open,
    mut on_event: On,
) where
    Open: FnMut() -> Opened,
    Opened: Future<Output = Result<Response<Streaming<M>>, Status>>,
    On: FnMut(WatchEvent<M>) -> Handled,
    Handled: Future<Output = ()>,
{
    let mut backoff = Backoff::constant(RETRY);
    let mut working = None;
    let session = async {
        loop {
            let status = match open().await {
                Ok(response) => {
                    let mut stream = response.into_inner();
                    loop {
                        match stream.message().await {
                            Ok(Some(message)) => {
                                if working != Some(true) {
                                    tracing::info!(watch = %name, "watching");
                                    working = Some(true);
                                }
                                on_event(WatchEvent::Message(message)).await;
                            }
                            Ok(None) => break Status::unavailable("the server ended the stream"),
                            Err(status) => break status,
                        }
                    }
                }
                Err(status) => status,
            };
            if working != Some(false) {
                tracing::warn!(watch = %name, error = %status.message(), code = ?status.code(), "watch lost, opening it again");
                working = Some(false);
                on_event(WatchEvent::Lost(status)).await;
            }
            backoff.wait().await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = session => {}
    }
}
