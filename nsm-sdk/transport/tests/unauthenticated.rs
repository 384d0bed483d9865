//! Properties of what a server does with bytes before it knows whose they are. The same functions are fuzz targets.
#![allow(clippy::unwrap_used, reason = "a test states what it expects by unwrapping it")]

use nsm_identity::{Authority, X509Source};
use nsm_transport::unauthenticated::{certificate, handshake};
use proptest::prelude::*;
use std::{sync::LazyLock, time::Duration};

const HOUR: Duration = Duration::from_secs(3600);

struct Setup {
    server: X509Source,
    client: X509Source,
    /// What a genuine client sends first.
    hello: Vec<u8>,
}

static SETUP: LazyLock<Setup> = LazyLock::new(|| {
    let authority = Authority::generate("example.org").unwrap();
    let (server, client) = (authority.source("/server", HOUR).unwrap(), authority.source("/client", HOUR).unwrap());
    let name = "localhost".try_into().unwrap();
    let mut session = rustls::ClientConnection::new(client.client_config().unwrap(), name).unwrap();
    let mut hello = Vec::new();
    session.write_tls(&mut hello).unwrap();
    Setup { server, client, hello }
});

/// Bytes with a few places changed, cut and repeated.
fn bent(original: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    let places = proptest::collection::vec((0..original.len(), any::<u8>()), 0..8);
    (places, 0..=original.len(), 1..3_usize).prop_map(|(places, end, times)| {
        let mut bytes = original.to_vec();
        for (at, value) in places {
            bytes[at] = value;
        }
        bytes.truncate(end);
        bytes.repeat(times)
    })
}

fn leaf() -> &'static [u8] {
    static LEAF: LazyLock<Vec<u8>> = LazyLock::new(|| SETUP.client.svid().chain()[0].to_vec());
    &LEAF
}

#[test]
fn what_is_genuine_goes_on() {
    assert!(certificate(&SETUP.server, leaf()));
    // A first flight is no handshake yet, but no fault either.
    let config = SETUP.server.server_config().unwrap();
    assert!(!handshake(&config, &SETUP.hello));
    let mut session = rustls::ServerConnection::new(config).unwrap();
    session.read_tls(&mut &SETUP.hello[..]).unwrap();
    session.process_new_packets().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Bytes that were not made for this server authenticate nobody, and are no reason to panic.
    #[test]
    fn no_bytes_are_a_handshake(bytes in prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..512),
        bent(&SETUP.hello),
    ]) {
        prop_assert!(!handshake(&SETUP.server.server_config().unwrap(), &bytes));
    }

    /// A certificate with one bit changed, or one of nobody, is not trusted.
    #[test]
    fn no_other_bytes_are_a_certificate(bytes in prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..512),
        bent(leaf()),
    ]) {
        prop_assert!(bytes == leaf() || !certificate(&SETUP.server, &bytes));
    }
}
