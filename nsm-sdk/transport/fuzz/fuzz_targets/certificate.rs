//! The certificate that a client shows: nothing but one of the authority is trusted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nsm_identity::{Authority, X509Source};
use std::{sync::LazyLock, time::Duration};

/// A server, and the certificate of a client that it trusts.
static SETUP: LazyLock<(X509Source, Vec<u8>)> = LazyLock::new(|| {
    let authority = Authority::generate("example.org").expect("a key");
    let day = Duration::from_secs(86_400);
    let client = authority.source("/client", day).expect("an identity");
    let leaf = client.svid().chain().first().expect("a certificate").to_vec();
    (authority.source("/server", day).expect("an identity"), leaf)
});

// Arbitrary bytes hardly ever are a certificate, so half of the inputs are changes of a genuine one: place, place, value.
fuzz_target!(|bytes: &[u8]| {
    let (server, genuine) = &*SETUP;
    let shown = match bytes.split_first() {
        Some((kind, changes)) if kind % 2 == 1 => {
            let mut shown = genuine.clone();
            for change in changes.chunks_exact(3) {
                let at = usize::from(u16::from_be_bytes([change[0], change[1]])) % shown.len();
                shown[at] = change[2];
            }
            shown
        }
        _ => bytes.to_vec(),
    };
    assert_eq!(nsm_transport::unauthenticated::certificate(server, &shown), shown == *genuine);
});
