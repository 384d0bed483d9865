//! Incoming connections.

use crate::{Error, Listener, Stream, Transport, deadline::DeadlineLayer, stream::Socket, transport::chain};
use rustls::ServerConfig;
use std::{io, sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::sleep,
};
use tokio_rustls::{TlsAcceptor, TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Server};

/// Handshakes at the same time; further connections wait in the kernel's queue ...
const HANDSHAKES: usize = 64;
/// ... until one ends, or has taken so long: who says nothing has a place only as long as nobody needs it.
const HANDSHAKE_SHARE: Duration = Duration::from_secs(3);
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// What calls in progress get when the server stops. Streams never end by themselves, so they are cut after it.
const GRACE: Duration = Duration::from_millis(300);
/// Pause after an accept that failed for lack of file descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Pings to clients, which may have died without a word. Clients of all stacks answer them.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

impl Transport {
    /// Serves until `stop`; then calls in progress get a moment, streams are cut, and every connection is closed when it returns.
    ///
    /// Each request's extensions carry a [`crate::ConnInfo`].
    ///
    /// # Errors
    /// The HTTP/2 server fails. A connection that fails its handshake is dropped and is no error.
    pub async fn serve(&self, listeners: Vec<Listener>, routes: Routes, stop: CancellationToken) -> Result<(), Error> {
        let (cut, (ready, incoming)) = (CancellationToken::new(), mpsc::channel(HANDSHAKES));
        let acceptor = Acceptor { tls: self.server_config(), ready, stop: stop.clone(), cut: cut.clone() };
        let mut accepting = JoinSet::new();
        for listener in listeners {
            accepting.spawn(acceptor.clone().accept_loop(listener));
        }
        drop(acceptor);
        let cutter = {
            let (stop, cut) = (stop.clone(), cut.clone());
            tokio::spawn(async move {
                stop.cancelled().await;
                sleep(GRACE).await;
                cut.cancel();
            })
        };
        let result = Server::builder()
            .http2_keepalive_interval(Some(PING_INTERVAL))
            .http2_keepalive_timeout(Some(PING_TIMEOUT))
            .layer(DeadlineLayer)
            .add_routes(routes)
            .serve_with_incoming_shutdown(ReceiverStream::new(incoming), stop.cancelled_owned())
            .await
            .map_err(|cause| Error::Serve(chain(&cause)));
        cutter.abort();
        cut.cancel();
        accepting.shutdown().await;
        result
    }
}

#[derive(Clone)]
struct Acceptor {
    tls: Option<Arc<ServerConfig>>,
    ready: mpsc::Sender<io::Result<Stream>>,
    stop: CancellationToken,
    cut: CancellationToken,
}

impl Acceptor {
    /// Accepts for ever. Handshakes run beside it: a client that is slow or silent holds up nobody.
    async fn accept_loop(self, listener: Listener) {
        let mut handshakes = Handshakes::default();
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => return,
                accepted = async {
                    handshakes.place().await;
                    listener.accept().await
                } => accepted,
            };
            match accepted {
                Ok(socket) => {
                    let finish = self.clone().finish(socket, handshakes.pressed.subscribe());
                    handshakes.tasks.spawn(finish);
                }
                Err(cause) => {
                    tracing::debug!(address = %listener.address(), %cause, "connection not accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn finish(self, socket: Socket, pressed: watch::Receiver<bool>) {
        match patiently(self.handshake(socket), pressed).await {
            Ok(stream) => {
                // A full queue or a stopped server: either way the connection's fate is decided there.
                let _ = self.ready.send(Ok(stream.cut_by(self.cut.cancelled_owned()))).await;
            }
            Err(cause) => tracing::debug!(%cause, "handshake failed"),
        }
    }

    async fn handshake(&self, socket: Socket) -> io::Result<Stream> {
        let Some(config) = &self.tls else { return Ok(Stream::plain(socket)) };
        let session = TlsAcceptor::from(config.clone()).accept(socket).await?;
        Stream::tls(TlsStream::Server(session))
    }
}

/// Gives a handshake its time: all of it, or its share if others wait.
async fn patiently<T>(
    handshake: impl Future<Output = io::Result<T>>,
    mut pressed: watch::Receiver<bool>,
) -> io::Result<T> {
    let share = async {
        sleep(HANDSHAKE_SHARE).await;
        if pressed.wait_for(|pressed| *pressed).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    let slow = |text: &str| io::Error::new(io::ErrorKind::TimedOut, text);
    tokio::select! {
        done = handshake => done,
        () = share => Err(slow("handshake took too long while others waited")),
        () = sleep(HANDSHAKE_TIMEOUT) => Err(slow("handshake took too long")),
    }
}

/// Handshakes under way, and whether somebody waits for a place among them.
#[derive(Default)]
struct Handshakes {
    tasks: JoinSet<()>,
    pressed: watch::Sender<bool>,
}

impl Handshakes {
    /// Waits until there is a place for another one.
    async fn place(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        while self.tasks.len() >= HANDSHAKES {
            self.pressed.send_replace(true);
            self.tasks.join_next().await;
        }
        self.pressed.send_if_modified(|pressed| std::mem::replace(pressed, false));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    async fn begin(handshakes: &mut Handshakes, takes: Duration) -> Duration {
        let asked = Instant::now();
        handshakes.place().await;
        let handshake = async move {
            sleep(takes).await;
            Ok(())
        };
        let handshake = patiently(handshake, handshakes.pressed.subscribe());
        handshakes.tasks.spawn(async move { _ = handshake.await });
        asked.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn the_silent_make_room_for_others() {
        let (mut handshakes, quick, silent) = (Handshakes::default(), Duration::from_millis(20), HANDSHAKE_TIMEOUT * 2);
        for _ in 0..HANDSHAKES {
            assert_eq!(begin(&mut handshakes, silent).await, Duration::ZERO);
        }
        let waited = begin(&mut handshakes, quick).await;
        assert!((HANDSHAKE_SHARE..HANDSHAKE_SHARE * 2).contains(&waited), "{waited:?}");
        for _ in 1..2 * HANDSHAKES {
            assert!(begin(&mut handshakes, quick).await <= quick * 2);
        }
        assert!(handshakes.tasks.len() <= HANDSHAKES);
    }

    #[tokio::test(start_paused = true)]
    async fn time_is_short_only_where_others_wait() {
        let after = async |takes: Duration, pressed: bool| {
            let handshake = async move {
                sleep(takes).await;
                Ok(())
            };
            let begin = Instant::now();
            let pressed = watch::Sender::new(pressed);
            (patiently(handshake, pressed.subscribe()).await.is_ok(), begin.elapsed().as_secs())
        };
        assert_eq!(after(Duration::from_secs(2), true).await, (true, 2));
        assert_eq!(after(Duration::from_secs(5), true).await, (false, 3));
        assert_eq!(after(Duration::from_secs(5), false).await, (true, 5));
        assert_eq!(after(Duration::from_secs(20), false).await, (false, 10));
    }
}
