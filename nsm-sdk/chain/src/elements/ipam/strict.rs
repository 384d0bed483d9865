//! Only the endpoint's own addresses, each for one connection.

use super::ip_context;
use crate::{CloseCall, Connection, Element, Error, Key, Next, RequestCall, Route, Side};
use ipnet::IpNet;
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Drops addresses that are not of the endpoint's prefixes or that another connection has, and routes to them: a client that comes
/// from another endpoint, or from before a restart of this one, gets new ones.
pub struct Strict {
    prefixes: Vec<IpNet>,
    /// Whose each address is, by the connection's id.
    in_use: Mutex<HashMap<IpAddr, String>>,
    /// What a connection has.
    key: Key<Vec<IpAddr>>,
}

const NAME: &str = "strictipam";

impl Strict {
    /// Allows these prefixes.
    pub fn new(prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        Self { prefixes: prefixes.into_iter().collect(), in_use: Mutex::default(), key: Key::new(Side::Server) }
    }

    fn in_use(&self) -> MutexGuard<'_, HashMap<IpAddr, String>> {
        self.in_use.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_own(&self, address: IpAddr) -> bool {
        self.prefixes.iter().any(|own| own.contains(&address))
    }

    /// Removes what is foreign or another connection's and returns it; what stays is taken for `id`, so that of two requests under way
    /// for one address only one keeps it.
    fn keep_own(&self, id: &str, addresses: &mut Vec<String>) -> Vec<IpNet> {
        let mut in_use = self.in_use();
        let mut dropped = Vec::new();
        addresses.retain(|text| {
            let Ok(net) = text.parse::<IpNet>() else { return false };
            let address = net.addr();
            let keep = self.is_own(address) && in_use.get(&address).is_none_or(|owner| owner == id);
            if keep {
                in_use.insert(address, id.to_owned());
            } else {
                dropped.push(net.trunc());
            }
            keep
        });
        dropped
    }

    /// From now on `id` has these addresses, as far as they are nobody else's, and no others. Returns which they are.
    fn settle(&self, id: &str, before: &[IpAddr], now: Vec<IpAddr>) -> Vec<IpAddr> {
        let mut in_use = self.in_use();
        for address in before {
            if in_use.get(address).is_some_and(|owner| owner == id) {
                in_use.remove(address);
            }
        }
        let free = |address: &IpAddr| in_use.entry(*address).or_insert_with(|| id.to_owned()) == id;
        now.into_iter().filter(free).collect()
    }
}

fn listed(connection: &Connection) -> Vec<IpAddr> {
    let context = connection.context.as_ref().and_then(|context| context.ip_context.as_ref());
    let texts = context.into_iter().flat_map(|context| context.src_ip_addrs.iter().chain(&context.dst_ip_addrs));
    texts.filter_map(|text| text.parse::<IpNet>().ok()).map(|net| net.addr()).collect()
}

fn drop_routes(routes: &mut Vec<Route>, gone: &[IpNet]) {
    routes.retain(|route| route.prefix.parse::<IpNet>().is_ok_and(|prefix| !gone.contains(&prefix.trunc())));
}

#[async_trait::async_trait]
impl Element for Strict {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let (id, metadata) = (call.id().to_owned(), call.ctx.metadata(NAME, call.id())?.clone());
        let before = metadata.get(&self.key).unwrap_or_default();
        let context = ip_context(call.connection_mut());
        let src = self.keep_own(&id, &mut context.src_ip_addrs);
        let dst = self.keep_own(&id, &mut context.dst_ip_addrs);
        drop_routes(&mut context.src_routes, &dst);
        drop_routes(&mut context.dst_routes, &src);
        let taken = [before.as_slice(), &listed(&call.connection())].concat();
        let result = next.request(call).await;
        let now = match &result {
            Ok(connection) => listed(connection).into_iter().filter(|address| self.is_own(*address)).collect(),
            Err(_) => before,
        };
        let now = self.settle(&id, &taken, now);
        metadata.insert(&self.key, now);
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let (id, taken) = (call.id().to_owned(), call.ctx.metadata(NAME, call.id())?.remove(&self.key));
        let result = next.close(call).await;
        self.settle(&id, &taken.unwrap_or_default(), Vec::new());
        result
    }
}
