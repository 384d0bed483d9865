//! The proxy's own chain elements: addresses from the IPAM, for both of its roles.

use std::collections::BTreeSet;

use ipnet::IpNet;
use meridio_proto::nsm::connectioncontext::IpContext;
use nsm_chain::{CloseCall, Connection, Element, Error, Key, Next, RequestCall, Side};
use tonic::Code;

use crate::inputs::Shared;
use crate::ipam::Addresses;
use crate::ipcontext::{self, Allocation};

const NAME: &str = "ipcontext";

/// Gives a target its addresses, and the bridge's as its gateways.
///
/// Addresses belong to the id of the first path segment: that of the target, which is the same before and after a restart of anything.
pub(crate) struct TargetAddresses {
    addresses: Addresses,
    shared: Shared,
    served: Key<bool>,
}

impl TargetAddresses {
    pub(crate) fn new(addresses: Addresses, shared: Shared) -> Self {
        Self { addresses, shared, served: Key::new(Side::Server) }
    }

    fn bridge(&self) -> BTreeSet<IpNet> {
        self.shared.look(|inputs| inputs.bridge.clone())
    }
}

#[async_trait::async_trait]
impl Element for TargetAddresses {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
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
            Err(status) => return Err(Error::new(NAME, id, format!("no address: {status}")).with_code(status.code())),
        }
        let result = match next.request(call).await {
            // Who has the connection already is told of new gateways; this target would not be.
            Ok(_) if self.bridge() != bridge => Err(again("the bridge's addresses have changed meanwhile")),
            result => result,
        };
        match &result {
            Ok(connection) => {
                metadata.insert(&self.served, true);
                if let Some(name) = ipcontext::interface(connection) {
                    let ip = connection.context.as_ref().and_then(|context| context.ip_context.as_ref());
                    let addresses = ipcontext::addresses(ip.map_or(&[], |ip| &ip.src_ip_addrs));
                    self.shared.change(|inputs| _ = inputs.targets.insert(id.clone(), (name.to_owned(), addresses)));
                }
            }
            Err(_) if metadata.get(&self.served).is_none() => self.addresses.release_later(&id),
            Err(_) => {}
        }
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let id = first_segment(&call.message);
        self.addresses.release_later(&id);
        self.shared.change(|inputs| _ = inputs.targets.remove(&id));
        next.close(call).await
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

/// The id of a connection at its origin; its own id where it has no path.
fn first_segment(connection: &Connection) -> String {
    let first = connection.path.as_ref().and_then(|path| path.path_segments.first());
    first.map_or_else(|| connection.id.clone(), |segment| segment.id.clone())
}
