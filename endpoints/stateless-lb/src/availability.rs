//! Tells the frontend of this pod whether this load balancer can forward (`loadbalancer.v1`).

use std::collections::BTreeMap;
use std::pin::Pin;

use futures_util::{Stream, StreamExt};
use lb::stream_availability_service_server::{StreamAvailabilityService, StreamAvailabilityServiceServer};
use meridio_proto::loadbalancer::v1 as lb;
use meridio_proto::nsp::v1 as nsp;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

/// The service; `None` until it is known whether anything can be forwarded: a watcher then hears nothing rather than "no",
/// because this process may have started in front of tables that are in use.
#[derive(Clone, Debug)]
pub(crate) struct Availability {
    forwarding: watch::Sender<Option<bool>>,
    hostname: String,
}

impl Availability {
    pub(crate) fn new(hostname: &str) -> Self {
        Availability { forwarding: watch::Sender::new(None), hostname: hostname.to_owned() }
    }

    /// Says whether packets are forwarded: a program is attached, and at least one stream has a ready target.
    pub(crate) fn set(&self, forwarding: bool) {
        let changed = self.forwarding.send_if_modified(|known| known.replace(forwarding) != Some(forwarding));
        if changed {
            tracing::info!(forwarding, "stream availability");
        }
    }

    /// What has been said.
    #[cfg(test)]
    pub(crate) fn said(&self) -> Option<bool> {
        *self.forwarding.borrow()
    }

    pub(crate) fn server(self) -> StreamAvailabilityServiceServer<Self> {
        StreamAvailabilityServiceServer::new(self)
    }

    fn response(&self, forwarding: bool) -> lb::Response {
        let mut target = lb::Target::default();
        if forwarding {
            target.context = BTreeMap::from([("identifier".to_owned(), self.hostname.clone())]).into_iter().collect();
            target.stream = Some(nsp::Stream::default());
        }
        lb::Response { targets: vec![target] }
    }
}

#[tonic::async_trait]
impl StreamAvailabilityService for Availability {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<lb::Response, Status>> + Send>>;

    async fn watch(&self, _request: Request<()>) -> Result<Response<Self::WatchStream>, Status> {
        let this = self.clone();
        let mut last = None;
        let responses = WatchStream::new(self.forwarding.subscribe()).filter_map(move |forwarding| {
            let fresh = forwarding.filter(|f| last.replace(*f) != Some(*f));
            std::future::ready(fresh.map(|f| Ok(this.response(f))))
        });
        Ok(Response::new(Box::pin(responses)))
    }
}
