//! gRPC over the transport: identities, descriptors, rotation.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use nsm_identity::{Authority, X509Source};
use nsm_proto::registry::{
    NetworkService, NetworkServiceQuery, NetworkServiceResponse,
    network_service_registry_client::NetworkServiceRegistryClient,
    network_service_registry_server::{NetworkServiceRegistry, NetworkServiceRegistryServer},
};
use nsm_transport::{Address, ConnInfo, Link, Listener, Transport, client_token, inode_of};
use std::{
    fs::File,
    os::fd::OwnedFd,
    pin::Pin,
    time::{Duration, Instant},
};
use tokio::{task::JoinHandle, time::timeout};
use tokio_stream::{Stream, StreamExt, wrappers::IntervalStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};

const HOUR: Duration = Duration::from_secs(3600);
const LIMIT: Duration = Duration::from_secs(10);

/// Register checks that the descriptor named `dev/ino` arrived; Unregister tells who called; Find ticks for ever.
struct Probe;

#[tonic::async_trait]
impl NetworkServiceRegistry for Probe {
    async fn register(&self, request: Request<NetworkService>) -> Result<Response<NetworkService>, Status> {
        let fds = request.extensions().get::<ConnInfo>().and_then(|info| info.fds.clone());
        let fds = fds.ok_or_else(|| Status::failed_precondition("no descriptors here"))?;
        for name in request.get_ref().name.split(',') {
            let (dev, ino) = name.split_once('/').unwrap();
            let deadline = tokio::time::Instant::now() + LIMIT;
            let fd = fds.take(dev.parse().unwrap(), ino.parse().unwrap(), Some(deadline)).await?;
            assert_eq!(inode_of(&fd).unwrap(), (dev.parse().unwrap(), ino.parse().unwrap()));
        }
        Ok(Response::new(request.into_inner()))
    }

    async fn unregister(&self, request: Request<NetworkService>) -> Result<Response<()>, Status> {
        let peer = request.extensions().get::<ConnInfo>().and_then(|info| info.peer.clone()).map(|peer| peer.spiffe_id);
        let token = client_token(request.metadata());
        let claims = token.map(|token| nsm_identity::token::decode(&token.jwt).unwrap());
        Err(Status::unknown(format!(
            "{} {}",
            peer.unwrap_or_default(),
            claims.map(|c| c.aud.join(",")).unwrap_or_default()
        )))
    }

    type FindStream = Pin<Box<dyn Stream<Item = Result<NetworkServiceResponse, Status>> + Send>>;

    async fn find(&self, _: Request<NetworkServiceQuery>) -> Result<Response<Self::FindStream>, Status> {
        let ticks = IntervalStream::new(tokio::time::interval(Duration::from_millis(10)));
        Ok(Response::new(Box::pin(ticks.map(|_| Ok(NetworkServiceResponse::default())))))
    }
}

struct Served {
    address: Address,
    stop: CancellationToken,
    server: JoinHandle<Result<(), nsm_transport::Error>>,
    _dir: tempfile::TempDir,
}

async fn serve(transport: &Transport, tcp: bool) -> Served {
    let dir = tempfile::tempdir().unwrap();
    let address = match tcp {
        true => Address::parse("tcp://127.0.0.1:0").unwrap(),
        false => Address::Unix(dir.path().join("deep/er/test.sock")),
    };
    let listener = Listener::bind(&address).await.unwrap();
    let (address, stop, transport) = (listener.address().clone(), CancellationToken::new(), transport.clone());
    let routes = Routes::new(NetworkServiceRegistryServer::new(Probe));
    let stopped = stop.clone();
    let server = tokio::spawn(async move { transport.serve(vec![listener], routes, stopped).await });
    Served { address, stop, server, _dir: dir }
}

fn source(authority: &Authority, path: &str) -> X509Source {
    authority.source(path, HOUR).unwrap()
}

fn transport(source: &X509Source) -> Transport {
    Transport::new(source.clone()).unwrap()
}

async fn caller(link: &Link) -> String {
    let mut client = NetworkServiceRegistryClient::new(link.with_token());
    client.unregister(NetworkService::default()).await.unwrap_err().message().to_owned()
}

async fn pass(link: &Link, count: usize) {
    let dir = tempfile::tempdir().unwrap();
    let fds = link.fds.clone().unwrap();
    let names: Vec<_> = (0..count)
        .map(|n| OwnedFd::from(File::create_new(dir.path().join(n.to_string())).unwrap()))
        .map(|fd| fds.queue(fd).unwrap())
        .map(|(dev, ino)| format!("{dev}/{ino}"))
        .collect();
    let name = names.join(",");
    NetworkServiceRegistryClient::new(link.with_token())
        .register(NetworkService { name, ..Default::default() })
        .await
        .unwrap();
}

