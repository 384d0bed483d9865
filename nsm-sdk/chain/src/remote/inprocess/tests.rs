use super::*;
use crate::{ConnectionEventType, core::testing::Spy};
use std::time::Duration;

fn connection(id: &str) -> Connection {
    Connection { id: id.into(), ..Default::default() }
}

fn service() -> LocalService {
    LocalService { chain: Chain::builder().build(), hub: Hub::new(), peer: Identity::default() }
}

// Conformance 5
#[tokio::test]
async fn events_arrive_in_order_until_either_side_leaves() {
    let service = service();
    let remote = remote("inproc://a", service.clone(), Caller::default());
    let mut events = remote.monitor(MonitorScopeSelector::default()).await.unwrap();
    for n in 0..100 {
        service.hub.update(connection(&n.to_string()));
    }
    let first = events.next().await.unwrap().unwrap();
    assert_eq!((first.r#type(), first.connections.len()), (ConnectionEventType::InitialStateTransfer, 0));
    for n in 0..100 {
        let event = events.next().await.unwrap().unwrap();
        assert_eq!(event.connections.into_keys().collect::<Vec<_>>(), [n.to_string()]);
    }
    // A reader that waits is woken, a reader that leaves is forgotten, and the end of the server ends the stream.
    let mut waiting = remote.monitor(MonitorScopeSelector::default()).await.unwrap();
    waiting.next().await.unwrap().unwrap();
    let reader = tokio::spawn(async move { (waiting.next().await, waiting.next().await) });
    tokio::task::yield_now().await;
    drop(events);
    service.hub.update(connection("last"));
    assert_eq!(service.hub.subscribers(), 1);
    service.hub.end();
    let (news, end) = tokio::time::timeout(Duration::from_secs(5), reader).await.unwrap().unwrap();
    assert!(news.unwrap().unwrap().connections.contains_key("last") && end.is_none());
    assert_eq!(service.hub.subscribers(), 0);
}

#[tokio::test]
async fn chains_are_found_by_url() {
    let spy = Arc::new(Spy::default());
    let hops = InProcess::new(Caller::default(), None);
    let chain = Chain::builder().element(spy.clone()).build();
    hops.add("inproc://a", LocalService { chain, ..service() });
    let deadline = Instant::now() + Duration::from_secs(5);
    let remote = hops.connect("inproc://a", deadline).await.unwrap();
    let request = NetworkServiceRequest { connection: Some(connection("c")), ..Default::default() };
    assert_eq!(remote.request(request, Some(deadline)).await.unwrap().id, "c");
    remote.close(connection("c"), None).await.unwrap();
    assert_eq!((spy.requests(), spy.closes()), (1, 1));
    hops.remove("inproc://a");
    let error = hops.connect("inproc://a", deadline).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::Unavailable);
}
