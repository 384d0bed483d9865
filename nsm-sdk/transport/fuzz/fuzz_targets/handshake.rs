//! All bytes that a client sends before it is known: nothing but a genuine handshake may authenticate it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nsm_identity::{Authority, X509Source};
use std::{sync::LazyLock, time::Duration};

static SOURCE: LazyLock<X509Source> = LazyLock::new(|| {
    let authority = Authority::generate("example.org").expect("a key");
    authority.source("/server", Duration::from_secs(86_400)).expect("an identity")
});

fuzz_target!(|bytes: &[u8]| {
    let config = SOURCE.server_config().expect("a configuration");
    assert!(!nsm_transport::unauthenticated::handshake(&config, bytes));
});
