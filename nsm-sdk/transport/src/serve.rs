//! Incoming connections.

use crate::{Error, Listener, Stream, Transport, deadline::DeadlineLayer, stream::Socket, transport::chain};
use rustls::ServerConfig;
use std::{collections::VecDeque, io, sync::Arc, time::Duration};
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_rustls::{TlsAcceptor, TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{service::Routes, transport::Server};

/// Handshakes at the same time; further connections wait in the kernel's queue ...
const HANDSHAKES: usize = 64;
/// ... until one ends, or has taken so long: who says nothing has a place only as long as nobody needs it.
const HANDSHAKE_SHARE: Duration = Duration::from_secs(1);
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
                Ok(socket) => handshakes.begin(self.clone().finish(socket)),
                Err(cause) => {
                    tracing::debug!(address = %listener.address(), %cause, "connection not accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn finish(self, socket: Socket) {
        match self.handshake(socket).await {
            Ok(stream) => {
                // A full queue or a stopped server: either way the connection's fate is decided there.
                let _ = self.ready.send(Ok(stream.cut_by(self.cut.cancelled_owned()))).await;
            }
            Err(cause) => tracing::debug!(%cause, "handshake failed"),
        }
    }

    async fn handshake(&self, socket: Socket) -> io::Result<Stream> {
        let Some(config) = &self.tls else { return Ok(Stream::plain(socket)) };
        let session = timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config.clone()).accept(socket))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "handshake took too long"))??;
        Stream::tls(TlsStream::Server(session))
    }
}

/// Handshakes under way, with the times of their begin, oldest first.
#[derive(Default)]
struct Handshakes {
    tasks: JoinSet<()>,
    oldest: VecDeque<(Instant, AbortHandle)>,
}

impl Handshakes {
    fn begin(&mut self, handshake: impl Future<Output = ()> + Send + 'static) {
        self.oldest.push_back((Instant::now(), self.tasks.spawn(handshake)));
    }

    /// Waits until there is a place for another one.
    async fn place(&mut self) {
        while self.tasks.try_join_next().is_some() {}
        self.oldest.retain(|(_, task)| !task.is_finished());
        while self.tasks.len() >= HANDSHAKES {
            let patience = self.oldest.front().map_or_else(Instant::now, |(begin, _)| *begin + HANDSHAKE_SHARE);
            if timeout_at(patience, self.tasks.join_next()).await.is_err()
                && let Some((_, task)) = self.oldest.pop_front()
            {
                tracing::debug!("a slow handshake is ended: others wait");
                task.abort();
                self.tasks.join_next().await;
            }
            self.oldest.retain(|(_, task)| !task.is_finished());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn begin(handshakes: &mut Handshakes, takes: Duration) -> Duration {
        let asked = Instant::now();
        handshakes.place().await;
        handshakes.begin(sleep(takes));
        asked.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn the_silent_make_room_for_others_and_the_quick_are_waited_for() {
        let (mut handshakes, quick, silent) = (Handshakes::default(), Duration::from_millis(20), HANDSHAKE_TIMEOUT);
        for _ in 0..HANDSHAKES {
            assert_eq!(begin(&mut handshakes, silent).await, Duration::ZERO);
        }
        // All places are taken at the same moment, and become free at the same moment.
        let waited = begin(&mut handshakes, quick).await;
        assert!((HANDSHAKE_SHARE..HANDSHAKE_SHARE * 2).contains(&waited), "{waited:?}");
        for _ in 1..2 * HANDSHAKES {
            assert!(begin(&mut handshakes, quick).await <= quick * 2);
        }
        // Those in time are not cut short, however many wait.
        let mut handshakes = Handshakes::default();
        for _ in 0..HANDSHAKES {
            begin(&mut handshakes, quick).await;
        }
        assert!(begin(&mut handshakes, quick).await <= quick * 2);
        assert!(handshakes.tasks.len() <= HANDSHAKES);
        while let Some(ended) = handshakes.tasks.join_next().await {
            assert!(ended.is_ok(), "{ended:?}");
        }
    }
}
