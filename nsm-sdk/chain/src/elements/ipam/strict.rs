//! Only the endpoint's own addresses.

use super::ip_context;
use crate::{Connection, Element, Error, Next, RequestCall, Route};
use ipnet::IpNet;

/// Drops addresses that are not of the endpoint's prefixes, and routes to them: a client that comes from another
/// endpoint gets new ones.
#[derive(Clone, Debug)]
pub struct Strict(Vec<IpNet>);

impl Strict {
    /// Allows these prefixes.
    pub fn new(prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        Self(prefixes.into_iter().collect())
    }

    /// Removes what is foreign and returns it.
    fn drop_foreign(&self, addresses: &mut Vec<String>) -> Vec<IpNet> {
        let mut dropped = Vec::new();
        addresses.retain(|text| match text.parse::<IpNet>() {
            Ok(net) if self.0.iter().any(|own| own.contains(&net.addr())) => true,
            Ok(net) => {
                dropped.push(net.trunc());
                false
            }
            Err(_) => false,
        });
        dropped
    }
}

fn drop_routes(routes: &mut Vec<Route>, gone: &[IpNet]) {
    routes.retain(|route| route.prefix.parse::<IpNet>().is_ok_and(|prefix| !gone.contains(&prefix.trunc())));
}

#[async_trait::async_trait]
impl Element for Strict {
    fn name(&self) -> &'static str {
        "strictipam"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let context = ip_context(call.connection_mut());
        let src = self.drop_foreign(&mut context.src_ip_addrs);
        let dst = self.drop_foreign(&mut context.dst_ip_addrs);
        drop_routes(&mut context.src_routes, &dst);
        drop_routes(&mut context.dst_routes, &src);
        next.request(call).await
    }
}
