use super::*;
use crate::{
    Chain, Context,
    core::testing::{Spy, close, request_id, request_with},
    elements::{ipam::Strict, metadata::MetadataElement},
};
use std::sync::Arc;

fn ipam(prefixes: &[&str]) -> PointToPoint {
    PointToPoint::new(prefixes.iter().map(|prefix| prefix.parse().unwrap()))
}

fn chain(prefixes: &[&str]) -> (Chain, Arc<Spy>) {
    let spy = Arc::new(Spy::default());
    let builder = Chain::builder().element(MetadataElement::new()).element(ipam(prefixes));
    (builder.element(spy.clone()).build(), spy)
}

fn context(connection: &Connection) -> IpContext {
    connection.context.clone().unwrap().ip_context.unwrap()
}

async fn pair(chain: &Chain, id: &str) -> Result<(String, String), Error> {
    let context = context(&chain.request(request_id(id, Context::new())).await?);
    assert_eq!(context.src_routes[0].prefix, context.dst_ip_addrs[0]);
    assert_eq!(context.dst_routes[0].prefix, context.src_ip_addrs[0]);
    Ok((context.dst_ip_addrs[0].clone(), context.src_ip_addrs[0].clone()))
}

fn texts(dst: &str, src: &str) -> (String, String) {
    (dst.to_owned(), src.to_owned())
}

// Conformance 93
#[tokio::test]
async fn the_documented_sequence() {
    let (chain, _) = chain(&["172.16.0.0/30", "fd00::/64"]);
    assert_eq!(pair(&chain, "a").await.unwrap(), texts("172.16.0.0/32", "172.16.0.1/32"));
    assert_eq!(pair(&chain, "b").await.unwrap(), texts("172.16.0.2/32", "172.16.0.3/32"));
    assert_eq!(pair(&chain, "c").await.unwrap(), texts("fd00::/128", "fd00::1/128"));
    assert_eq!(pair(&chain, "a").await.unwrap(), texts("172.16.0.0/32", "172.16.0.1/32"), "stable");
    close(&chain, "a").await.unwrap();
    assert_eq!(pair(&chain, "d").await.unwrap(), texts("172.16.0.0/32", "172.16.0.1/32"), "freed");
}

// Conformance 93
#[tokio::test]
async fn errors_free_what_is_fresh() {
    let (none, _) = chain(&[]);
    assert!(pair(&none, "a").await.unwrap_err().to_string().contains("required one or more prefixes"));
    let (chain, spy) = chain(&["172.16.0.0/31"]);
    spy.fail_requests(true);
    pair(&chain, "a").await.unwrap_err();
    spy.fail_requests(false);
    pair(&chain, "b").await.unwrap();
    assert_eq!(pair(&chain, "c").await.unwrap_err().code(), Code::ResourceExhausted);
    spy.fail_requests(true);
    pair(&chain, "b").await.unwrap_err();
    spy.fail_requests(false);
    pair(&chain, "b").await.unwrap();
}

// Conformance 93
#[tokio::test]
async fn exclusion_on_refresh_allocates_anew() {
    let (chain, _) = chain(&["172.16.0.0/29"]);
    let mut connection = chain.request(request_id("a", Context::new())).await.unwrap();
    ip_context(&mut connection).excluded_prefixes.push("172.16.0.1/32".into());
    let refreshed = context(&chain.request(request_with(connection)).await.unwrap());
    assert_eq!(
        (refreshed.dst_ip_addrs, refreshed.src_ip_addrs),
        (vec!["172.16.0.0/32".into()], vec!["172.16.0.2/32".into()])
    );
    assert_eq!((refreshed.src_routes.len(), refreshed.dst_routes.len()), (1, 1));
}

// Conformance 93
#[tokio::test]
async fn given_addresses_are_recovered() {
    let (chain, _) = chain(&["172.16.0.0/24"]);
    let mut call = request_id("a", Context::new());
    let asked = ip_context(call.connection_mut());
    asked.src_ip_addrs = vec!["20.0.0.1/32".into(), "172.16.0.9/32".into()];
    asked.dst_ip_addrs = vec!["172.16.0.8/32".into()];
    let got = context(&chain.request(call).await.unwrap());
    assert_eq!((got.src_ip_addrs.len(), got.dst_ip_addrs), (2, vec!["172.16.0.8/32".to_owned()]));
    assert_eq!(pair(&chain, "b").await.unwrap(), texts("172.16.0.0/32", "172.16.0.1/32"));
}

