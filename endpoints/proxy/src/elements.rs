//! The proxy's own chain elements: addresses from the IPAM, for both of its roles.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;
use meridio_proto::nsm::connectioncontext::IpContext;
use nsm_chain::elements::timeout::KeepAlive;
use nsm_chain::{CloseCall, Connection, Element, Error, Key, Next, RequestCall, Side};
use tonic::Code;

use crate::inputs::Shared;
use crate::ipam::Addresses;
use crate::ipcontext::{self, Allocation};
use crate::probe::Answers;

const NAME: &str = "ipcontext";

/// Gives a target its addresses, and the bridge's as its gateways. Keeps a connection beyond its expiry while these addresses answer.
///
/// Addresses belong to the id of the first path segment: that of the target, which is the same before and after a restart of anything.
/// A target that comes back by another path has another connection here, and the old one expires some time after: which of them is
/// the target's is known by who served it last.
pub(crate) struct TargetAddresses {
    addresses: Addresses,
    shared: Shared,
    answers: Arc<dyn Answers>,
    /// The connection that served each target last, by the target's id.
    serving: Mutex<HashMap<String, String>>,
}

impl TargetAddresses {
    pub(crate) fn new(addresses: Addresses, shared: Shared, answers: Arc<dyn Answers>) -> Self {
        Self { addresses, shared, answers, serving: Mutex::default() }
    }

    fn bridge(&self) -> BTreeSet<IpNet> {
        self.shared.look(|inputs| inputs.bridge.clone())
    }

    fn serving(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the target `id` is served by `connection`.
    fn serve(&self, id: &str, connection: &Connection) {
        let mut serving = self.serving();
        serving.insert(id.to_owned(), connection.id.clone());
        // One that served it before may have been closed while this one was made.
        self.addresses.keep(id);
        if let Some(name) = ipcontext::interface(connection) {
            let target = (name.to_owned(), target_addresses(connection));
            self.shared.change(|inputs| _ = inputs.targets.insert(id.to_owned(), target));
        }
    }

    /// Releases the addresses of the target `id` and forgets it, if nobody serves it but `own`.
    fn leave(&self, id: &str, own: Option<&str>) {
        let mut serving = self.serving();
        if serving.get(id).is_none_or(|connection| Some(connection.as_str()) == own) {
            serving.remove(id);
            self.addresses.release_later(id);
            self.shared.change(|inputs| _ = inputs.targets.remove(id));
        }
    }
}

#[async_trait::async_trait]
impl Element for TargetAddresses {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let id = first_segment(call.connection_mut());
        let again = |text: &str| Error::new(NAME, id.clone(), text).with_code(Code::Unavailable);
        if self.bridge().is_empty() {
            return Err(again("the bridge has no address yet"));
        }
        let allocated = self.addresses.of_connection(&id).await;
        let bridge = self.bridge();
        let context = ip_context(call.connection_mut());
        match allocated {
            Ok(allocation) => ipcontext::apply(context, &allocation, &bridge.iter().copied().collect::<Vec<_>>()),
            // A connection that works does not end because the IPAM is away.
            Err(status) if has_addresses(context) => {
                tracing::warn!(connection = id, error = %status, "no answer of the IPAM, addresses stay as they are");
            }
            Err(status) => {
                self.leave(&id, None);
                return Err(Error::new(NAME, id, format!("no address: {status}")).with_code(status.code()));
            }
        }
        let result = match next.request(call).await {
            // Who has the connection already is told of new gateways; this target would not be.
            Ok(_) if self.bridge() != bridge => Err(again("the bridge's addresses have changed meanwhile")),
            result => result,
        };
        match &result {
            Ok(connection) => self.serve(&id, connection),
            // What was served before is so still, whichever connection it was.
            Err(_) => self.leave(&id, None),
        }
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.leave(&first_segment(&call.message), Some(call.id()));
        next.close(call).await
    }
}

#[async_trait::async_trait]
impl KeepAlive for TargetAddresses {
    /// NSM keeps the interface of a target that is silent towards it but answers; its addresses must not go to another one.
    async fn keep(&self, connection: &Connection) -> bool {
        let id = first_segment(connection);
        if self.serving().get(&id) != Some(&connection.id) {
            // Who answers has another connection now.
            return false;
        }
        let bridge = self.bridge();
        // VIPs are the target's addresses too, but other targets have them as well.
        let mut own = target_addresses(connection);
        own.retain(|address| bridge.iter().any(|net| net.contains(address)));
        let answers = own.into_iter().map(|address| self.answers.answers(address));
        if !futures_util::future::join_all(answers).await.contains(&true) {
            return false;
        }
        if let Err(status) = self.addresses.renew(&id).await {
            tracing::warn!(connection = id, error = %status, "no answer of the IPAM, the lease is not renewed");
        }
        true
    }
}

/// Gives both ends of the connection to a load balancer their addresses: `<id>-src` is the load balancer's, `<id>-dst` this proxy's.
pub(crate) struct BalancerAddresses {
    addresses: Addresses,
    established: Key<bool>,
}

impl BalancerAddresses {
    pub(crate) fn new(addresses: Addresses) -> Self {
        Self { addresses, established: Key::new(Side::Client) }
    }
}

#[async_trait::async_trait]
impl Element for BalancerAddresses {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        let id = first_segment(call.connection_mut());
        let allocated = self.addresses.of_connection(&id).await;
        let context = ip_context(call.connection_mut());
        match allocated {
            Ok(Allocation { source, destination }) => {
                context.src_ip_addrs = destination.iter().map(IpNet::to_string).collect();
                context.dst_ip_addrs = source.iter().map(IpNet::to_string).collect();
            }
            Err(status) if has_addresses(context) => {
                tracing::warn!(connection = id, error = %status, "no answer of the IPAM, addresses stay as they are");
            }
            Err(status) => return Err(Error::new(NAME, id, format!("no address: {status}")).with_code(status.code())),
        }
        let result = next.request(call).await;
        match &result {
            Ok(_) => drop(metadata.insert(&self.established, true)),
            Err(_) if metadata.get(&self.established).is_none() => self.addresses.release_later(&id),
            Err(_) => {}
        }
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.addresses.release_later(&first_segment(&call.message));
        next.close(call).await
    }
}

fn ip_context(connection: &mut Connection) -> &mut IpContext {
    connection.context.get_or_insert_default().ip_context.get_or_insert_default()
}

fn has_addresses(context: &IpContext) -> bool {
    !context.src_ip_addrs.is_empty() && !context.dst_ip_addrs.is_empty()
}

/// The addresses at the target's end, VIPs among them.
fn target_addresses(connection: &Connection) -> BTreeSet<IpAddr> {
    let ip = connection.context.as_ref().and_then(|context| context.ip_context.as_ref());
    ipcontext::addresses(ip.map_or(&[], |ip| &ip.src_ip_addrs))
}

/// The id of a connection at its origin; its own id where it has no path.
fn first_segment(connection: &Connection) -> String {
    let first = connection.path.as_ref().and_then(|path| path.path_segments.first());
    first.map_or_else(|| connection.id.clone(), |segment| segment.id.clone())
}

#[cfg(test)]
mod tests;
