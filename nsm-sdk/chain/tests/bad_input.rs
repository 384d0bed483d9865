//! Whatever a client sends over mTLS on a unix socket: a status with the right code, no panic, no leak, and nobody else
//! notices.

#![allow(clippy::unwrap_used, reason = "a test states what it expects by unwrapping it")]

mod world;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use nsm_chain::{Connection, ConnectionContext, NetworkServiceRequest, Path, PathSegment};
use nsm_identity::{Authority, X509Source};
use nsm_proto::networkservice::network_service_client::NetworkServiceClient;
use nsm_transport::{TOKEN_EXPIRES_HEADER, TOKEN_HEADER, Transport, format_rfc3339, with_deadline_code};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair},
};
use std::{
    os::fd::OwnedFd,
    sync::atomic::Ordering::SeqCst,
    time::{Duration, SystemTime},
};
use tonic::{
    Code, Status,
    metadata::{Ascii, MetadataValue},
};
use world::*;

/// A second client whose connection has to stay as it is, whatever the first one does.
struct Bystander {
    client: Raw,
    connection: Connection,
}

impl Bystander {
    async fn connect(world: &World) -> Self {
        let mut client = world.raw("bystander").await;
        let connection = client.request(request("bystander")).await.unwrap().into_inner();
        Self { client, connection }
    }

    /// A refresh changes nothing but tokens, and nobody else's connection is there.
    async fn is_undisturbed(&mut self, world: &World) {
        let again = NetworkServiceRequest { connection: Some(self.connection.clone()), ..Default::default() };
        let mut connection = self.client.request(again).await.unwrap().into_inner();
        let segments = |connection: &Connection| connection.path.clone().unwrap().path_segments;
        let names = |connection: &Connection| {
            segments(connection).into_iter().map(|segment| (segment.name, segment.id)).collect::<Vec<_>>()
        };
        assert_eq!(names(&connection), names(&self.connection));
        connection.path = self.connection.path.clone();
        assert_eq!(connection, self.connection);
        assert_eq!(world.known(), 1, "{:?}", world.endpoint.hub().connections());
    }
}

