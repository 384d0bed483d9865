//! Outgoing connections.

use crate::{Address, Error, FdStream, FdTransceiver, PerRpcToken, Stream, stream::Socket};
use hyper_util::rt::TokioIo;
use nsm_identity::{Peer, X509Source};
use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, TlsStream};
use tonic::{
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};

/// Connecting and TLS handshake of a lazy channel together. A dead host must not hold up calls for longer.
const CHANNEL_CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// HTTP/2 pings. Without them a client goes on using a TCP connection that has silently died; with them a grpc-go server that was not
/// configured for it answers `too_many_pings`: use them towards Meridio's own services only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeepAlive {
    /// Time between pings.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
}

impl Default for KeepAlive {
    fn default() -> Self {
        Self { interval: Duration::from_secs(30), timeout: Duration::from_secs(10) }
    }
}

/// How this process connects and serves. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Transport {
    tls: Option<Tls>,
    keep_alive: Option<KeepAlive>,
    max_token_lifetime: Duration,
}

#[derive(Clone, Debug)]
struct Tls {
    source: X509Source,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

/// One established connection. It does not reconnect: when it ends, calls on the channel fail.
#[derive(Clone, Debug)]
pub struct Link {
    /// For clients that need no token.
    pub channel: Channel,
    /// Who answered; `None` without TLS.
    pub peer: Option<Peer>,
    /// Descriptors of this connection; `None` on TCP.
    pub fds: Option<FdTransceiver>,
    credentials: Option<PerRpcToken>,
}

impl Link {
    /// What adds this link's token to each call; `None` without TLS.
    pub fn credentials(&self) -> Option<PerRpcToken> {
        self.credentials.clone()
    }

    /// Whether it still works and was made with the newest SVID. Streams of one that was not go on, but the next request
    /// belongs on a new connection: the peer knows the certificate of the handshake only, and that one ends.
    pub fn is_current(&self) -> bool {
        let closed = self.fds.as_ref().is_some_and(FdTransceiver::is_closed);
        !closed && self.credentials.as_ref().is_none_or(PerRpcToken::is_current)
    }

    /// The channel with a fresh token in each call (none without TLS).
    pub fn with_token(&self) -> InterceptedService<Channel, OptionalToken> {
        InterceptedService::new(self.channel.clone(), OptionalToken(self.credentials.clone()))
    }
}

/// A [`PerRpcToken`], or nothing on connections without TLS.
#[derive(Clone, Debug)]
pub struct OptionalToken(Option<PerRpcToken>);

impl tonic::service::Interceptor for OptionalToken {
    fn call(&mut self, request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        match &mut self.0 {
            Some(token) => token.call(request),
            None => Ok(request),
        }
    }
}

impl Transport {
    /// Mutual TLS with the identities of `source`, on unix sockets too.
    pub fn new(source: X509Source) -> Result<Self, Error> {
        let (client, server) = (source.client_config()?, source.server_config()?);
        let tls = Some(Tls { source, client, server });
        Ok(Self { tls, keep_alive: None, max_token_lifetime: DEFAULT_TOKEN_LIFETIME })
    }

    /// No TLS: for sockets that are protected by where they are, and for tests.
    pub fn insecure() -> Self {
        Self { tls: None, keep_alive: None, max_token_lifetime: DEFAULT_TOKEN_LIFETIME }
    }

    /// The same with HTTP/2 pings on outgoing connections. Off by default.
    #[must_use]
    pub fn with_keep_alive(mut self, keep_alive: Option<KeepAlive>) -> Self {
        self.keep_alive = keep_alive;
        self
    }

    /// The same with another life of per-RPC tokens. 10 minutes by default.
    #[must_use]
    pub fn with_max_token_lifetime(mut self, lifetime: Duration) -> Self {
        self.max_token_lifetime = lifetime;
        self
    }

    /// The identity; `None` without TLS.
    pub fn source(&self) -> Option<&X509Source> {
        self.tls.as_ref().map(|tls| &tls.source)
    }

    pub(crate) fn server_config(&self) -> Option<Arc<ServerConfig>> {
        self.tls.as_ref().map(|tls| tls.server.clone())
    }

    /// Connects once, TLS handshake included, and returns who answered.
    ///
    /// # Errors
    /// Nobody answers within `limit`, or one side refuses the other.
    pub async fn dial(&self, address: &Address, limit: Duration) -> Result<Link, Error> {
        let fail = |cause: String| Error::Connect { address: address.to_string(), cause };
        let connecting = async {
            // Once more if the SVID was rotated meanwhile: which one the handshake has used is not known then.
            let (stream, svid) = loop {
                let svid = self.tls.as_ref().map(|tls| tls.source.svid());
                let stream = self.connect(address).await.map_err(|cause| fail(cause.to_string()))?;
                let now = self.tls.as_ref().map(|tls| tls.source.svid());
                if svid.as_ref().zip(now.as_ref()).is_none_or(|(before, after)| Arc::ptr_eq(before, after)) {
                    break (stream, svid);
                }
            };
            let info = stream.info().clone();
            let slot = Arc::new(Mutex::new(Some(stream)));
            let channel = self
                .endpoint()
                .connect_with_connector(tower::service_fn(move |_| {
                    let stream = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
                    let gone = || io::Error::new(io::ErrorKind::NotConnected, "the connection has ended");
                    std::future::ready(stream.map(TokioIo::new).ok_or_else(gone))
                }))
                .await
                .map_err(|cause| fail(chain(&cause)))?;
            Ok::<_, Error>((info, svid, channel))
        };
        let (info, svid, channel) =
            timeout(limit, connecting).await.map_err(|_| fail(format!("no connection within {limit:?}")))??;
        let credentials = self
            .tls
            .as_ref()
            .zip(svid)
            .zip(info.peer.clone())
            .map(|((tls, svid), peer)| PerRpcToken::new(tls.source.clone(), svid, peer, self.max_token_lifetime));
        Ok(Link { channel, peer: info.peer, fds: info.fds, credentials })
    }

