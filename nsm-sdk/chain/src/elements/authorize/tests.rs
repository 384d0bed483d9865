use super::*;
use crate::{
    Chain, Context, Path, PathSegment, Remote,
    core::testing::{Spy, request_with},
    elements::metadata::MetadataElement,
    remote::inprocess::{Caller, Identity, LocalService, remote},
};
use nsm_identity::{Authority, X509Source};
use std::{sync::Arc, time::Duration};

const HOUR: Duration = Duration::from_secs(3600);

fn sources() -> (X509Source, X509Source) {
    let authority = Authority::generate("example.org").unwrap();
    (authority.source("/client", 2 * HOUR).unwrap(), authority.source("/server", 2 * HOUR).unwrap())
}

fn peer(source: &X509Source) -> Peer {
    Peer::from_leaf(&source.svid().chain()[0]).unwrap()
}

fn token(source: &X509Source, audience: &X509Source) -> PathSegment {
    let token = source.sign(Some(&audience.spiffe_id()), HOUR).unwrap().jwt;
    PathSegment { id: "c".into(), token, ..Default::default() }
}

fn connection(index: u32, path_segments: Vec<PathSegment>) -> Connection {
    Connection { id: "c".into(), path: Some(Path { index, path_segments }), ..Default::default() }
}

// Conformance 20
#[tokio::test]
async fn servers_check_what_callers_send() {
    let (client, server) = sources();
    let chain = Chain::builder().element(AuthorizeServer::new(Policies::server())).build();
    let allowed = connection(1, vec![token(&client, &server), token(&server, &client), PathSegment::default()]);
    let denied = connection(1, vec![token(&server, &client), token(&server, &client)]);
    let empty = connection(0, vec![]);
    let ctx = || Context { peer: Some(peer(&client)), ..Context::new() };
    for (connection, code) in
        [(allowed, None), (denied.clone(), Some(Code::PermissionDenied)), (empty, Some(Code::PermissionDenied))]
    {
        let mut call = request_with(connection.clone());
        *call.ctx = ctx();
        assert_eq!(chain.request(call).await.err().map(|error| error.code()), code);
        let closed = chain.close(CloseCall::new(connection, ctx())).await;
        assert_eq!(closed.err().map(|error| error.code()), code);
    }
    // Calls from inside the process have no peer.
    chain.request(request_with(denied.clone())).await.unwrap();
    // Policies can be switched off.
    let open = Chain::builder().element(AuthorizeServer::new(Policies::any())).build();
    open.close(CloseCall::new(denied, ctx())).await.unwrap();
}

// Conformance 20
#[tokio::test]
async fn whose_a_connection_is_is_known_from_its_request_to_its_close() {
    let (client, server) = sources();
    let (callers, spy) = (Callers::default(), Arc::new(Spy::default()));
    let element = AuthorizeServer::new(Policies::any()).noting(Some(callers.clone()));
    let chain = Chain::builder().element(element).element(spy.clone()).build();
    let own = |id: &str, theirs: &str| {
        let segment = |id: &str| PathSegment { id: id.into(), ..Default::default() };
        let path = Path { index: 1, path_segments: vec![segment(theirs), segment(id)] };
        Connection { id: id.into(), path: Some(path), ..Default::default() }
    };
    let ctx = |source: &X509Source| Context { peer: Some(peer(source)), ..Context::new() };
    let request = async |source: &X509Source, connection: Connection| {
        let mut call = request_with(connection);
        *call.ctx = ctx(source);
        chain.request(call).await.map(drop)
    };
    let may = |source: &X509Source, id: &str| {
        let path_segments = vec![PathSegment { id: id.into(), ..Default::default() }];
        let selector = crate::MonitorScopeSelector { path_segments, ..Default::default() };
        callers.may_watch(&peer(source), &selector)
    };
    spy.fail_requests(true);
    request(&client, own("1", "a")).await.unwrap_err();
    assert!(callers.is_empty(), "what fails at first is nobody's");
    spy.fail_requests(false);
    request(&client, own("1", "a")).await.unwrap();
    request(&server, own("2", "b")).await.unwrap();
    assert!(may(&client, "a") && !may(&client, "b") && !may(&client, "1") && may(&server, "b"));
    spy.fail_requests(true);
    request(&client, own("1", "a")).await.unwrap_err();
    assert!(may(&client, "a"), "a refresh that fails changes nothing");
    // Also if it is this process that closes, which nobody calls.
    chain.close(CloseCall::new(own("1", "a"), Context::new())).await.unwrap();
    chain.close(CloseCall::new(own("2", "b"), ctx(&server))).await.unwrap();
    assert!(callers.is_empty());

    // Nothing is left of any number of operations.
    use rand::{Rng, SeedableRng};
    let mut random = rand::rngs::SmallRng::seed_from_u64(20);
    for _ in 0..5000 {
        let number: u32 = random.random();
        let (id, theirs) = ((number % 7).to_string(), format!("t{}", number >> 8 & 3));
        let source = if number & 1 == 0 { &client } else { &server };
        spy.fail_requests(number >> 16 & 3 == 0);
        match number >> 4 & 3 {
            0 => drop(chain.close(CloseCall::new(own(&id, &theirs), ctx(source))).await),
            _ => drop(request(source, own(&id, &theirs)).await),
        }
    }
    for id in 0..7 {
        chain.close(CloseCall::new(own(&id.to_string(), ""), ctx(&client))).await.unwrap();
    }
    assert!(callers.is_empty(), "{callers:?}");
}

