//! The certificate that a client shows: nothing but one of the authority is trusted.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nsm_identity::{Authority, X509Source};
use std::{sync::LazyLock, time::Duration};

static SOURCE: LazyLock<X509Source> = LazyLock::new(|| {
    let authority = Authority::generate("example.org").expect("a key");
    authority.source("/server", Duration::from_secs(86_400)).expect("an identity")
});

fuzz_target!(|bytes: &[u8]| {
    assert!(!nsm_transport::unauthenticated::certificate(&SOURCE, bytes));
});
