//! One connection: TCP or unix, with or without TLS.

use crate::{FdStream, FdTransceiver};
use nsm_identity::Peer;
use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::TlsStream;
use tokio_util::sync::WaitForCancellationFutureOwned;
use tonic::transport::server::Connected;

/// Who is on the other side of a request's connection; in the extensions of each request.
#[derive(Clone, Debug, Default)]
pub struct ConnInfo {
    /// The identity of the peer; `None` without TLS.
    pub peer: Option<Peer>,
    /// The descriptors of the connection; `None` on TCP.
    pub fds: Option<FdTransceiver>,
    /// Process and user of the peer; `None` on TCP.
    pub unix_cred: Option<UnixCredentials>,
    /// The peer's address; `None` on unix sockets.
    pub remote: Option<SocketAddr>,
}

/// `SO_PEERCRED` of a unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnixCredentials {
    /// Process id, if the kernel knows it in our namespace.
    pub pid: Option<i32>,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// A socket below TLS.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(FdStream),
}

impl Socket {
    fn authenticated(&self) {
        if let Self::Unix(unix) = self {
            unix.transceiver().authenticated();
        }
    }

    pub(crate) fn info(&self) -> ConnInfo {
        match self {
            Self::Tcp(tcp) => ConnInfo { remote: tcp.peer_addr().ok(), ..ConnInfo::default() },
            Self::Unix(unix) => ConnInfo {
                fds: Some(unix.transceiver()),
                unix_cred: unix.socket().peer_cred().ok().map(|cred| UnixCredentials {
                    pid: cred.pid(),
                    uid: cred.uid(),
                    gid: cred.gid(),
                }),
                ..ConnInfo::default()
            },
        }
    }
}

enum Layer {
    Plain(Socket),
    Tls(Box<TlsStream<Socket>>),
}

/// One connection, ready for HTTP/2.
pub struct Stream {
    layer: Layer,
    info: ConnInfo,
    cut: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("info", &self.info).finish_non_exhaustive()
    }
}

impl Stream {
    pub(crate) fn plain(socket: Socket) -> Self {
        // Where it is decides who may connect.
        socket.authenticated();
        Self { info: socket.info(), layer: Layer::Plain(socket), cut: None }
    }

    pub(crate) fn tls(stream: TlsStream<Socket>) -> io::Result<Self> {
        let (socket, session) = stream.get_ref();
        if session.alpn_protocol() != Some(nsm_identity::ALPN_H2) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the peer does not speak h2"));
        }
        let leaf = session
            .peer_certificates()
            .and_then(|chain| chain.first())
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the peer showed no certificate"))?;
        let peer = Peer::from_leaf(leaf).map_err(io::Error::other)?;
        socket.authenticated();
        let info = ConnInfo { peer: Some(peer), ..socket.info() };
        Ok(Self { layer: Layer::Tls(Box::new(stream)), info, cut: None })
    }

    /// From then on reads and writes fail; how a server gets rid of streams that would never end.
    pub(crate) fn cut_by(mut self, cut: WaitForCancellationFutureOwned) -> Self {
        self.cut = Some(Box::pin(cut));
        self
    }

    /// What is known about the other side.
    pub fn info(&self) -> &ConnInfo {
        &self.info
    }

    fn check_cut(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match self.cut.as_mut().map(|cut| cut.as_mut().poll(cx)) {
            Some(Poll::Ready(())) => {
                // A cancelled future must not be polled again.
                self.cut = Some(Box::pin(cancelled()));
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the server stops"))
            }
            _ => Ok(()),
        }
    }
}

fn cancelled() -> WaitForCancellationFutureOwned {
    let token = tokio_util::sync::CancellationToken::new();
    token.cancel();
    token.cancelled_owned()
}

impl Connected for Stream {
    type ConnectInfo = ConnInfo;

    fn connect_info(&self) -> ConnInfo {
        self.info.clone()
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(inner) => Pin::new(inner).poll_read(cx, buffer),
            Self::Unix(inner) => Pin::new(inner).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(inner) => Pin::new(inner).poll_write(cx, bytes),
            Self::Unix(inner) => Pin::new(inner).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(inner) => Pin::new(inner).poll_flush(cx),
            Self::Unix(inner) => Pin::new(inner).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(inner) => Pin::new(inner).poll_shutdown(cx),
            Self::Unix(inner) => Pin::new(inner).poll_shutdown(cx),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.check_cut(cx)?;
        match &mut this.layer {
            Layer::Plain(inner) => Pin::new(inner).poll_read(cx, buffer),
            Layer::Tls(inner) => Pin::new(inner).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().layer {
            Layer::Plain(inner) => Pin::new(inner).poll_write(cx, bytes),
            Layer::Tls(inner) => Pin::new(inner).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().layer {
            Layer::Plain(inner) => Pin::new(inner).poll_flush(cx),
            Layer::Tls(inner) => Pin::new(inner).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().layer {
            Layer::Plain(inner) => Pin::new(inner).poll_shutdown(cx),
            Layer::Tls(inner) => Pin::new(inner).poll_shutdown(cx),
        }
    }
}
