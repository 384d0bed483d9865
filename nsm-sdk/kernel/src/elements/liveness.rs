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

    fn connection(kind: &str, url: &str, src: &[&str], dst: &[&str]) -> Connection {
        let texts = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
        let ip = IpContext { src_ip_addrs: texts(src), dst_ip_addrs: texts(dst), ..Default::default() };
        let mechanism = super::super::preference("LOCAL", kind, &[("inodeURL", url.to_owned())]);
        Connection {
            mechanism: Some(mechanism),
            context: Some(ConnectionContext { ip_context: Some(ip), ..Default::default() }),
            ..Default::default()
        }
    }

    // Conformance 102
    #[tokio::test]
    async fn alive_is_what_answers_for_every_pair() {
        use std::os::fd::AsRawFd;
        let (a, b) = crate::testing::joined_nodes("10.7.0.1".parse().unwrap(), "10.7.0.2".parse().unwrap()).await;
        let url = format!("file:///proc/self/fd/{}", a.fd().as_raw_fd());
        let second = Duration::from_secs(1);
        let alive = async |connection: Connection, time| KernelLiveness.alive(&connection, time).await;
        assert!(alive(connection("KERNEL", &url, &["10.7.0.1/24"], &["10.7.0.2/24"]), 5 * second).await);
        // One of two pairs does not answer.
        let half = connection("KERNEL", &url, &["10.7.0.1/24"], &["10.7.0.2/24", "10.7.0.3/24"]);
        assert!(!alive(half, second).await);
        // Nothing to ask, or nothing that could be asked: alive.
        for (kind, src, dst) in [
            ("KERNEL", &[][..], &["10.7.0.3"][..]),
            ("KERNEL", &["10.7.0.1"], &[]),
            ("KERNEL", &["10.7.0.1/24"], &["fd00::1/64"]),
            ("MEMIF", &["10.7.0.1/24"], &["10.7.0.3/24"]),
        ] {
            assert!(alive(connection(kind, &url, src, dst), second).await, "{kind} {src:?} {dst:?}");
        }
        // A namespace that is gone takes its data path along.
        let gone = connection("KERNEL", "file:///proc/self/fd/1000000", &["10.7.0.1/24"], &["10.7.0.2/24"]);
        assert!(!alive(gone, second).await);
        drop(b);
    }
}
