//! Whether the data path of a connection works, asked by ICMP echo from inside the client's namespace.

use std::net::IpAddr;
use std::time::Duration;

use nsm_chain::Connection;
use nsm_chain::elements::heal::Liveness;

use super::{configurable, netns_of};
use crate::ping::pairs_alive;

/// NSM's liveness check: every pair of source and destination address of one family has to answer. Connections without
/// addresses, or with another mechanism than KERNEL, count as alive: nothing says otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelLiveness;

fn addresses(list: &[String]) -> Vec<IpAddr> {
    let parse = |s: &String| s.split('/').next().and_then(|ip| ip.parse().ok());
    list.iter().filter_map(parse).collect()
}

/// All pairs of one family.
fn pairs(connection: &Connection) -> Vec<(IpAddr, IpAddr)> {
    let ip = connection.context.as_ref().and_then(|c| c.ip_context.as_ref());
    let Some(ip) = ip else { return Vec::new() };
    let (sources, destinations) = (addresses(&ip.src_ip_addrs), addresses(&ip.dst_ip_addrs));
    let of =
        |s: &IpAddr| destinations.iter().filter(|d| d.is_ipv6() == s.is_ipv6()).map(|d| (*s, *d)).collect::<Vec<_>>();
    sources.iter().flat_map(of).collect()
}

#[async_trait::async_trait]
impl Liveness for KernelLiveness {
    async fn alive(&self, connection: &Connection, timeout: Duration) -> bool {
        let Some(mechanism) = configurable(connection.mechanism.as_ref()) else { return true };
        let pairs = pairs(connection);
        if pairs.is_empty() {
            return true;
        }
        match netns_of(mechanism) {
            Ok(netns) => pairs_alive(&netns, &pairs, timeout).await,
            // A namespace that cannot be opened is gone, and the data path with it.
            Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_chain::{ConnectionContext, IpContext};

    #[test]
    fn mixed_families_are_skipped() {
        let ip = IpContext {
            src_ip_addrs: vec!["10.0.0.1/24".into(), "fd00::1/64".into(), "bad".into()],
            dst_ip_addrs: vec!["10.0.0.2".into()],
            ..Default::default()
        };
        let context = ConnectionContext { ip_context: Some(ip), ..Default::default() };
        let connection = Connection { context: Some(context), ..Default::default() };
        assert_eq!(pairs(&connection), [("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap())]);
    }
}
