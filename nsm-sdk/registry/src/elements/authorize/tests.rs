use super::*;
use nsm_identity::Authority;
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use std::time::Duration;

const LATER: Duration = Duration::from_secs(7200);

fn owned<T: Object>(name: &str, owner: &str) -> T {
    let mut object = T::default();
    object.set_name(name.into());
    object.path_ids_mut().push(owner.into());
    object
}

// Conformance 25
#[test]
fn masks_select_policies() {
    let stock = ["etc/nsm/opa/common/.*.rego", "etc/nsm/opa/registry/.*.rego", "etc/nsm/opa/server/.*.rego"];
    assert_eq!(Policies::from_masks(&stock), Policies::default());
    assert_eq!(Policies::from_masks::<&str>(&[]), Policies::none());
    let tokens = Policies::from_masks(&["etc/nsm/opa/common/tokens_.*.rego"]);
    assert!(tokens.tokens_chained && !tokens.client_allowed);
}

// Conformance 22
#[test]
fn token_policies() {
    let hour = Duration::from_secs(3600);
    let authority = Authority::generate("example.org").unwrap();
    let (a, b) = (authority.source("/a", hour).unwrap(), authority.source("/b", hour).unwrap());
    let to_b = Segment { token: a.sign(Some("spiffe://example.org/b"), hour).unwrap().jwt };
    let to_a = Segment { token: b.sign(Some("spiffe://example.org/a"), hour).unwrap().jwt };
    let garbage = Segment { token: "garbage".into() };
    assert!(tokens_valid(&[to_b.clone(), garbage]).is_err());
    assert!(tokens_valid(&[]).is_ok());
    let claims = tokens_valid(&[to_b.clone(), to_a.clone()]).unwrap();
    assert!(tokens_chained(&claims).is_ok());
    assert!(tokens_chained(&claims[..1]).is_ok());
    assert!(tokens_chained(&[claims[0].clone(), claims[0].clone()]).is_err());
    assert!(tokens_expired(&claims, SystemTime::now()).is_ok());
    assert!(tokens_expired(&claims, SystemTime::now() + LATER).is_err());
    let path = RegistryPath { index: 1, segments: vec![to_b, to_a] };
    let leaf = |source: &nsm_identity::X509Source| source.svid().chain()[0].to_vec();
    assert!(prev_token_signed(&path, &leaf(&a)).is_ok());
    assert!(prev_token_signed(&path, &leaf(&b)).is_err());
    assert!(prev_token_signed(&RegistryPath { index: 0, ..path.clone() }, &leaf(&a)).is_err());
    let first = RegistryPath { index: 0, ..path.clone() };
    assert!(next_token_signed(&first, &leaf(&b)).is_ok());
    assert!(next_token_signed(&first, &leaf(&a)).is_err());
    assert!(next_token_signed(&path, &leaf(&b)).is_err());
    assert!(next_token_signed(&RegistryPath { index: usize::MAX, ..path }, &leaf(&b)).is_err());
}

// Conformance 23, 112
#[tokio::test]
async fn a_name_belongs_to_its_first_owner() {
    let owners = Arc::new(Owners::default());
    let chain = Next::new(vec![Arc::new(Authorize::<NetworkServiceEndpoint>::new(Policies::default(), owners))]);
    let call = |owner| Call::new(owned::<NetworkServiceEndpoint>("e", owner), Context::new());
    chain.register(call("a")).await.unwrap();
    chain.register(call("a")).await.unwrap();
    assert_eq!(chain.register(call("b")).await.unwrap_err().code(), tonic::Code::PermissionDenied);
    assert!(chain.unregister(call("b")).await.is_err());
    chain.unregister(call("a")).await.unwrap();
    chain.register(call("b")).await.unwrap();
}

// Conformance 72
#[tokio::test]
async fn a_service_belongs_to_its_first_owner_unless_it_is_the_same() {
    for (equal_services, allowed) in [(false, false), (true, true)] {
        let policies = Policies { equal_services, ..Policies::default() };
        let chain = Next::new(vec![Arc::new(Authorize::<NetworkService>::new(policies, Arc::default()))]);
        chain.register(Call::new(owned("s", "a"), Context::new())).await.unwrap();
        assert_eq!(chain.register(Call::new(owned("s", "b"), Context::new())).await.is_ok(), allowed);
        let other = NetworkService { payload: "ETHERNET".into(), ..owned("s", "b") };
        assert!(chain.register(Call::new(other, Context::new())).await.is_err());
        assert!(chain.unregister(Call::new(owned("s", "b"), Context::new())).await.is_err());
        chain.unregister(Call::new(owned("s", "a"), Context::new())).await.unwrap();
    }
}

// Conformance 72
#[tokio::test]
async fn the_first_owner_keeps_the_service_over_a_restart() {
    use crate::{
        elements::memory::{Memory, load},
        store::{MemoryStore, Store},
    };
    let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let policies = Policies { equal_services: true, ..Policies::default() };
    let chain = |owners| {
        let elements: Vec<Arc<dyn Element<NetworkService>>> =
            vec![Arc::new(Authorize::new(policies, owners)), Arc::new(Memory::new(store.clone()))];
        Next::new(elements)
    };
    let before = chain(Arc::default());
    let call = |owner| Call::new(owned::<NetworkService>("s", owner), Context::new());
    before.register(call("a")).await.unwrap();
    let answer = before.register(call("b")).await.unwrap();
    assert_eq!(answer.path_ids, ["b"], "who has asked is told about its own registration");
    let owners = Arc::<Owners<_>>::default();
    for service in load::<NetworkService>(&*store).await.unwrap().0 {
        owners.remember(service);
    }
    let after = chain(owners);
    let changed = |owner| Call::new(NetworkService { payload: "ETHERNET".into(), ..owned("s", owner) }, Context::new());
    assert!(after.register(changed("b")).await.is_err());
    after.register(changed("a")).await.unwrap();
    after.unregister(call("a")).await.unwrap();
}