fn code(result: Result<tonic::Response<Connection>, Status>) -> Code {
    result.map_or_else(|status| status.code(), |_| Code::Ok)
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_are_empty_inconsistent_or_foreign() {
    let world = World::start().await;
    let mut bystander = Bystander::connect(&world).await;
    let mut client = world.raw("nsc").await;
    let at = |index: u32, segments: &[(&str, &str)]| {
        let mut request = request("c");
        let path_segments = segments.iter().map(|(name, id)| PathSegment {
            name: (*name).into(),
            id: (*id).into(),
            ..Default::default()
        });
        *path(&mut request) = Path { index, path_segments: path_segments.collect() };
        request
    };
    for (what, request, expected) in [
        ("nothing at all", NetworkServiceRequest::default(), Code::PermissionDenied),
        ("no segment", at(0, &[]), Code::PermissionDenied),
        ("no segment, but an index", at(7, &[]), Code::PermissionDenied),
        ("an index behind the end", at(1, &[("nsc", "c")]), Code::InvalidArgument),
        ("the largest index", at(u32::MAX, &[("nsc", "c")]), Code::InvalidArgument),
        ("an id that is not the segment's", at(0, &[("nsc", "d")]), Code::InvalidArgument),
        ("the server's own name", at(0, &[("nse", "c")]), Code::PermissionDenied),
    ] {
        let close = request.connection.clone().unwrap_or_default();
        assert_eq!(code(client.request(request).await), expected, "{what}");
        // To close it is the same fault, or success: the server knows nothing of that id.
        let closed = client.close(close).await.map_or_else(|status| status.code(), |_| Code::Ok);
        assert!(closed == Code::Ok || closed == expected, "{what}: {closed:?}");
        assert_eq!(world.seen.closes.load(SeqCst), 0, "{what}");
        bystander.is_undisturbed(&world).await;
    }
    // Who knows all ids of a path may refresh it, as in NSM (no policy is against it): it stays the same connection.
    for index in [0, 1] {
        let mut stolen = request("bystander");
        *path(&mut stolen) = Path { index, ..bystander.connection.path.clone().unwrap() };
        assert_eq!(code(client.request(stolen).await), Code::Ok);
        bystander.is_undisturbed(&world).await;
    }
}

/// A token with any claims, signed by the key of an SVID.
fn signed(source: &X509Source, claims: &str) -> String {
    let random = SystemRandom::new();
    let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, source.svid().key_der(), &random).unwrap();
    let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let text = format!("{}.{}", encode(br#"{"alg":"ES256","typ":"JWT"}"#), encode(claims.as_bytes()));
    let signature = key.sign(&random, text.as_bytes()).unwrap();
    format!("{text}.{}", encode(signature.as_ref()))
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_are_missing_garbled_expired_or_somebody_elses() {
    let world = World::start().await;
    let mut bystander = Bystander::connect(&world).await;
    let (me, other) = (world.source("nsc"), world.source("other"));
    let good = me.sign(Some(SERVER), HOUR).unwrap().jwt;
    let mut bent = good.clone().into_bytes();
    bent[good.len() / 2] ^= 1;
    let claims = |aud: &str, exp: &str| format!(r#"{{"aud":{aud},"exp":{exp},"sub":"spiffe://example.org/nsc"}}"#);
    let own = &format!("\"{SERVER}\"");
    let list = &format!("[{own}]");
    let tokens = [
        ("a good one", good.clone(), Code::Ok),
        ("audience as a string", signed(&me, &claims(own, "99999999999")), Code::Ok),
        ("audience as a list", signed(&me, &claims(list, "99999999999")), Code::Ok),
        ("empty", String::new(), Code::PermissionDenied),
        ("no token", "garbage".into(), Code::PermissionDenied),
        ("one bit wrong", String::from_utf8_lossy(&bent).into_owned(), Code::PermissionDenied),
        ("expired", me.sign(Some(SERVER), Duration::ZERO).unwrap().jwt, Code::PermissionDenied),
        ("expired long ago", signed(&me, &claims(list, "-5")), Code::PermissionDenied),
        ("an end that is no number", signed(&me, &claims(list, "\"soon\"")), Code::PermissionDenied),
        ("no end", signed(&me, &format!(r#"{{"aud":{list},"sub":"x"}}"#)), Code::PermissionDenied),
        ("claims that are no object", signed(&me, "[]"), Code::PermissionDenied),
        ("for somebody else", me.sign(Some("spiffe://example.org/x"), HOUR).unwrap().jwt, Code::PermissionDenied),
        ("an audience of numbers", signed(&me, &claims("[1]", "99999999999")), Code::PermissionDenied),
        ("by somebody else", other.sign(Some(SERVER), HOUR).unwrap().jwt, Code::PermissionDenied),
    ];
    for (what, jwt, expected) in tokens {
        let link = world.link(&me).await;
        let expires = format_rfc3339(SystemTime::now() + HOUR);
        let header: MetadataValue<Ascii> = jwt.parse().unwrap();
        let mut client = NetworkServiceClient::with_interceptor(link.channel, move |mut call: tonic::Request<()>| {
            call.metadata_mut().insert(TOKEN_HEADER, header.clone());
            call.metadata_mut().insert(TOKEN_EXPIRES_HEADER, expires.parse().unwrap());
            Ok(call)
        });
        let answer = client.request(request("c")).await;
        if let (Ok(connection), Code::Ok) = (&answer, expected) {
            client.close(connection.get_ref().clone()).await.unwrap();
        }
        assert_eq!(code(answer), expected, "{what}");
        bystander.is_undisturbed(&world).await;
    }
    // No token at all, and one in the path instead.
    let mut bare = NetworkServiceClient::new(world.link(&me).await.channel);
    assert_eq!(code(bare.request(request("c")).await), Code::PermissionDenied);
    let mut in_path = request("c");
    path(&mut in_path).path_segments[0].token = good;
    assert_eq!(code(bare.request(in_path).await), Code::InvalidArgument, "without an end nobody could time it out");
    bystander.is_undisturbed(&world).await;
}

/// A file whose inode can be named.
fn file(folder: &tempfile::TempDir, name: &str) -> OwnedFd {
    std::fs::File::create(folder.path().join(name)).unwrap().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_that_are_missing_wrong_or_sent_twice() {
    let world = World::start().await;
    let mut bystander = Bystander::connect(&world).await;
    let folder = tempfile::tempdir().unwrap();
    let offer = |urls: &[&str]| {
        let mut request = request("c");
        request.mechanism_preferences =
            urls.iter().map(|url| mechanism("KERNEL", &[("name", "nsm-0"), ("inodeURL", url)])).collect();
        request
    };
    let short = Duration::from_millis(300);
    let before = open_files();
    for round in 0..20 {
        let link = world.link(&world.source("nsc")).await;
        let fds = link.fds.clone().unwrap();
        let mut client = NetworkServiceClient::new(link.with_token());

        let named = |(dev, ino): (u64, u64)| format!("inode://{dev}/{ino}");
        let wanted = named(nsm_transport::inode_of(file(&folder, "wanted")).unwrap());
        if round == 0 {
            // Promised, and never sent; then another one in its place.
            // (A client that does not tell the end of its own waiting from a caller's that left would see CANCELLED.)
            let late = with_deadline_code(client.request(timed(offer(&[&wanted]), short)).await);
            assert_eq!(code(late), Code::DeadlineExceeded);
            fds.queue(file(&folder, "other")).unwrap();
            let late = with_deadline_code(client.request(timed(offer(&[&wanted]), short)).await);
            assert_eq!(code(late), Code::DeadlineExceeded);
            for garbage in ["inode://", "inode://4", "inode://x/y", "inode://-1/1", "inode://1/2/3"] {
                assert_eq!(code(client.request(offer(&[garbage])).await), Code::InvalidArgument, "{garbage}");
            }
        }
        // Two descriptors of one inode are one.
        let twice = named(fds.queue(file(&folder, "twice")).unwrap());
        fds.queue(file(&folder, "twice")).unwrap();
        let connection = client.request(timed(offer(&[&twice, &twice]), LIMIT)).await.unwrap().into_inner();
        assert_eq!(connection.mechanism.as_ref().unwrap().parameters["inodeURL"], twice);
        let inside = world.seen.last.lock().unwrap().mechanism.clone().unwrap();
        assert!(inside.parameters["inodeURL"].starts_with("file:///proc/self/fd/"), "{inside:?}");
        // More than anybody asks for.
        for n in 0..50 {
            fds.queue(file(&folder, &n.to_string())).unwrap();
        }
        client.close(connection).await.unwrap();
        bystander.is_undisturbed(&world).await;
    }
    // Other tests of this process open some meanwhile, but not a thousand.
    eventually("all descriptors are closed again", || open_files() < before + 200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn contexts_that_are_nil_and_mechanisms_that_are_unknown() {
    let world = World::start().await;
    let mut bystander = Bystander::connect(&world).await;
    let mut client = world.raw("nsc").await;

    // Nil context, nil addresses: both are as good as empty ones.
    for context in [None, Some(ConnectionContext::default())] {
        let mut request = request("c");
        request.connection.as_mut().unwrap().context = context;
        let connection = client.request(request).await.unwrap().into_inner();
        let addresses = connection.context.clone().unwrap().ip_context.unwrap().src_ip_addrs;
        assert_eq!(addresses, ["172.16.0.3/32"]);
        client.close(connection).await.unwrap();
    }
    // Addresses that are none are left out, never repeated.
    let mut odd = request("c");
    let context = odd.connection.as_mut().unwrap().context.get_or_insert_default().ip_context.get_or_insert_default();
    context.src_ip_addrs = vec!["".into(), "1.2.3.4".into(), "172.16.0.0/33".into(), "\u{0}".into()];
    context.excluded_prefixes = vec!["/".into(), "::/129".into()];
    let connection = client.request(odd).await.unwrap().into_inner();
    assert_eq!(connection.context.clone().unwrap().ip_context.unwrap().src_ip_addrs, ["172.16.0.3/32"]);
    client.close(connection).await.unwrap();

    let mut unknown = request("c");
    unknown.connection.as_mut().unwrap().mechanism = Some(mechanism("MEMIF", &[]));
    let status = client.request(unknown).await.unwrap_err();
    assert!(status.code() == Code::Unknown && status.message().contains("unsupported mechanism MEMIF"), "{status}");
    for preferences in [vec![], vec![mechanism("MEMIF", &[]), mechanism("", &[])]] {
        let mut request = request("c");
        request.mechanism_preferences = preferences;
        let status = client.request(request).await.unwrap_err();
        assert!(status.message().contains("cannot support any of the requested mechanism"), "{status}");
    }
    bystander.is_undisturbed(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_too_large() {
    let world = World::start().await;
    let mut bystander = Bystander::connect(&world).await;
    let mut client = world.raw("nsc").await;
    let mut large = request("c");
    large.connection.as_mut().unwrap().labels.insert("x".into(), "y".repeat(5 << 20));
    let status = client.request(large).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status}");
    // Many segments are not many bytes: still a path that is refused, quickly.
    let mut long = request("c");
    path(&mut long).path_segments.extend(vec![PathSegment::default(); 100_000]);
    path(&mut long).index = 99_999;
    assert_eq!(code(client.request(long).await), Code::InvalidArgument);
    // The transport connection is as good as before.
    let connection = client.request(request("c")).await.unwrap().into_inner();
    client.close(connection).await.unwrap();
    bystander.is_undisturbed(&world).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_of_a_foreign_trust_domain_and_without_certificate() {
    let world = World::start().await;
    let mut bystander = Bystander::connect(&world).await;
    for (domain, path) in [("example.com", "/nsc"), ("example.org", "/nsc")] {
        // The second has the right name, but another authority.
        let foreign = Authority::generate(domain).unwrap().source(path, HOUR).unwrap();
        let refused = Transport::new(foreign).unwrap().dial(&world.address(), LIMIT).await;
        assert!(refused.is_err());
    }
    let plain = Transport::insecure().dial(&world.address(), LIMIT).await;
    if let Ok(link) = plain {
        assert!(NetworkServiceClient::new(link.channel).request(request("c")).await.is_err());
    }
    bystander.is_undisturbed(&world).await;
    assert_eq!(world.seen.closes.load(SeqCst), 0);
}
