//! Against an NSP some of whose watches fail.

use std::collections::BTreeSet;

use futures_util::stream::{BoxStream, StreamExt};
use nsp::configuration_manager_server::{ConfigurationManager, ConfigurationManagerServer};
use nsp::target_registry_server::{TargetRegistry, TargetRegistryServer};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::{TcpListenerStream, WatchStream};
use tonic::{Request, Response, Status};

use super::*;
use crate::cli;

const SOON: Duration = Duration::from_secs(20);

/// What the NSP knows, and which watches fail.
#[derive(Clone, Debug, Default)]
struct State {
    broken: BTreeSet<&'static str>,
    vips: Vec<nsp::Vip>,
}

#[derive(Clone)]
struct Nsp(watch::Sender<State>);

type Answers<T> = BoxStream<'static, Result<T, Status>>;

impl Nsp {
    fn answers<T: Send + 'static>(&self, name: &'static str, answer: fn(State) -> T) -> Response<Answers<T>> {
        let answer = move |state: State| match state.broken.contains(name) {
            true => Err(Status::unavailable("no storage")),
            false => Ok(answer(state)),
        };
        Response::new(WatchStream::new(self.0.subscribe()).map(answer).boxed())
    }
}

macro_rules! configuration {
    ($($name:ident $stream:ident $watch:literal $request:ty, $response:ty, $answer:expr;)*) => {
        #[tonic::async_trait]
        impl ConfigurationManager for Nsp {
            $(type $stream = Answers<$response>;)*
            $(async fn $name(&self, _: Request<$request>) -> Result<Response<Self::$stream>, Status> {
                Ok(self.answers($watch, $answer))
            })*
        }
    };
}

configuration! {
    watch_trench WatchTrenchStream "trench" nsp::Trench, nsp::TrenchResponse, |_| Default::default();
    watch_conduit WatchConduitStream "conduit" nsp::Conduit, nsp::ConduitResponse, |_| Default::default();
    watch_stream WatchStreamStream "streams" nsp::Stream, nsp::StreamResponse, |_| Default::default();
    watch_flow WatchFlowStream "flows" nsp::Flow, nsp::FlowResponse, |_| Default::default();
    watch_vip WatchVipStream "VIPs" nsp::Vip, nsp::VipResponse, |state| nsp::VipResponse { vips: state.vips };
    watch_attractor WatchAttractorStream "attractor" nsp::Attractor, nsp::AttractorResponse, |_| Default::default();
    watch_gateway WatchGatewayStream "gateways" nsp::Gateway, nsp::GatewayResponse, |_| Default::default();
}

#[tonic::async_trait]
impl TargetRegistry for Nsp {
    type WatchStream = Answers<nsp::TargetResponse>;

    async fn register(&self, _: Request<nsp::Target>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("watched only"))
    }

    async fn unregister(&self, _: Request<nsp::Target>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("watched only"))
    }

    async fn watch(&self, request: Request<nsp::Target>) -> Result<Response<Self::WatchStream>, Status> {
        let frontends = request.get_ref().r#type == nsp::target::Type::Frontend as i32;
        Ok(self.answers(if frontends { "frontends" } else { "targets" }, |_| Default::default()))
    }
}

#[test]
fn lost_watches_are_named_with_their_reasons() {
    let lost = |all: &[(&'static str, &str)]| all.iter().map(|(name, reason)| (*name, (*reason).to_owned())).collect();
    let all = lost(&[("VIPs", "refused"), ("flows", "no storage"), ("targets", "refused")]);
    assert_eq!(waits(&all), "the NSP (flows: no storage; VIPs, targets: refused)");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_watch_that_works_hides_no_other_that_does_not() {
    let state = watch::Sender::new(State { broken: BTreeSet::from(["flows"]), ..State::default() });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let server = tonic::transport::Server::builder()
        .add_service(ConfigurationManagerServer::new(Nsp(state.clone())))
        .add_service(TargetRegistryServer::new(Nsp(state.clone())))
        .serve_with_incoming(TcpListenerStream::new(listener));
    let server = tokio::spawn(server);
    let (shared, health, stop) = (Shared::new(), Health::detached("test"), CancellationToken::new());
    let channel = tonic::transport::Endpoint::from_shared(url).unwrap().connect_lazy();
    let mut tasks = JoinSet::new();
    Watches::new(channel, &cli::settings(&[]), "host", shared.clone(), health.clone(), stop.clone()).spawn(&mut tasks);

    let known = async |vips: usize| {
        let mut inputs = shared.subscribe();
        let told = |inputs: &Inputs| inputs.vips.as_ref().is_some_and(|known| known.len() == vips);
        let waited = tokio::time::timeout(SOON, inputs.wait_for(told)).await.is_ok();
        assert!(waited, "{vips} VIPs: {:?}", shared.get());
    };
    // Health has no channel of its own to wait on.
    let until = async |waits: &str| {
        let shown = || {
            health
                .report()
                .subservices
                .get("NSPCli")
                .map(|s| if s.serving { String::new() } else { s.waits_for.clone() })
        };
        let end = tokio::time::Instant::now() + SOON;
        while shown().as_deref() != Some(waits) {
            assert!(tokio::time::Instant::now() < end, "{waits:?}: {:?}", shown());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    until("the NSP (flows: no storage)").await;
    // Other lists go on: that changes nothing.
    for vips in 1..=3 {
        state.send_modify(|state| state.vips.push(nsp::Vip::default()));
        known(vips).await;
        until("the NSP (flows: no storage)").await;
    }
    state.send_modify(|state| state.broken.clear());
    until("").await;
    state.send_modify(|state| state.broken = BTreeSet::from(["frontends", "targets"]));
    until("the NSP (frontends, targets: no storage)").await;
    state.send_modify(|state| _ = state.broken.remove("targets"));
    until("the NSP (frontends: no storage)").await;
    state.send_modify(|state| state.broken.clear());
    until("").await;
    stop.cancel();
    while tasks.join_next().await.is_some() {}
    server.abort();
}
