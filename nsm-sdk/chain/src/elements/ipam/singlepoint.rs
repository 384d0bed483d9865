//! One address for each client.

use super::{
    ip_context,
    pool::{Pool, nets},
};
use crate::{CloseCall, Connection, Element, Error, Key, Next, RequestCall, Side};
use ipnet::IpNet;
use std::{
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tonic::Code;

/// Gives each client one address with its prefix's mask. The first address of each prefix is the endpoint's own; IPv4
/// broadcast addresses are left out. Neither destination addresses nor routes are written.
pub struct SinglePoint {
    pools: Mutex<Vec<Pool>>,
    own: Vec<IpAddr>,
    key: Key<Option<IpNet>>,
}

const NAME: &str = "singlepointipam";

impl SinglePoint {
    /// Allocates from these prefixes, in their order.
    pub fn new(prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        let mut pools: Vec<_> = prefixes.into_iter().map(Pool::new).collect();
        for pool in &mut pools {
            if let IpNet::V4(net) = pool.net()
                && net.prefix_len() < 31
            {
                pool.pull_this(net.broadcast().into(), &[]);
            }
        }
        let own = pools.iter_mut().filter_map(|pool| pool.pull(&[])).collect();
        Self { pools: Mutex::new(pools), own, key: Key::new(Side::Server) }
    }

    /// The endpoint's own addresses, one per prefix.
    pub fn own(&self) -> &[IpAddr] {
        &self.own
    }

    fn pools(&self) -> MutexGuard<'_, Vec<Pool>> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self, address: IpNet) {
        for pool in self.pools().iter_mut().filter(|pool| pool.net().contains(&address.addr())) {
            pool.free(address.addr());
        }
    }

    fn allocate(&self, listed: &[String], excluded: &[IpNet]) -> Option<IpNet> {
        let mut pools = self.pools();
        let listed = listed.iter().filter_map(|text| text.parse::<IpNet>().ok()).map(|net| net.addr());
        for address in listed {
            for pool in pools.iter_mut() {
                if pool.pull_this(address, excluded) {
                    return IpNet::new(address, pool.net().prefix_len()).ok();
                }
            }
        }
        let mut pull = |pool: &mut Pool| IpNet::new(pool.pull(excluded)?, pool.net().prefix_len()).ok();
        pools.iter_mut().find_map(&mut pull)
    }
}

#[async_trait::async_trait]
impl Element for SinglePoint {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let (id, metadata) = (call.id().to_owned(), call.ctx.metadata(NAME, call.id())?.clone());
        let context = ip_context(call.connection_mut());
        let excluded = nets(&context.excluded_prefixes);
        let mut known = metadata.get(&self.key).flatten();
        if let Some(old) = known.take_if(|own| excluded.iter().any(|range| range.contains(&own.addr()))) {
            context.src_ip_addrs.retain(|address| *address != old.to_string());
            self.free(old);
            metadata.remove(&self.key);
        }
        let (address, fresh) = match known {
            Some(address) => (address, false),
            None => {
                let address = self
                    .allocate(&context.src_ip_addrs, &excluded)
                    .ok_or_else(|| Error::new(NAME, &id, "no address is free").with_code(Code::ResourceExhausted))?;
                metadata.insert(&self.key, Some(address));
                (address, true)
            }
        };
        if !context.src_ip_addrs.contains(&address.to_string()) {
            context.src_ip_addrs.push(address.to_string());
        }
        let result = next.request(call).await;
        if result.is_err() && fresh {
            metadata.remove(&self.key);
            self.free(address);
        }
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let address = call.ctx.metadata(NAME, call.id())?.remove(&self.key).flatten();
        let result = next.close(call).await;
        if let Some(address) = address {
            self.free(address);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context,
        core::testing::{close, request_id},
        elements::metadata::MetadataElement,
    };

    // Conformance 94
    #[tokio::test]
    async fn masks_no_broadcast_no_destination() {
        let ipam = SinglePoint::new(["10.0.0.0/29".parse().unwrap()]);
        assert_eq!(ipam.own(), ["10.0.0.0".parse::<IpAddr>().unwrap()]);
        let chain = Chain::builder().element(MetadataElement::new()).element(ipam).build();
        let run = async |id: &str| {
            let connection = chain.request(request_id(id, Context::new())).await?;
            let context = connection.context.unwrap().ip_context.unwrap();
            assert!(context.dst_ip_addrs.is_empty() && context.src_routes.is_empty());
            Ok::<_, Error>(context.src_ip_addrs[0].clone())
        };
        for n in 1..=6 {
            assert_eq!(run(&format!("c{n}")).await.unwrap(), format!("10.0.0.{n}/29"));
        }
        assert_eq!(run("c7").await.unwrap_err().code(), Code::ResourceExhausted);
        close(&chain, "c3").await.unwrap();
        assert_eq!(run("c7").await.unwrap(), "10.0.0.3/29");
    }
}