/// Sets the remote, as dial would.
struct To(Remote);

#[async_trait::async_trait]
impl Element for To {
    fn name(&self) -> &'static str {
        "to"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        call.ctx.remote = Some(self.0.clone());
        next.request(call).await
    }
}

/// Answers as if the caller's segment were the next one.
struct Shifts(std::sync::atomic::AtomicBool);

#[async_trait::async_trait]
impl Element for Shifts {
    fn name(&self) -> &'static str {
        "shifts"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let mut connection = next.request(call).await?;
        if self.0.load(std::sync::atomic::Ordering::SeqCst) {
            connection.path.as_mut().unwrap().index += 1;
        }
        Ok(connection)
    }
}

// Conformance 21
#[tokio::test]
async fn clients_check_answers() {
    let (client, server) = sources();
    let (spy, shifts) = (Arc::new(Spy::default()), Arc::new(Shifts(false.into())));
    let service = LocalService {
        chain: Chain::builder().build(),
        hub: Default::default(),
        peer: Identity::new({
            let server = peer(&server);
            move || Some(server.clone())
        }),
    };
    let chain = Chain::builder()
        .element(MetadataElement::new())
        .element(To(remote("test", service, Caller::default())))
        .element(AuthorizeClient::new(Policies::client()))
        .element(shifts.clone())
        .element(spy.clone())
        .build();
    let good = connection(0, vec![token(&client, &server), token(&server, &client)]);
    let forged = connection(0, vec![token(&client, &server), token(&client, &server)]);

    let error = chain.request(request_with(forged.clone())).await.unwrap_err();
    assert_eq!((error.code(), spy.closes()), (Code::PermissionDenied, 1));
    chain.request(request_with(good.clone())).await.unwrap();
    chain.request(request_with(forged.clone())).await.unwrap_err();
    assert_eq!(spy.closes(), 1, "a failed refresh closes nothing");

    // A close is checked by whom the last answer came from.
    let close = async |connection| chain.close(CloseCall::new(connection, Context::new())).await;
    assert_eq!(close(forged).await.unwrap_err().code(), Code::PermissionDenied);
    assert_eq!(spy.closes(), 1);
    chain.request(request_with(good.clone())).await.unwrap();
    let ended = |source: &X509Source, audience: &X509Source| {
        let jwt = source.sign(Some(&audience.spiffe_id()), Duration::ZERO).unwrap().jwt;
        PathSegment { token: jwt, ..token(source, audience) }
    };
    close(connection(0, vec![ended(&client, &server), ended(&server, &client)])).await.unwrap();
    assert_eq!(spy.closes(), 2, "what has expired is closed");

    // Somebody who has signed only a segment further on does not get the check moved there.
    shifts.0.store(true, std::sync::atomic::Ordering::SeqCst);
    let (_, impostor) = sources();
    let moved = connection(0, vec![token(&client, &server), token(&impostor, &server), token(&server, &client)]);
    let error = chain.request(request_with(moved)).await.unwrap_err();
    assert_eq!(error.code(), Code::PermissionDenied, "{error}");
    chain.request(request_with(good)).await.unwrap();
}
