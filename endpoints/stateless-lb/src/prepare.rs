//! What forwarding needs of the kernel besides the engine: settings, and the rule for ICMP errors.

use std::time::Duration;

use meridio_common::{Backoff, Health, sysctl};
use nsm_kernel::Netns;
use tokio_util::sync::CancellationToken;

use crate::routing;
use crate::settings::Settings;

/// Sets what can be set. What cannot be written (a read-only `/proc/sys`) has to be right already.
///
/// The faults, one line each.
pub(crate) async fn prepare(settings: &Settings, netns: &Netns) -> Vec<String> {
    let wanted = [
        ("net/ipv4/conf/all/rp_filter", "0"),
        ("net/ipv4/conf/default/rp_filter", "0"),
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/fwmark_reflect", "1"),
        ("net/ipv6/fwmark_reflect", "1"),
    ];
    let mut faults = Vec::new();
    for (key, value) in wanted {
        if sysctl::set(key, value).is_err()
            && let Err(fault) = sysctl::check(key, value)
        {
            faults.push(fault.to_string());
        }
    }
    // An interface's own value counts as well; one that does not exist yet inherits the default.
    let own = format!("net/ipv4/conf/{}/rp_filter", settings.external_interface);
    if sysctl::read(&own).is_ok()
        && sysctl::set(&own, "0").is_err()
        && let Err(fault) = sysctl::check(&own, "0")
    {
        faults.push(fault.to_string());
    }
    // A link that goes down for a moment keeps its IPv6 addresses, as it does those of IPv4. Nice to have.
    let _ = sysctl::set("net/ipv6/conf/all/keep_addr_on_down", "1");
    let rules = async {
        let netlink = netns.netlink().await.map_err(|e| e.to_string())?;
        routing::errors_to_gateways(netlink, settings.gateway_table).await
    };
    faults.extend(rules.await.err());
    faults
}

/// Says what is wrong, and tries again until nothing is.
pub(crate) async fn until_prepared<Preparing>(
    health: Health,
    stop: CancellationToken,
    mut faults: Vec<String>,
    mut prepare: impl FnMut() -> Preparing,
) where
    Preparing: Future<Output = Vec<String>>,
{
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    let mut said = Vec::new();
    while !faults.is_empty() {
        if faults != said {
            tracing::error!(faults = faults.join("; "), "kernel settings");
            health.waiting("Sysctl", &faults.join("; "), "set it in an init container");
            said = faults;
        }
        if stop.run_until_cancelled(backoff.wait()).await.is_none() {
            return;
        }
        faults = prepare().await;
    }
    health.serving("Sysctl");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_fails_at_first_is_tried_again() {
        let health = Health::detached("test");
        let mut later = vec![vec![], vec!["no buffer".to_owned()]];
        let prepare = || std::future::ready(later.pop().unwrap_or_default());
        let seen = health.clone();
        let preparing = until_prepared(health, CancellationToken::new(), vec!["no rule".into()], prepare);
        let watching = async {
            let state = || seen.report().subservices.get("Sysctl").map(|s| (s.serving, s.waits_for.clone()));
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert_eq!(state(), Some((false, "no rule".to_owned())));
            tokio::time::sleep(Duration::from_millis(1_500)).await;
            assert_eq!(state(), Some((false, "no buffer".to_owned())));
        };
        tokio::join!(preparing, watching);
        assert!(seen.report().subservices["Sysctl"].serving);
        assert!(later.is_empty());
    }
}
