use super::*;
use crate::{
    Chain, Context, Route, Side,
    core::testing::{Spy, close, request_id, request_with},
    elements::{begin::Begin, ipam::PointToPoint, metadata::MetadataElement},
};
use std::sync::Arc;

/// Answers as told; what it was asked is in the spy.
#[derive(Default)]
struct Answers(Mutex<IpContext>);

impl Answers {
    fn set(&self, context: IpContext) {
        *self.0.lock().unwrap() = context;
    }
}

#[async_trait::async_trait]
impl Element for Answers {
    fn name(&self) -> &'static str {
        "answers"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let answer = self.0.lock().unwrap().clone();
        let context = call.connection_mut().context.get_or_insert_default().ip_context.get_or_insert_default();
        context.excluded_prefixes.extend(answer.excluded_prefixes);
        context.src_ip_addrs = answer.src_ip_addrs;
        context.dst_ip_addrs = answer.dst_ip_addrs;
        context.src_routes = answer.src_routes;
        next.request(call).await
    }
}

fn answer(src: &str, dst: &str) -> IpContext {
    IpContext { src_ip_addrs: vec![src.into()], dst_ip_addrs: vec![dst.into()], ..Default::default() }
}

fn chain(element: ExcludedPrefixesClient) -> (Chain, Arc<Answers>, Arc<Spy>) {
    let (answers, spy) = (Arc::<Answers>::default(), Arc::<Spy>::default());
    (Chain::builder().element(element).element(spy.clone()).element(answers.clone()).build(), answers, spy)
}

/// What the last request excluded.
fn excluded(spy: &Spy) -> Vec<String> {
    ip_context(&spy.last_request().connection.unwrap()).unwrap().excluded_prefixes.clone()
}

async fn request(chain: &Chain, id: &str) -> Result<Connection, Error> {
    chain.request(request_id(id, Context::new())).await
}

// Conformance 98
#[tokio::test]
async fn each_connection_excludes_what_the_others_have() {
    let (chain, answers, spy) = chain(ExcludedPrefixesClient::new());
    answers.set(IpContext { excluded_prefixes: vec!["192.168.0.0/16".into()], ..answer("10.0.0.1/32", "10.0.0.0/24") });
    let first = request(&chain, "a").await.unwrap();
    assert!(excluded(&spy).is_empty());
    assert!(ip_context(&first).unwrap().excluded_prefixes.is_empty(), "the caller gets its own list back");
    answers.set(answer("fd00::1/128", "fd00::/128"));
    request(&chain, "b").await.unwrap();
    assert_eq!(excluded(&spy), ["10.0.0.0/32", "10.0.0.1/32", "192.168.0.0/16"]);
    answers.set(answer("10.1.0.1/32", "10.1.0.0/32"));
    request(&chain, "c").await.unwrap();
    assert_eq!(excluded(&spy), ["10.0.0.0/32", "10.0.0.1/32", "192.168.0.0/16", "fd00::/128", "fd00::1/128"]);

    // A refresh does not exclude itself, and what a caller lists itself stays its own.
    let mut again = request_with(first);
    let list = &mut again.connection_mut().context.get_or_insert_default().ip_context.get_or_insert_default();
    list.excluded_prefixes = vec!["172.16.0.0/12".into()];
    answers.set(answer("10.0.0.1/32", "10.0.0.0/24"));
    let refreshed = chain.request(again).await.unwrap();
    assert_eq!(excluded(&spy), ["172.16.0.0/12", "10.1.0.0/32", "10.1.0.1/32", "fd00::/128", "fd00::1/128"]);
    assert_eq!(ip_context(&refreshed).unwrap().excluded_prefixes, ["172.16.0.0/12"]);
}

