use super::*;
use nsm_identity::{Authority, X509Source};
use std::time::Duration;

const HOUR: Duration = Duration::from_secs(3600);

struct Setup {
    a: X509Source,
    b: X509Source,
}

impl Setup {
    fn new() -> Self {
        let authority = Authority::generate("example.org").unwrap();
        let source = |path: &str| authority.source(path, 2 * HOUR).unwrap();
        Self { a: source("/a"), b: source("/b") }
    }
}

/// A segment whose token is signed by `source` for `audience`.
fn segment(source: &X509Source, audience: Option<&X509Source>) -> PathSegment {
    let audience = audience.map(X509Source::spiffe_id);
    PathSegment { token: source.sign(audience.as_deref(), HOUR).unwrap().jwt, ..Default::default() }
}

fn leaf(source: &X509Source) -> Vec<u8> {
    source.svid().chain()[0].to_vec()
}

fn check(policy: Policy, index: usize, segments: &[PathSegment], leaf: &[u8]) -> bool {
    policy.check(&Input { index, segments, leaf, now: SystemTime::now() }).is_ok()
}

// Conformance 22
#[test]
fn tokens_valid_and_expired() {
    let Setup { a, b } = Setup::new();
    let good = segment(&a, Some(&b));
    let garbage = PathSegment { token: "gar.ba.ge".into(), ..Default::default() };
    for policy in [TokensValid, TokensExpired] {
        assert!(check(policy, 0, &[], &[]));
        assert!(check(policy, 0, &[good.clone(), good.clone()], &[]));
        for bad in [&garbage, &PathSegment::default()] {
            assert!(!check(policy, 0, &[good.clone(), bad.clone()], &[]));
        }
    }
    let segments = &[good];
    let at = |after| Input { index: 0, segments, leaf: &[], now: SystemTime::now() + after };
    assert!(TokensExpired.check(&at(HOUR / 2)).is_ok());
    assert!(TokensExpired.check(&at(HOUR)).unwrap_err().contains("expired"));
}

// Conformance 22
#[test]
fn tokens_chained() {
    let Setup { a, b } = Setup::new();
    assert!(check(TokensChained, 0, &[segment(&a, None)], &[]));
    assert!(check(TokensChained, 0, &[segment(&a, Some(&b)), segment(&b, None)], &[]));
    assert!(!check(TokensChained, 0, &[segment(&a, Some(&a)), segment(&b, None)], &[]));
    assert!(!check(TokensChained, 0, &[segment(&a, None), segment(&b, None)], &[]));
}

// Conformance 22
#[test]
fn signatures_of_neighbours() {
    let Setup { a, b } = Setup::new();
    let path = [segment(&a, Some(&b)), segment(&b, Some(&a))];
    assert!(check(PrevTokenSigned, 1, &path, &leaf(&a)));
    assert!(!check(PrevTokenSigned, 1, &path, &leaf(&b)));
    assert!(!check(PrevTokenSigned, 0, &path, &leaf(&a)));
    assert!(!check(PrevTokenSigned, 7, &path, &leaf(&a)));
    assert!(check(NextTokenSigned, 0, &path, &leaf(&b)));
    assert!(!check(NextTokenSigned, 0, &path, &leaf(&a)));
    assert!(!check(NextTokenSigned, 1, &path, &leaf(&b)));
    assert!(!check(NextTokenSigned, usize::MAX, &path, &leaf(&b)));
    assert!(!check(PrevTokenSigned, 1, &path, b"no certificate"));
}

// Conformance 23, 24
#[test]
fn owners_and_service_connections() {
    assert!(client_allowed(None, "a") && client_allowed(Some("a"), "a") && !client_allowed(Some("b"), "a"));
    assert!(service_connection(["1", "2"], ["2", "3"]));
    assert!(!service_connection(["1"], ["2"]) && !service_connection([], ["1"]) && !service_connection(["1"], []));
}

// Conformance 25
#[test]
fn masks() {
    let count = |masks: &[&str]| Policies::from_masks(masks).0.len();
    assert_eq!(count(&["etc/nsm/opa/.*"]), 5);
    assert_eq!(count(&["etc/nsm/opa/common/tokens_.*.rego"]), 3);
    assert_eq!(count(&["etc/nsm/opa/common/.*.rego", "etc/nsm/opa/server/.*.rego"]), 4);
    assert_eq!(count(&["etc/nsm/opa/server/prev_token_signed.rego"]), 1);
    assert_eq!(count(&["etc/nsm/opa/server"]), 0);
    assert_eq!(count(&[]), 0);
    assert_eq!(Policies::from_masks(&["etc/nsm/opa/common/.*", "etc/nsm/opa/server/.*"]), Policies::server());
}

proptest::proptest! {
    /// Whatever stands in a path: an answer, no panic.
    #[test]
    fn any_path_gets_an_answer(tokens in proptest::collection::vec("[a-zA-Z0-9._-]{0,40}", 0..4), index: usize) {
        let segments: Vec<_> = tokens.into_iter().map(|token| PathSegment { token, ..Default::default() }).collect();
        for policy in ALL {
            let _ = check(policy, index, &segments, b"leaf");
        }
    }
}
