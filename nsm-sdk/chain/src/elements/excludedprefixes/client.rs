//! What the other connections of a client have already.

use super::AwarenessGroups;
use crate::{CloseCall, Connection, Element, Error, IpContext, Next, RequestCall, unwind};
use ipnet::IpNet;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};
use tonic::Code;

/// Keeps the connections of one client apart: the addresses, the host routes and the excluded prefixes of each are
/// excluded in requests for the others. An answer with an address that another connection has is closed again.
///
/// What it adds is between this process and the endpoints: the caller gets its own list back.
#[derive(Debug, Default)]
pub struct ExcludedPrefixesClient {
    groups: AwarenessGroups,
    connections: Mutex<BTreeMap<String, Taken>>,
}

/// What one connection has.
#[derive(Clone, Debug, Default)]
struct Taken {
    /// For the awareness groups: service and labels.
    connection: Connection,
    prefixes: BTreeSet<String>,
}

const NAME: &str = "excludedprefixes";

/// A host address without its mask, a route to one host; `None` for whole networks and for what is no prefix.
fn host(text: &str, any_mask: bool) -> Option<IpNet> {
    let net: IpNet = text.parse().ok()?;
    let single = IpNet::from(net.addr());
    (any_mask || net == single).then_some(single)
}

/// Addresses of either side, and routes to single hosts.
fn hosts(context: &IpContext) -> impl Iterator<Item = IpNet> {
    let addresses = context.src_ip_addrs.iter().chain(&context.dst_ip_addrs).filter_map(|text| host(text, true));
    let routes = context.src_routes.iter().chain(&context.dst_routes);
    addresses.chain(routes.filter_map(|route| host(&route.prefix, false)))
}

fn ip_context(connection: &Connection) -> Option<&IpContext> {
    connection.context.as_ref()?.ip_context.as_ref()
}

impl ExcludedPrefixesClient {
    /// Keeps all connections apart.
    pub fn new() -> Self {
        Self::default()
    }

    /// Connections of one group may share addresses.
    #[must_use]
    pub fn with_groups(mut self, groups: AwarenessGroups) -> Self {
        self.groups = groups;
        self
    }

    fn connections(&self) -> MutexGuard<'_, BTreeMap<String, Taken>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `connection` must not get.
    fn taken_by_others(&self, connection: &Connection) -> BTreeSet<String> {
        let connections = self.connections();
        let others = connections.iter().filter(|(id, _)| **id != connection.id);
        let apart = others.filter(|(_, other)| !self.groups.together(connection, &other.connection));
        apart.flat_map(|(_, other)| other.prefixes.iter().cloned()).collect()
    }
}

#[async_trait::async_trait]
impl Element for ExcludedPrefixesClient {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let postponed = call.ctx.postpone();
        let connection = call.connection_mut();
        let (id, others) = (connection.id.clone(), self.taken_by_others(connection));
        let list = &mut connection.context.get_or_insert_default().ip_context.get_or_insert_default().excluded_prefixes;
        let asked = list.clone();
        list.extend(others.iter().filter(|prefix| !asked.contains(prefix)).cloned());

        let mut connection = next.request(call).await?;
        let clash = ip_context(&connection).and_then(|context| {
            let addresses = context.src_ip_addrs.iter().chain(&context.dst_ip_addrs);
            addresses.filter_map(|text| host(text, true)).find(|address| others.contains(&address.to_string()))
        });
        if let Some(address) = clash {
            let text = format!("the answer has {}, which another connection of this client has", address.addr());
            let error = Error::new(NAME, &id, text).with_code(Code::AlreadyExists);
            // A failing refresh leaves what works.
            let established = self.connections().contains_key(&id);
            return Err(match established {
                true => error,
                false => unwind(&next, connection, &postponed, error).await,
            });
        }
        let mut taken = Taken::default();
        if let Some(context) = connection.context.as_mut().and_then(|context| context.ip_context.as_mut()) {
            taken.prefixes = hosts(context).map(|host| host.to_string()).collect();
            let own =
                context.excluded_prefixes.iter().filter(|prefix| asked.contains(prefix) || !others.contains(*prefix));
            taken.prefixes.extend(own.cloned());
            context.excluded_prefixes = asked;
        }
        taken.connection.network_service.clone_from(&connection.network_service);
        taken.connection.labels.clone_from(&connection.labels);
        self.connections().insert(id, taken);
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let id = call.id().to_owned();
        let result = next.close(call).await;
        self.connections().remove(&id);
        result
    }
}

#[cfg(test)]
mod tests;
