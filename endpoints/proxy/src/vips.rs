//! The VIPs of the trench, whose replies this proxy routes.

use std::collections::BTreeSet;
use std::time::Duration;

use ipnet::IpNet;
use meridio_common::{EmptyHold, Health, WatchEvent, Word, watch_events};
use meridio_proto::nsp::v1::configuration_manager_client::ConfigurationManagerClient;
use meridio_proto::nsp::v1::{Trench, Vip, VipResponse};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::inputs::Shared;

/// How long an empty list is doubted that is the first word of a session; the load balancer doubts it as long.
const HOLD: Duration = Duration::from_secs(60);

/// Follows the NSP until `stop`. What was last told stays in force while it is away. `kept`: an earlier run has left rules for VIPs.
pub(crate) async fn watch(
    channel: Channel,
    trench: String,
    kept: bool,
    shared: Shared,
    health: Health,
    stop: CancellationToken,
) {
    let client = ConfigurationManagerClient::new(channel);
    let pattern = Vip { trench: Some(Trench { name: trench }), ..Vip::default() };
    let open = || {
        let (mut client, pattern) = (client.clone(), pattern.clone());
        async move { client.watch_vip(pattern).await }
    };
    let mut told = Told::new(shared, kept);
    watch_events("VIPs", &stop, open, |event| {
        match event {
            WatchEvent::Message(VipResponse { vips }) => {
                health.serving("NSPCli");
                told.list(&vips);
            }
            WatchEvent::Lost(status) => {
                told.hold.lost();
                health.waiting("NSPCli", &format!("the NSP ({})", status.message()), "is it running?");
            }
        }
        std::future::ready(())
    })
    .await;
}

/// Takes what the NSP tells into the inputs, an empty list that it begins with after a while if there are VIPs to lose: without
/// their rules replies would leave by the primary network.
struct Told {
    shared: Shared,
    kept: bool,
    hold: EmptyHold,
}

impl Told {
    fn new(shared: Shared, kept: bool) -> Self {
        Self { shared, kept, hold: EmptyHold::new("VIPs", HOLD) }
    }

    fn list(&mut self, vips: &[Vip]) {
        let to_lose = self.shared.look(|inputs| inputs.vips.as_ref().map_or(self.kept, |known| !known.is_empty()));
        let nets: BTreeSet<IpNet> = vips.iter().filter_map(net).collect();
        let shared = self.shared.clone();
        let take = move |word: &Word| {
            // Asked where nobody else changes them: what has been told just now is newer.
            shared.change(|inputs| {
                if word.stands() {
                    inputs.vips = Some(nets);
                }
            });
        };
        self.hold.take(vips.is_empty(), to_lose, take, std::future::pending());
    }
}

/// The prefix of a VIP that can have a rule.
fn net(vip: &Vip) -> Option<IpNet> {
    let fault = match vip.address.parse::<IpNet>() {
        // Its rule would send everything that this pod says to the load balancers.
        Ok(net) if net.prefix_len() == 0 => "it is every address of its family",
        Ok(net) => return Some(net.trunc()),
        Err(_) => "its address is no prefix",
    };
    tracing::warn!(vip = vip.name, address = vip.address, "VIP left out: {fault}");
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{self, Nsp};

    /// A watch of `nsp`; what it has told after a while.
    fn start(nsp: &Nsp, kept: bool) -> (impl AsyncFn(Duration) -> Option<usize>, CancellationToken) {
        let (shared, stop) = (Shared::new(), CancellationToken::new());
        let health = Health::detached("test");
        tokio::spawn(watch(nsp.channel(), "t".into(), kept, shared.clone(), health, stop.clone()));
        let after = async move |time| {
            tokio::time::sleep(time).await;
            shared.look(|inputs| inputs.vips.as_ref().map(BTreeSet::len))
        };
        (after, stop)
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn an_empty_list_after_a_loss_is_believed_only_if_it_stands() {
        let nsp = Nsp::default();
        let (known, stop) = start(&nsp, false);
        nsp.tell(&["20.0.0.1/32"]);
        assert_eq!(known(SECOND).await, Some(1));
        // It comes back before it has read its configuration.
        nsp.restart();
        nsp.tell(&[]);
        assert_eq!(known(HOLD / 2).await, Some(1));
        nsp.tell(&["20.0.0.1/32", "20.0.0.2/32"]);
        assert_eq!(known(SECOND).await, Some(2));
        assert_eq!(known(2 * HOLD).await, Some(2), "what was held is overtaken");
        // It is lost again before the time is over.
        nsp.restart();
        nsp.tell(&[]);
        assert_eq!(known(HOLD / 2).await, Some(2));
        nsp.restart();
        assert_eq!(known(2 * HOLD).await, Some(2), "what was held has died with its session");
        nsp.tell(&[]);
        assert_eq!(known(HOLD / 2).await, Some(2));
        assert_eq!(known(HOLD).await, Some(0), "it stands");
        nsp.tell(&["20.0.0.1/32"]);
        assert_eq!(known(SECOND).await, Some(1));
        nsp.tell(&[]);
        assert_eq!(known(SECOND).await, Some(0), "a change, not a loss");
        stop.cancel();
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_restart_an_empty_list_is_doubted_if_there_are_rules() {
        for (kept, soon) in [(true, None), (false, Some(0))] {
            let nsp = Nsp::default();
            let (known, stop) = start(&nsp, kept);
            nsp.tell(&[]);
            assert_eq!(known(HOLD / 2).await, soon, "{kept}");
            assert_eq!(known(HOLD).await, Some(0), "{kept}");
            stop.cancel();
        }
    }

    #[test]
    fn a_vip_without_a_prefix_or_with_the_whole_of_a_family_is_left_out() {
        let of = |text: &str| net(&testing::vip(text)).map(|net| net.to_string());
        assert_eq!(of("20.0.0.1/24").as_deref(), Some("20.0.0.0/24"));
        for text in ["0.0.0.0/0", "20.0.0.1/0", "::/0", "20.0.0.1/33", ""] {
            assert_eq!(of(text), None, "{text}");
        }
    }
}