// Conformance 98
#[tokio::test]
async fn routes_to_hosts_are_excluded_routes_to_networks_are_not() {
    let (chain, answers, spy) = chain(ExcludedPrefixesClient::new());
    let route = |prefix: &str| Route { prefix: prefix.into(), ..Default::default() };
    let src_routes = ["10.9.0.9/32", "10.8.0.0/16", "fd00::9/128", "fd01::/64", "nonsense"].map(route).into();
    answers.set(IpContext { src_routes, ..answer("10.0.0.1/32", "10.0.0.0/32") });
    request(&chain, "a").await.unwrap();
    answers.set(IpContext::default());
    request(&chain, "b").await.unwrap();
    assert_eq!(excluded(&spy), ["10.0.0.0/32", "10.0.0.1/32", "10.9.0.9/32", "fd00::9/128"]);
}

// Conformance 98
#[tokio::test]
async fn an_address_of_another_connection_is_given_back() {
    let (chain, answers, spy) = chain(ExcludedPrefixesClient::new());
    answers.set(answer("10.0.0.1/32", "10.0.0.0/32"));
    request(&chain, "a").await.unwrap();
    for clash in [answer("10.0.0.1/24", "10.5.0.0/32"), answer("10.5.0.1/32", "10.0.0.1/32")] {
        answers.set(clash);
        let error = request(&chain, "b").await.unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists);
        assert!(error.message().contains("10.0.0.1"), "{error}");
    }
    assert_eq!((spy.closes(), spy.last_close().id.as_str()), (2, "b"));
    // A refresh that goes wrong leaves what works.
    answers.set(answer("10.5.0.1/32", "10.5.0.0/32"));
    request(&chain, "b").await.unwrap();
    answers.set(answer("10.0.0.1/32", "10.5.0.0/32"));
    request(&chain, "b").await.unwrap_err();
    assert_eq!(spy.closes(), 2);
    answers.set(answer("10.0.0.1/32", "10.0.0.0/32"));
    request(&chain, "a").await.unwrap();
    assert_eq!(excluded(&spy), ["10.5.0.0/32", "10.5.0.1/32"]);
}

// Conformance 98
#[tokio::test]
async fn an_error_changes_nothing_and_a_close_frees() {
    let (chain, answers, spy) = chain(ExcludedPrefixesClient::new());
    answers.set(answer("10.0.0.1/32", "10.0.0.0/32"));
    request(&chain, "a").await.unwrap();
    spy.fail_requests(true);
    request(&chain, "a").await.unwrap_err();
    request(&chain, "never").await.unwrap_err();
    spy.fail_requests(false);
    answers.set(IpContext::default());
    request(&chain, "b").await.unwrap();
    assert_eq!(excluded(&spy), ["10.0.0.0/32", "10.0.0.1/32"]);
    // Free is what is closed, even if the close went wrong.
    spy.fail_closes(Some(Code::Unavailable));
    close(&chain, "a").await.unwrap_err();
    request(&chain, "b").await.unwrap();
    assert!(excluded(&spy).is_empty());
}

// Conformance 71
#[tokio::test]
async fn services_that_know_of_each_other_may_share_addresses() {
    let groups = "[kernel://a,kernel://b],[kernel://c]".parse().unwrap();
    let ipam = || PointToPoint::new(["172.16.0.0/24".parse().unwrap()]);
    // One IPAM each, as if they were three endpoints.
    let endpoints = ["a", "b", "c"]
        .map(|service| (service, Chain::builder().element(MetadataElement::new()).element(ipam()).build()));
    let mut switch = crate::elements::switchcase::SwitchCase::new();
    for (service, endpoint) in endpoints {
        switch = switch.case(move |_, connection| connection.network_service == service, endpoint);
    }
    let chain = Chain::builder()
        .element(Begin::new(Side::Client))
        .element(ExcludedPrefixesClient::new().with_groups(groups))
        .element(switch)
        .build();
    let mut sources = Vec::new();
    for service in ["a", "b", "c"] {
        let connection = Connection { id: service.into(), network_service: service.into(), ..Default::default() };
        let connection = chain.request(request_with(connection)).await.unwrap();
        sources.push(ip_context(&connection).unwrap().src_ip_addrs[0].clone());
    }
    assert_eq!(sources, ["172.16.0.1/32", "172.16.0.1/32", "172.16.0.3/32"]);
}