    /// A channel that connects at the first call, and again after each loss.
    pub fn channel(&self, address: &Address) -> Channel {
        let (transport, address) = (self.clone(), address.clone());
        self.endpoint().connect_with_connector_lazy(tower::service_fn(move |_| {
            let (transport, address) = (transport.clone(), address.clone());
            async move {
                let stream = timeout(CHANNEL_CONNECT_TIMEOUT, transport.connect(&address))
                    .await
                    .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer from {address}")))?
                    .map_err(|cause| io::Error::new(cause.kind(), format!("cannot connect to {address}: {cause}")))?;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        }))
    }

    /// The authority has to be one that every HTTP/2 stack accepts: a socket's path would not be. It is what Go sends.
    fn endpoint(&self) -> Endpoint {
        let endpoint = Endpoint::from_static("http://localhost");
        match self.keep_alive {
            None => endpoint,
            Some(keep_alive) => endpoint
                .http2_keep_alive_interval(keep_alive.interval)
                .keep_alive_timeout(keep_alive.timeout)
                .keep_alive_while_idle(true),
        }
    }

    async fn connect(&self, address: &Address) -> io::Result<Stream> {
        let socket = match address {
            Address::Unix(path) => Socket::Unix(FdStream::new(UnixStream::connect(path).await?)),
            Address::Tcp(host) => {
                let host = if host.starts_with(':') { format!("localhost{host}") } else { host.clone() };
                let socket = TcpStream::connect(host).await?;
                socket.set_nodelay(true)?;
                Socket::Tcp(socket)
            }
        };
        let Some(tls) = &self.tls else { return Ok(Stream::plain(socket)) };
        let session = TlsConnector::from(tls.client.clone()).connect(server_name(address), socket).await?;
        Stream::tls(TlsStream::Client(session))
    }
}

const DEFAULT_TOKEN_LIFETIME: Duration = Duration::from_secs(600);

/// Only a hint to the server; nobody checks it.
fn server_name(address: &Address) -> ServerName<'static> {
    let localhost = || ServerName::IpAddress(std::net::Ipv4Addr::LOCALHOST.into());
    match address {
        Address::Unix(_) => ServerName::try_from("localhost").unwrap_or_else(|_| localhost()),
        Address::Tcp(host) => {
            let name = host.rsplit_once(':').map_or("", |(name, _)| name).trim_matches(['[', ']']);
            ServerName::try_from(name.to_owned()).unwrap_or_else(|_| localhost())
        }
    }
}

pub(crate) fn chain(cause: &dyn std::error::Error) -> String {
    let mut text = cause.to_string();
    let mut next = cause.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    /// Types of the HTTP/2 frames a client has sent within an hour without calls, and its preface.
    async fn frames(transport: &Transport) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("server.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let address = Address::Unix(path);
        let limit = Duration::from_secs(5);
        let (link, accepted) = tokio::join!(transport.dial(&address, limit), listener.accept());
        let (_link, (mut socket, _)) = (link.unwrap(), accepted.unwrap());
        // Time is paused: an hour is over as soon as nobody has anything to do.
        let mut bytes = Vec::new();
        let _ = timeout(Duration::from_secs(3600), socket.read_to_end(&mut bytes)).await;
        assert!(bytes.starts_with(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"));
        let (mut types, mut rest) = (Vec::new(), &bytes[24..]);
        while let [a, b, c, kind, _, _, _, _, _, after @ ..] = rest {
            types.push(*kind);
            rest = &after[u32::from_be_bytes([0, *a, *b, *c]) as usize..];
        }
        types
    }

    /// A grpc-go server with default settings answers pings with `too_many_pings`.
    #[tokio::test(start_paused = true)]
    async fn clients_send_no_pings_unless_told_so() {
        const PING: u8 = 6;
        let quiet = Transport::insecure();
        let sent = frames(&quiet).await;
        assert!(!sent.is_empty() && !sent.contains(&PING), "{sent:?}");
        let pinging = quiet.with_keep_alive(Some(KeepAlive::default()));
        let sent = frames(&pinging).await;
        assert!(sent.contains(&PING), "{sent:?}");
    }

    /// Some servers refuse an authority that is a path.
    #[test]
    fn the_authority_is_an_ordinary_name() {
        let endpoint = Transport::insecure().endpoint();
        assert_eq!(endpoint.uri().authority().map(|authority| authority.as_str()), Some("localhost"));
        let name = |text: &str| server_name(&Address::parse(text).unwrap()).to_str().into_owned();
        assert_eq!(name("unix:///run/nsm.io.sock"), "localhost");
        assert_eq!(name("tcp://registry.nsm:5002"), "registry.nsm");
        assert_eq!(name("tcp://[::1]:5002"), "::1");
    }
}
