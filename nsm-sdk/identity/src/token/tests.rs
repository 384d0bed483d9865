use super::*;
use crate::{Authority, X509Source};

fn source(path: &str) -> X509Source {
    Authority::generate("example.org").unwrap().source(path, Duration::from_secs(3600)).unwrap()
}

fn leaf(source: &X509Source) -> Vec<u8> {
    source.svid().chain()[0].to_vec()
}

#[test]
fn signed_tokens_verify() {
    let me = source("/me");
    let token = me.sign(Some("spiffe://example.org/you"), Duration::from_secs(600)).unwrap();
    let claims = verify_es256(&token.jwt, &leaf(&me)).unwrap();
    assert_eq!(claims.sub, "spiffe://example.org/me");
    assert_eq!(claims.aud, ["spiffe://example.org/you"]);
    assert_eq!(SystemTime::UNIX_EPOCH + Duration::from_secs(claims.exp.unwrap()), token.expires);
    assert!(!claims.expired(SystemTime::now()));
    assert!(claims.expired(token.expires));
    let header = String::from_utf8(URL_SAFE_NO_PAD.decode(token.jwt.split('.').next().unwrap()).unwrap()).unwrap();
    assert_eq!(header, r#"{"alg":"ES256","typ":"JWT"}"#);
    let body = String::from_utf8(URL_SAFE_NO_PAD.decode(token.jwt.split('.').nth(1).unwrap()).unwrap()).unwrap();
    assert!(body.starts_with(r#"{"aud":["spiffe://example.org/you"],"exp":"#), "{body}");
    assert!(verify_es256(&token.jwt, &leaf(&source("/me"))).is_err(), "another key");
}

#[test]
fn without_audience_the_claim_is_left_out() {
    let me = source("/me");
    let token = me.sign(None, Duration::from_secs(600)).unwrap();
    assert!(decode(&token.jwt).unwrap().aud.is_empty());
    let body = URL_SAFE_NO_PAD.decode(token.jwt.split('.').nth(1).unwrap()).unwrap();
    assert!(!String::from_utf8(body).unwrap().contains("aud"));
}

#[test]
fn life_is_capped_by_the_certificate() {
    let me = source("/me");
    let token = me.sign(None, Duration::from_secs(86400)).unwrap();
    assert_eq!(token.expires, me.svid().not_after());
}

#[test]
fn cached_tokens_are_shared_and_change_with_the_key() {
    let authority = Authority::generate("example.org").unwrap();
    let me = authority.source("/me", Duration::from_secs(3600)).unwrap();
    let life = Duration::from_secs(600);
    let first = me.token(Some("spiffe://example.org/you"), life).unwrap();
    assert_eq!(first, me.token(Some("spiffe://example.org/you"), life).unwrap());
    assert_ne!(first, me.token(Some("spiffe://example.org/other"), life).unwrap());
    me.update(authority.identity("/me", Duration::from_secs(3600)).unwrap());
    let second = me.token(Some("spiffe://example.org/you"), life).unwrap();
    assert!(verify_es256(&second.jwt, &leaf(&me)).is_ok());
}

fn unsigned(header: &str, claims: &str) -> String {
    format!("{}.{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims), URL_SAFE_NO_PAD.encode("x"))
}

#[test]
fn audience_may_be_a_string() {
    let jwt = unsigned(r#"{"alg":"ES256"}"#, r#"{"sub":"a","aud":"b","exp":1.5}"#);
    assert_eq!(decode(&jwt).unwrap(), Claims { sub: "a".into(), aud: vec!["b".into()], exp: Some(1) });
    assert!(verify_es256(&jwt, &leaf(&source("/me"))).is_err());
}

#[test]
fn a_token_without_end_has_ended() {
    let jwt = unsigned(r#"{"alg":"ES256"}"#, r#"{"sub":"a"}"#);
    assert!(decode(&jwt).unwrap().expired(SystemTime::UNIX_EPOCH));
}

#[test]
fn other_algorithms_are_refused() {
    let me = source("/me");
    for alg in ["none", "HS256", "RS256", ""] {
        let jwt = unsigned(&format!(r#"{{"alg":"{alg}"}}"#), r#"{"sub":"a","exp":99999999999}"#);
        assert!(verify_es256(&jwt, &leaf(&me)).is_err(), "{alg}");
    }
}

#[test]
fn garbage_is_an_error() {
    let me = source("/me");
    for jwt in ["", ".", "..", "...", "a.b", "a.b.c.d", "é.é.é", "e30.e30.", "e30.W10.AA", "\0"] {
        assert!(decode(jwt).is_err() && verify_es256(jwt, &leaf(&me)).is_err(), "{jwt}");
    }
    let token = me.sign(None, Duration::from_secs(60)).unwrap().jwt;
    for at in 0..token.len() {
        let mut bent = token.clone().into_bytes();
        bent[at] ^= 1;
        let Ok(bent) = String::from_utf8(bent) else { continue };
        let verdict = verify_es256(&bent, &leaf(&me));
        assert!(verdict.is_err(), "bit at {at}");
    }
    assert!(verify_es256(&token, b"not a certificate").is_err());
}

/// Signer, its leaf, and a genuine token.
static GENUINE: std::sync::LazyLock<(X509Source, Vec<u8>, String)> = std::sync::LazyLock::new(|| {
    let source = source("/nsc");
    let (leaf, jwt) =
        (leaf(&source), source.sign(Some("spiffe://example.org/mgr"), Duration::from_secs(3600)).unwrap().jwt);
    (source, leaf, jwt)
});

proptest::proptest! {
    /// Whatever text comes as a token gets an answer, and only the signer's own is the signer's.
    #[test]
    fn no_other_text_is_a_token(text in ".{0,200}", places in proptest::collection::vec((0..500_usize, 33..127_u8), 1..6), end in 0..500_usize) {
        let (_, leaf, jwt) = &*GENUINE;
        proptest::prop_assert!(verify_es256(&text, leaf).is_err());
        let mut bent = jwt.clone().into_bytes();
        for (at, byte) in places {
            let at = at % bent.len();
            bent[at] = byte;
        }
        bent.truncate(end.max(1));
        let bent = String::from_utf8(bent).unwrap();
        let _ = decode(&bent);
        proptest::prop_assert!(bent == *jwt || verify_es256(&bent, leaf).is_err(), "{bent}");
    }

    /// Any audience travels as it is, and no token outlives what was asked for.
    #[test]
    fn what_is_signed_reads_back(audience in ".{0,60}", life in 0..7200_u64) {
        let (source, leaf, _) = &*GENUINE;
        let before = SystemTime::now();
        let token = source.sign(Some(&audience), Duration::from_secs(life)).unwrap();
        let claims = verify_es256(&token.jwt, leaf).unwrap();
        proptest::prop_assert_eq!((&claims.aud, &claims.sub), (&vec![audience], &source.spiffe_id()));
        let end = before + Duration::from_secs(life + 2);
        proptest::prop_assert!(claims.expired(end));
    }
}
