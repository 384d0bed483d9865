//! Addresses from the IPAM, and their release some time after a connection has ended.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use meridio_proto::ipam::v1::ipam_client::IpamClient;
use meridio_proto::ipam::v1::{Child, IpFamily, Prefix, Subnet};
use meridio_proto::nsp::v1::{Conduit, Trench};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::transport::Channel;

use crate::ipcontext::Allocation;
use crate::settings::{Families, Settings};

/// Pause between two attempts to release addresses.
const RELEASE_RETRY: Duration = Duration::from_secs(2);
/// Time for one call.
const CALL: Duration = Duration::from_secs(10);

/// The node's part of the conduit's addresses. Clones share the pending releases.
#[derive(Clone)]
pub(crate) struct Addresses {
    client: IpamClient<Channel>,
    conduit: Conduit,
    node: String,
    families: Families,
    delay: Duration,
    pending: Arc<Mutex<HashMap<String, CancellationToken>>>,
}

impl Addresses {
    pub(crate) fn new(channel: Channel, settings: &Settings, families: Families) -> Self {
        let trench = Trench { name: settings.trench.clone() };
        Self {
            client: IpamClient::new(channel),
            conduit: Conduit { name: settings.conduit.clone(), trench: Some(trench), ..Conduit::default() },
            node: settings.host.clone(),
            families,
            delay: settings.ip_release_delay.into(),
            pending: Arc::default(),
        }
    }

    /// The addresses called `name`, one per family; the same ones for the same name.
    pub(crate) async fn allocate(&self, name: &str) -> Result<Vec<IpNet>, Status> {
        let calls = self.families.each().map(|v6| async move {
            let mut request = tonic::Request::new(self.child(name, v6));
            request.set_timeout(CALL);
            let prefix = self.client.clone().allocate(request).await?.into_inner();
            parse(&prefix).ok_or_else(|| Status::internal(format!("IPAM answered {prefix:?} for {name}: no address")))
        });
        futures_util::future::try_join_all(calls).await
    }

    /// Both ends' addresses of connection `id`. A pending release of them is called off.
    pub(crate) async fn of_connection(&self, id: &str) -> Result<Allocation, Status> {
        self.keep(id);
        self.renew(id).await
    }

    /// The same, for who has them already: a pending release of them stays.
    pub(crate) async fn renew(&self, id: &str) -> Result<Allocation, Status> {
        let (source, destination) = (format!("{id}-src"), format!("{id}-dst"));
        let (source, destination) = tokio::try_join!(self.allocate(&source), self.allocate(&destination))?;
        Ok(Allocation { source, destination })
    }

    /// Calls a pending release of the addresses of `id` off.
    pub(crate) fn keep(&self, id: &str) {
        if let Some(release) = self.pending().remove(id) {
            release.cancel();
        }
    }

    /// Releases the addresses of connection `id` after the delay, trying until it succeeds, unless they are asked for again before.
    pub(crate) fn release_later(&self, id: &str) {
        let token = CancellationToken::new();
        if let Some(earlier) = self.pending().insert(id.to_owned(), token.clone()) {
            earlier.cancel();
        }
        let (this, id) = (self.clone(), id.to_owned());
        tokio::spawn(async move {
            let release = async {
                tokio::time::sleep(this.delay).await;
                while let Err(status) = this.release(&id).await {
                    tracing::warn!(connection = id, error = %status, "addresses not released, trying again");
                    tokio::time::sleep(RELEASE_RETRY).await;
                }
            };
            tokio::select! {
                () = token.cancelled() => return,
                () = release => {}
            }
            // A newer release of the same id has cancelled this one; so what is pending is this.
            if !token.is_cancelled() {
                this.pending().remove(&id);
            }
        });
    }

    async fn release(&self, id: &str) -> Result<(), Status> {
        for end in ["src", "dst"] {
            for v6 in self.families.each() {
                let mut request = tonic::Request::new(self.child(&format!("{id}-{end}"), v6));
                request.set_timeout(CALL);
                self.client.clone().release(request).await?;
            }
        }
        Ok(())
    }

    fn child(&self, name: &str, v6: bool) -> Child {
        let family = if v6 { IpFamily::Ipv6 } else { IpFamily::Ipv4 };
        let subnet = Subnet { conduit: Some(self.conduit.clone()), node: self.node.clone(), ip_family: family.into() };
        Child { name: name.to_owned(), subnet: Some(subnet) }
    }

    fn pending(&self) -> MutexGuard<'_, HashMap<String, CancellationToken>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn parse(prefix: &Prefix) -> Option<IpNet> {
    let length = u8::try_from(prefix.prefix_length).ok()?;
    // Some answers carry the length in the address too.
    let address = prefix.address.split('/').next()?.parse().ok()?;
    IpNet::new(address, length).ok()
}
