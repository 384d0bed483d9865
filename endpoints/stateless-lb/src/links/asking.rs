//! Asking addresses that do not answer: sending to them makes the kernel resolve them anew, which is what counts.

use std::net::IpAddr;
use std::time::Duration;

use nsm_kernel::ping::Pinger;

/// Asks each address once and returns those that answer within `limit`. Opens one socket for each family that there is: silent
/// addresses may be many, and a round comes soon after the other.
///
/// Sockets of their own for each round: what is sent to who is silent waits in the kernel for seconds, and takes room of its socket.
pub(super) async fn answering<Opened>(
    addresses: Vec<IpAddr>,
    limit: Duration,
    open: impl Fn(bool) -> Opened,
) -> Vec<IpAddr>
where
    Opened: Future<Output = Result<Pinger, nsm_kernel::Error>>,
{
    let (v6, v4): (Vec<IpAddr>, Vec<IpAddr>) = addresses.into_iter().partition(IpAddr::is_ipv6);
    let (mut answers, more) = tokio::join!(of_family(v4, limit, || open(false)), of_family(v6, limit, || open(true)));
    answers.extend(more);
    answers
}

async fn of_family<Opened>(addresses: Vec<IpAddr>, limit: Duration, open: impl FnOnce() -> Opened) -> Vec<IpAddr>
where
    Opened: Future<Output = Result<Pinger, nsm_kernel::Error>>,
{
    if addresses.is_empty() {
        return Vec::new();
    }
    let pinger = match open().await {
        Ok(pinger) => pinger,
        Err(error) => {
            tracing::warn!(%error, "silent targets cannot be asked");
            return Vec::new();
        }
    };
    let pinger = &pinger;
    let asking = addresses.into_iter().map(|ip| async move { pinger.probe(ip, limit).await.then_some(ip) });
    futures_util::future::join_all(asking).await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use nsm_kernel::Netns;

    use super::*;

    #[tokio::test]
    async fn many_addresses_share_a_socket_for_each_family() {
        let netns = Netns::anonymous().unwrap();
        let netlink = netns.netlink().await.unwrap();
        netlink.link_up(netlink.link_by_name("lo").await.unwrap().unwrap().index).await.unwrap();
        let opened = AtomicU32::new(0);
        let open = |v6| {
            opened.fetch_add(1, Ordering::Relaxed);
            Pinger::open(&netns, v6, None)
        };
        let mut addresses: Vec<IpAddr> = (1..=200).map(|n| [127, 0, 0, n].into()).collect();
        addresses.push("::1".parse().unwrap());
        let limit = Duration::from_secs(5);
        let mut asked = addresses.clone();
        asked.push("192.0.2.1".parse().unwrap());
        assert_eq!(answering(asked, limit, open).await, addresses);
        assert_eq!(opened.load(Ordering::Relaxed), 2);
    }
}