// Conformance 95; two elements of one type in a chain do not share their memories
#[tokio::test]
async fn a_group_gives_one_pair_from_each() {
    let group = Chain::builder().element(ipam(&["172.16.0.0/24"])).element(ipam(&["fd00::/64"])).build();
    let chain = Chain::builder().element(MetadataElement::new()).element(group).build();
    for _ in 0..2 {
        let got = context(&chain.request(request_id("a", Context::new())).await.unwrap());
        assert_eq!(got.dst_ip_addrs, ["172.16.0.0/32", "fd00::/128"]);
        assert_eq!(got.src_ip_addrs, ["172.16.0.1/32", "fd00::1/128"]);
    }
}

// Conformance 95
#[tokio::test]
async fn strict_drops_foreign_addresses() {
    let strict = Strict::new(["172.16.1.0/24".parse().unwrap()]);
    let chain =
        Chain::builder().element(MetadataElement::new()).element(strict).element(ipam(&["172.16.1.0/24"])).build();
    // No context at all is no reason to fail.
    chain.request(request_id("nil", Context::new())).await.unwrap();
    let mut call = request_id("a", Context::new());
    let asked = ip_context(call.connection_mut());
    asked.src_ip_addrs = vec!["172.16.0.1/32".into()];
    asked.dst_ip_addrs = vec!["172.16.0.0/32".into()];
    asked.src_routes = vec![Route { prefix: "172.16.0.0/32".into(), ..Default::default() }];
    asked.dst_routes = vec![Route { prefix: "172.16.0.1/32".into(), ..Default::default() }];
    let got = context(&chain.request(call).await.unwrap());
    assert_eq!((got.dst_ip_addrs, got.src_ip_addrs), (vec!["172.16.1.2/32".into()], vec!["172.16.1.3/32".into()]));
    assert_eq!((got.src_routes.len(), got.dst_routes.len()), (1, 1));
}

/// Addresses that a client still has of a time when this endpoint gave them to it, or another one of the same prefix did.
fn with_pair(id: &str, dst: &str, src: &str) -> crate::RequestCall {
    let mut call = request_id(id, Context::new());
    let asked = ip_context(call.connection_mut());
    (asked.dst_ip_addrs, asked.src_ip_addrs) = (vec![dst.into()], vec![src.into()]);
    asked.src_routes = vec![Route { prefix: dst.into(), ..Default::default() }];
    asked.dst_routes = vec![Route { prefix: src.into(), ..Default::default() }];
    call
}

// Conformance 95
#[tokio::test(start_paused = true)]
async fn strict_gives_no_address_to_two() {
    let (spy, strict) = (Arc::new(Spy::default()), Strict::new(["172.16.1.0/24".parse().unwrap()]));
    let chain = Chain::builder()
        .element(MetadataElement::new())
        .element(strict)
        .element(ipam(&["172.16.1.0/24"]))
        .element(spy.clone())
        .build();
    let old = |id: &str| with_pair(id, "172.16.1.0/32", "172.16.1.1/32");
    let run = async |call| context(&chain.request(call).await.unwrap());
    let addresses = |got: &IpContext| (got.dst_ip_addrs.join(","), got.src_ip_addrs.join(","));

    assert_eq!(pair(&chain, "a").await.unwrap(), texts("172.16.1.0/32", "172.16.1.1/32"));
    let other = run(old("b")).await;
    assert_eq!(addresses(&other), texts("172.16.1.2/32", "172.16.1.3/32"));
    assert_eq!((other.src_routes.len(), other.dst_routes.len()), (1, 1), "{other:?}");
    assert_eq!(addresses(&run(old("a")).await), texts("172.16.1.0/32", "172.16.1.1/32"), "its own");

    // A refresh that fails changes nothing, a first request that fails keeps nothing.
    spy.fail_requests(true);
    chain.request(old("a")).await.unwrap_err();
    chain.request(with_pair("c", "172.16.1.8/32", "172.16.1.9/32")).await.unwrap_err();
    spy.fail_requests(false);
    assert_eq!(addresses(&run(old("b")).await), texts("172.16.1.2/32", "172.16.1.3/32"));
    let free = run(with_pair("d", "172.16.1.8/32", "172.16.1.9/32")).await;
    assert_eq!(addresses(&free), texts("172.16.1.8/32", "172.16.1.9/32"));

    close(&chain, "a").await.unwrap();
    assert_eq!(addresses(&run(old("e")).await), texts("172.16.1.0/32", "172.16.1.1/32"), "freed");

    // Of two at once that list the same one keeps it.
    spy.set_delay(std::time::Duration::from_secs(1));
    let same = |id: &str| with_pair(id, "172.16.1.20/32", "172.16.1.21/32");
    let (first, second) = tokio::join!(run(same("f")), run(same("g")));
    let both = [first, second].map(|got| addresses(&got));
    assert!(both.contains(&texts("172.16.1.20/32", "172.16.1.21/32")), "{both:?}");
    assert!(both.contains(&texts("172.16.1.4/32", "172.16.1.5/32")), "{both:?}");
}
