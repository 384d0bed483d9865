//! The VIPs of the trench, whose replies this proxy routes.

use ipnet::IpNet;
use meridio_common::{Health, WatchEvent, watch_events};
use meridio_proto::nsp::v1::configuration_manager_client::ConfigurationManagerClient;
use meridio_proto::nsp::v1::{Trench, Vip, VipResponse};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;

use crate::inputs::Shared;

/// Follows the NSP until `stop`. What was last told stays in force while it is away.
pub(crate) async fn watch(channel: Channel, trench: String, shared: Shared, health: Health, stop: CancellationToken) {
    let client = ConfigurationManagerClient::new(channel);
    let pattern = Vip { trench: Some(Trench { name: trench }), ..Vip::default() };
    let open = || {
        let (mut client, pattern) = (client.clone(), pattern.clone());
        async move { client.watch_vip(pattern).await }
    };
    watch_events("VIPs", &stop, open, |event| {
        match event {
            WatchEvent::Message(VipResponse { vips }) => {
                health.serving("NSPCli");
                let nets = vips.iter().filter_map(net).collect();
                shared.change(|inputs| inputs.vips = Some(nets));
            }
            WatchEvent::Lost(status) => {
                health.waiting("NSPCli", &format!("the NSP ({})", status.message()), "is it running?");
            }
        }
        std::future::ready(())
    })
    .await;
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

    #[test]
    fn a_vip_without_a_prefix_or_with_the_whole_of_a_family_is_left_out() {
        let of = |text: &str| net(&Vip { address: text.into(), ..Vip::default() }).map(|net| net.to_string());
        assert_eq!(of("20.0.0.1/24").as_deref(), Some("20.0.0.0/24"));
        for text in ["0.0.0.0/0", "20.0.0.1/0", "::/0", "20.0.0.1/33", ""] {
            assert_eq!(of(text), None, "{text}");
        }
    }
}
