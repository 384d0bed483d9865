//! One pair of addresses for each connection.

use super::{
    ip_context,
    pool::{Pool, nets},
};
use crate::{CloseCall, Connection, Element, Error, IpContext, Key, Next, RequestCall, Route, Side};
use ipnet::IpNet;
use std::{
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tonic::Code;

/// Gives both ends of a connection a host address (/32 or /128) and a route to the other end. The endpoint's side is
/// pulled first. Addresses that a request brings along are kept if they are free.
pub struct PointToPoint {
    pools: Mutex<Vec<Pool>>,
    key: Key<Option<Pair>>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Pair {
    src: IpAddr,
    dst: IpAddr,
}

const NAME: &str = "point2pointipam";

impl Pair {
    fn texts(&self) -> (String, String) {
        (IpNet::from(self.src).to_string(), IpNet::from(self.dst).to_string())
    }

    fn add_to(&self, context: &mut IpContext) {
        let (src, dst) = self.texts();
        let add = |list: &mut Vec<String>, text: &String| {
            if !list.contains(text) {
                list.push(text.clone());
            }
        };
        let route = |list: &mut Vec<Route>, prefix: &String| {
            if !list.iter().any(|route| route.prefix == *prefix) {
                list.push(Route { prefix: prefix.clone(), ..Default::default() });
            }
        };
        add(&mut context.src_ip_addrs, &src);
        route(&mut context.src_routes, &dst);
        add(&mut context.dst_ip_addrs, &dst);
        route(&mut context.dst_routes, &src);
    }

    fn remove_from(&self, context: &mut IpContext) {
        let (src, dst) = self.texts();
        context.src_ip_addrs.retain(|address| *address != src);
        context.dst_ip_addrs.retain(|address| *address != dst);
        context.src_routes.retain(|route| route.prefix != dst);
        context.dst_routes.retain(|route| route.prefix != src);
    }
}

impl PointToPoint {
    /// Allocates from these prefixes, in their order.
    pub fn new(prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        Self { pools: Mutex::new(prefixes.into_iter().map(Pool::new).collect()), key: Key::new(Side::Server) }
    }

    fn pools(&self) -> MutexGuard<'_, Vec<Pool>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self, pair: Pair) {
        for pool in self.pools().iter_mut().filter(|pool| pool.net().contains(&pair.dst)) {
            pool.free(pair.src);
            pool.free(pair.dst);
        }
    }

    fn allocate(&self, context: &IpContext, excluded: &[IpNet]) -> Option<Pair> {
        let mut pools = self.pools();
        pools.iter_mut().find_map(|pool| recover(pool, context, excluded)).or_else(|| {
            pools.iter_mut().find_map(|pool| {
                let dst = pool.pull(excluded)?;
                match pool.pull(excluded) {
                    Some(src) => Some(Pair { src, dst }),
                    None => {
                        pool.free(dst);
                        None
                    }
                }
            })
        })
    }
}

/// A pair that the context lists and the pool can give.
fn recover(pool: &mut Pool, context: &IpContext, excluded: &[IpNet]) -> Option<Pair> {
    let addresses = |list: &[String]| -> Vec<IpAddr> {
        list.iter().filter_map(|text| text.parse::<IpNet>().ok()).map(|net| net.addr()).collect()
    };
    for dst in addresses(&context.dst_ip_addrs) {
        for src in addresses(&context.src_ip_addrs) {
            if src != dst && pool.pull_this(dst, excluded) {
                if pool.pull_this(src, excluded) {
                    return Some(Pair { src, dst });
                }
                pool.free(dst);
            }
        }
    }
    None
}

#[async_trait::async_trait]
impl Element for PointToPoint {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let (id, metadata) = (call.id().to_owned(), call.ctx.metadata(NAME, call.id())?.clone());
        if self.pools().is_empty() {
            return Err(Error::new(NAME, id, "required one or more prefixes").with_code(Code::Internal));
        }
        let context = ip_context(call.connection_mut());
        let excluded = nets(&context.excluded_prefixes);
        let mut known = metadata.get(&self.key).flatten();
        let forbidden = |ip: &IpAddr| excluded.iter().any(|range| range.contains(ip));
        if let Some(old) = known.take_if(|pair| forbidden(&pair.src) || forbidden(&pair.dst)) {
            old.remove_from(context);
            self.free(old);
            metadata.remove(&self.key);
        }
        let (pair, fresh) = match known {
            Some(pair) => (pair, false),
            None => {
                let pair = self
                    .allocate(context, &excluded)
                    .ok_or_else(|| Error::new(NAME, &id, "no address is free").with_code(Code::ResourceExhausted))?;
                metadata.insert(&self.key, Some(pair));
                (pair, true)
            }
        };
        pair.add_to(context);
        let result = next.request(call).await;
        if result.is_err() && fresh {
            metadata.remove(&self.key);
            self.free(pair);
        }
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let pair = call.ctx.metadata(NAME, call.id())?.remove(&self.key).flatten();
        let result = next.close(call).await;
        if let Some(pair) = pair {
            self.free(pair);
        }
        result
    }
}

#[cfg(test)]
mod tests;
