//! An NSP and an IPAM for tests, reached through memory: sockets and paused time do not agree.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use futures_util::stream::{self, BoxStream, StreamExt};
use hyper_util::rt::TokioIo;
use meridio_proto::ipam::v1::ipam_server::{self, IpamServer};
use meridio_proto::ipam::v1::{Child, Prefix};
use meridio_proto::nsp::v1 as nsp;
use meridio_proto::nsp::v1::configuration_manager_server::{ConfigurationManager, ConfigurationManagerServer};
use tokio::sync::watch;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

/// A channel to these services.
fn channel(routes: Routes) -> Channel {
    Endpoint::from_static("http://memory").connect_with_connector_lazy(tower::service_fn(move |_| {
        let (near, far) = tokio::io::duplex(1 << 16);
        let incoming = stream::iter([io::Result::Ok(far)]).chain(stream::pending());
        tokio::spawn(Server::builder().add_routes(routes.clone()).serve_with_incoming(incoming));
        std::future::ready(io::Result::Ok(TokioIo::new(near)))
    }))
}

/// A VIP of this address.
pub(crate) fn vip(address: &str) -> nsp::Vip {
    nsp::Vip { name: "vip".into(), address: address.into(), ..nsp::Vip::default() }
}

/// The number of the session, and what was last told in it.
type Session = (u32, Option<nsp::VipResponse>);

/// An NSP that knows VIPs only, and tells what it is told to.
#[derive(Clone, Default)]
pub(crate) struct Nsp(Arc<watch::Sender<Session>>);

impl Nsp {
    pub(crate) fn channel(&self) -> Channel {
        channel(Routes::new(ConfigurationManagerServer::new(self.clone())))
    }

    /// Tells these VIPs.
    pub(crate) fn tell(&self, vips: &[&str]) {
        let vips = vips.iter().map(|address| vip(address)).collect();
        self.0.send_modify(|session| session.1 = Some(nsp::VipResponse { vips }));
    }

    /// Ends the streams; the next ones say nothing until it is told something.
    pub(crate) fn restart(&self) {
        self.0.send_modify(|session| *session = (session.0 + 1, None));
    }
}

type Told<T> = Result<Response<BoxStream<'static, Result<T, Status>>>, Status>;

fn nothing<T>() -> Told<T> {
    Err(Status::unimplemented("VIPs only"))
}

#[tonic::async_trait]
impl ConfigurationManager for Nsp {
    type WatchTrenchStream = BoxStream<'static, Result<nsp::TrenchResponse, Status>>;
    type WatchConduitStream = BoxStream<'static, Result<nsp::ConduitResponse, Status>>;
    type WatchStreamStream = BoxStream<'static, Result<nsp::StreamResponse, Status>>;
    type WatchFlowStream = BoxStream<'static, Result<nsp::FlowResponse, Status>>;
    type WatchVipStream = BoxStream<'static, Result<nsp::VipResponse, Status>>;
    type WatchAttractorStream = BoxStream<'static, Result<nsp::AttractorResponse, Status>>;
    type WatchGatewayStream = BoxStream<'static, Result<nsp::GatewayResponse, Status>>;

    async fn watch_vip(&self, _: Request<nsp::Vip>) -> Told<nsp::VipResponse> {
        let mut sessions = self.0.subscribe();
        sessions.mark_changed();
        let session = sessions.borrow().0;
        let told = stream::unfold(sessions, move |mut sessions| async move {
            loop {
                sessions.changed().await.ok()?;
                let (now, told) = sessions.borrow_and_update().clone();
                if now != session {
                    return None;
                }
                if let Some(told) = told {
                    return Some((Ok(told), sessions));
                }
            }
        });
        Ok(Response::new(told.boxed()))
    }

    async fn watch_trench(&self, _: Request<nsp::Trench>) -> Told<nsp::TrenchResponse> {
        nothing()
    }

    async fn watch_conduit(&self, _: Request<nsp::Conduit>) -> Told<nsp::ConduitResponse> {
        nothing()
    }

    async fn watch_stream(&self, _: Request<nsp::Stream>) -> Told<nsp::StreamResponse> {
        nothing()
    }

    async fn watch_flow(&self, _: Request<nsp::Flow>) -> Told<nsp::FlowResponse> {
        nothing()
    }

    async fn watch_attractor(&self, _: Request<nsp::Attractor>) -> Told<nsp::AttractorResponse> {
        nothing()
    }

    async fn watch_gateway(&self, _: Request<nsp::Gateway>) -> Told<nsp::GatewayResponse> {
        nothing()
    }
}

/// An IPAM that notes what it is asked for: the names that were allocated, and those that were released.
#[derive(Clone, Default)]
pub(crate) struct Ipam(Arc<Mutex<(Vec<String>, Vec<String>)>>);

impl Ipam {
    pub(crate) fn channel(&self) -> Channel {
        channel(Routes::new(IpamServer::new(self.clone())))
    }

    fn noted(&self) -> MutexGuard<'_, (Vec<String>, Vec<String>)> {
        self.0.lock().unwrap()
    }

    /// How many allocations there have been so far, renewed ones too.
    pub(crate) fn allocations(&self) -> usize {
        self.noted().0.len()
    }

    /// What has been released since it was last asked.
    pub(crate) fn released(&self) -> Vec<String> {
        std::mem::take(&mut self.noted().1)
    }
}

#[tonic::async_trait]
impl ipam_server::Ipam for Ipam {
    async fn allocate(&self, child: Request<Child>) -> Result<Response<Prefix>, Status> {
        let name = child.into_inner().name;
        let address = if name.ends_with("-src") { "172.16.1.6" } else { "172.16.1.7" };
        self.noted().0.push(name);
        Ok(Response::new(Prefix { address: address.into(), prefix_length: 24 }))
    }

    async fn release(&self, child: Request<Child>) -> Result<Response<()>, Status> {
        self.noted().1.push(child.into_inner().name);
        Ok(Response::new(()))
    }
}