#[tokio::test]
async fn identities_and_tokens_travel() {
    let authority = Authority::generate("example.org").unwrap();
    for tcp in [false, true] {
        let served = serve(&transport(&source(&authority, "/server")), tcp).await;
        let link = transport(&source(&authority, "/client")).dial(&served.address, LIMIT).await.unwrap();
        assert_eq!(link.peer.as_ref().unwrap().spiffe_id, "spiffe://example.org/server");
        assert_eq!(link.fds.is_some(), !tcp);
        assert_eq!(caller(&link).await, "spiffe://example.org/client spiffe://example.org/server");
    }
}

#[tokio::test]
async fn descriptors_pass_in_plain_and_below_tls() {
    let authority = Authority::generate("example.org").unwrap();
    let plain = serve(&Transport::insecure(), false).await;
    pass(&Transport::insecure().dial(&plain.address, LIMIT).await.unwrap(), 10).await;
    let secure = serve(&transport(&source(&authority, "/server")), false).await;
    let link = transport(&source(&authority, "/client")).dial(&secure.address, LIMIT).await.unwrap();
    pass(&link, 1).await;
    pass(&link, 300).await;
}

#[tokio::test]
async fn strangers_are_refused() {
    let (ours, theirs) = (Authority::generate("example.org").unwrap(), Authority::generate("example.org").unwrap());
    let foreign = Authority::generate("example.com").unwrap();
    for tcp in [false, true] {
        let served = serve(&transport(&source(&ours, "/server")), tcp).await;
        for authority in [&theirs, &foreign] {
            let refused = transport(&source(authority, "/client")).dial(&served.address, LIMIT).await;
            assert!(refused.unwrap_err().to_string().contains("not trusted"));
        }
        // Without TLS, so without a certificate: the server never answers a request.
        let plain = Transport::insecure().dial(&served.address, LIMIT).await;
        if let Ok(link) = plain {
            let answer = NetworkServiceRegistryClient::new(link.channel)
                .unregister(NetworkService::default())
                .await
                .unwrap_err();
            assert!(!answer.message().contains("spiffe"), "{answer}");
        }
        let link = transport(&source(&ours, "/client")).dial(&served.address, LIMIT).await.unwrap();
        assert!(caller(&link).await.starts_with("spiffe://example.org/client"), "the server is still there");
    }
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let authority = Authority::generate("example.org").unwrap();
    let served = serve(&transport(&source(&authority, "/server")), true).await;
    let Address::Tcp(host) = &served.address else { panic!() };
    // Trusts the server, shows nothing.
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.certificate().clone()).unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(std::sync::Arc::new(Anything))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let socket = tokio::net::TcpStream::connect(host).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    let refused = async {
        let mut stream = connector.connect("localhost".try_into().unwrap(), socket).await?;
        tokio::io::AsyncReadExt::read_u8(&mut stream).await
    };
    assert!(timeout(LIMIT, refused).await.unwrap().is_err());
}

/// grpc-go refuses connections that were not agreed to be HTTP/2, in both directions; so does this side.
#[tokio::test]
async fn both_sides_insist_on_http2() {
    let authority = Authority::generate("example.org").unwrap();
    let (client, server) = (source(&authority, "/client"), source(&authority, "/server"));
    let served = serve(&transport(&server), true).await;
    let Address::Tcp(host) = &served.address else { panic!() };
    for protocols in [vec![], vec![b"http/1.1".to_vec()]] {
        let mut config = (*client.client_config().unwrap()).clone();
        config.alpn_protocols = protocols;
        let socket = tokio::net::TcpStream::connect(host).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
        let refused = async {
            let mut stream = connector.connect("localhost".try_into().unwrap(), socket).await?;
            tokio::io::AsyncReadExt::read_u8(&mut stream).await
        };
        assert!(timeout(LIMIT, refused).await.unwrap().is_err());
    }
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::Tcp(listener.local_addr().unwrap().to_string());
    let mut config = (*server.server_config().unwrap()).clone();
    config.alpn_protocols.clear();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let accepting = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        acceptor.accept(socket).await
    });
    let refused = transport(&client).dial(&address, LIMIT).await.unwrap_err().to_string();
    assert!(refused.contains("h2"), "{refused}");
    accepting.abort();
}

#[derive(Debug)]
struct Anything;

