use super::*;
use crate::registry::NetworkServiceEndpoint;
use crate::{
    Chain,
    core::testing::{MemoryRegistry, Spy, close, ns, nse, request_with},
    elements::{begin::Begin, metadata::MetadataElement},
};
use nsm_registry::{NetworkServiceLabels, matching::Labels};

fn labelled(name: &str, service: &str, color: &str) -> NetworkServiceEndpoint {
    let labels = Labels::from([("color".to_owned(), color.to_owned())]);
    let network_service_labels = [(service.to_owned(), NetworkServiceLabels { labels })].into();
    NetworkServiceEndpoint { network_service_labels, ..nse(name, service, "unix:///nse") }
}

/// A service that leads to endpoints of this colour.
fn to(name: &str, color: &str) -> NetworkService {
    use nsm_proto::registry::{Destination, Match};
    let destination_selector = Labels::from([("color".to_owned(), color.to_owned())]);
    let routes = vec![Destination { destination_selector, ..Default::default() }];
    NetworkService { matches: vec![Match { routes, ..Default::default() }], ..ns(name) }
}

struct Scene {
    chain: Chain,
    registry: Arc<MemoryRegistry>,
    spy: Arc<Spy>,
}

fn scene() -> Scene {
    let (registry, spy) = (Arc::<MemoryRegistry>::default(), Arc::<Spy>::default());
    for service in ["svc", "svc-1"] {
        registry.add_ns(to(service, "red"));
        registry.add_nse(labelled(&format!("{service}-red"), service, "red"));
    }
    let chain = Chain::builder()
        .element(Begin::new(Side::Server))
        .element(MetadataElement::new())
        .element(NetSvcMonitor::new(registry.clone()))
        .element(spy.clone())
        .build();
    Scene { chain, registry, spy }
}

impl Scene {
    async fn request(&self, id: &str, service: &str) -> Result<Connection, Error> {
        let network_service_endpoint_name = format!("{service}-red");
        let network_service = service.to_owned();
        let connection =
            Connection { id: id.into(), network_service, network_service_endpoint_name, ..Default::default() };
        self.chain.request(request_with(connection)).await
    }
}

async fn settle() {
    tokio::time::sleep(Duration::from_secs(5)).await;
}

// Conformance 84
#[tokio::test(start_paused = true)]
async fn a_change_closes_what_it_excludes_and_nothing_else() {
    let scene = scene();
    for (id, service) in [("a", "svc"), ("b", "svc"), ("c", "svc-1")] {
        scene.request(id, service).await.unwrap();
    }
    settle().await;
    assert_eq!((scene.spy.closes(), scene.registry.watchers()), (0, 2), "a service is watched once");
    // A change that still leads there, and one of a service whose name begins alike.
    scene.registry.add_ns(NetworkService { payload: "IP".into(), ..to("svc", "red") });
    scene.registry.add_ns(to("svc-1", "blue"));
    settle().await;
    assert_eq!((scene.spy.closes(), scene.spy.last_close().id.as_str()), (1, "c"));
    // The registry is lost, and the service is another one when it comes back.
    scene.registry.cut();
    scene.registry.add_ns(to("svc", "blue"));
    settle().await;
    assert_eq!((scene.spy.closes(), scene.registry.watchers()), (3, 0));
}

// Conformance 84
#[tokio::test(start_paused = true)]
async fn a_change_during_the_request_is_seen_and_a_reselect_starts_anew() {
    let scene = scene();
    scene.spy.set_delay(Duration::from_secs(1));
    let (made, ()) = tokio::join!(scene.request("a", "svc"), async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        scene.registry.add_ns(to("svc", "blue"));
    });
    made.unwrap();
    settle().await;
    assert_eq!(scene.spy.closes(), 1);
    // An endpoint that is chosen anew is judged anew.
    scene.registry.add_ns(to("svc", "red"));
    let mut connection = scene.request("a", "svc").await.unwrap();
    connection.set_state(State::ReselectRequested);
    scene.chain.request(request_with(connection)).await.unwrap();
    settle().await;
    assert_eq!(scene.spy.closes(), 2, "only begin has closed, for the reselect");
    scene.registry.add_ns(to("svc", "blue"));
    settle().await;
    assert_eq!(scene.spy.closes(), 3);
}

// Conformance 84
#[tokio::test(start_paused = true)]
async fn nothing_watches_after_a_failure_a_close_or_the_end_of_the_chain() {
    let scene = scene();
    scene.spy.fail_requests(true);
    scene.request("a", "svc").await.unwrap_err();
    settle().await;
    assert_eq!(scene.registry.watchers(), 0);
    scene.spy.fail_requests(false);
    scene.request("a", "svc").await.unwrap();
    close(&scene.chain, "a").await.unwrap();
    settle().await;
    assert_eq!(scene.registry.watchers(), 0);
    // Nobody closes this one.
    scene.request("b", "svc").await.unwrap();
    settle().await;
    assert_eq!(scene.registry.watchers(), 1);
    let Scene { chain, registry, .. } = scene;
    drop(chain);
    settle().await;
    assert_eq!(registry.watchers(), 0);
}