impl rustls::client::danger::ServerCertVerifier for Anything {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

#[tokio::test]
async fn the_authorizer_decides() {
    let authority = Authority::generate("example.org").unwrap();
    let picky = source(&authority, "/server").with_authorizer(|id| id.path() == "/friend");
    let served = serve(&transport(&picky), false).await;
    let friend = transport(&source(&authority, "/friend")).dial(&served.address, LIMIT).await.unwrap();
    assert!(caller(&friend).await.starts_with("spiffe://example.org/friend"));
    // In TLS 1.3 a client learns at its first read that it was refused.
    if let Ok(link) = transport(&source(&authority, "/stranger")).dial(&served.address, LIMIT).await {
        assert!(!caller(&link).await.contains("spiffe"));
    }
}

#[tokio::test]
async fn rotation_ends_no_stream_and_shows_in_the_next_handshake() {
    let authority = Authority::generate("example.org").unwrap();
    let (server, client) = (source(&authority, "/server"), source(&authority, "/client"));
    let served = serve(&transport(&server), false).await;
    let transport = transport(&client);
    let link = transport.dial(&served.address, LIMIT).await.unwrap();
    let mut ticks = NetworkServiceRegistryClient::new(link.channel.clone())
        .find(NetworkServiceQuery::default())
        .await
        .unwrap()
        .into_inner();
    ticks.next().await.unwrap().unwrap();
    server.update(authority.identity("/server", HOUR).unwrap());
    client.update(authority.identity("/client2", HOUR).unwrap());
    for _ in 0..20 {
        timeout(LIMIT, ticks.next()).await.unwrap().unwrap().unwrap();
    }
    let next = transport.dial(&served.address, LIMIT).await.unwrap();
    assert_ne!(next.peer, link.peer, "another certificate");
    assert!(caller(&next).await.starts_with("spiffe://example.org/client2"));
}

#[tokio::test]
async fn a_channel_comes_back_and_a_link_does_not() {
    let authority = Authority::generate("example.org").unwrap();
    let (server, client) = (transport(&source(&authority, "/server")), transport(&source(&authority, "/client")));
    let served = serve(&server, false).await;
    let (link, channel) = (client.dial(&served.address, LIMIT).await.unwrap(), client.channel(&served.address));
    let mut tap = NetworkServiceRegistryClient::new(channel);
    assert!(tap.unregister(NetworkService::default()).await.unwrap_err().message().contains("client"));
    // A stream that never ends does not hold up the stop.
    let mut ticks = tap.find(NetworkServiceQuery::default()).await.unwrap().into_inner();
    ticks.next().await.unwrap().unwrap();
    let started = Instant::now();
    served.stop.cancel();
    timeout(LIMIT, served.server).await.unwrap().unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(2));
    while let Some(Ok(_)) = timeout(LIMIT, ticks.next()).await.unwrap() {}
    assert!(!tap.unregister(NetworkService::default()).await.unwrap_err().message().contains("client"));

    let listener = Listener::bind(&served.address).await.unwrap();
    let again = tokio::spawn(async move {
        server
            .serve(vec![listener], Routes::new(NetworkServiceRegistryServer::new(Probe)), CancellationToken::new())
            .await
    });
    let deadline = Instant::now() + LIMIT;
    while !tap.unregister(NetworkService::default()).await.unwrap_err().message().contains("client") {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!caller(&link).await.contains("client"));
    again.abort();
}

#[tokio::test]
async fn a_silent_client_holds_up_nobody() {
    let authority = Authority::generate("example.org").unwrap();
    let served = serve(&transport(&source(&authority, "/server")), false).await;
    let Address::Unix(path) = &served.address else { panic!() };
    let mut silent = Vec::new();
    // First there is room for all of them, then for no more.
    for (clients, takes) in [(20, Duration::from_secs(1)), (80, Duration::from_secs(6))] {
        for _ in 0..clients {
            silent.push(tokio::net::UnixStream::connect(path).await.unwrap());
        }
        let started = Instant::now();
        let link = transport(&source(&authority, "/client")).dial(&served.address, LIMIT).await.unwrap();
        assert!(caller(&link).await.contains("client"));
        assert!(started.elapsed() < takes, "{:?}", started.elapsed());
    }
}

#[tokio::test]
async fn nobody_there_is_an_error_in_time() {
    let client = transport(&source(&Authority::generate("example.org").unwrap(), "/client"));
    let nowhere = Address::parse("unix:///nonexistent/x.sock").unwrap();
    assert!(client.dial(&nowhere, LIMIT).await.unwrap_err().to_string().contains("unix:///nonexistent/x.sock"));
    // Accepts, never speaks.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::Tcp(silent.local_addr().unwrap().to_string());
    let started = Instant::now();
    client.dial(&address, Duration::from_millis(100)).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(2));
}
