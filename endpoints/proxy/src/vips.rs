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
                let nets = vips.iter().filter_map(|vip| match vip.address.parse::<IpNet>() {
                    Ok(net) => Some(net.trunc()),
                    Err(_) => {
                        tracing::warn!(vip = vip.name, address = vip.address, "VIP left out: its address is no prefix");
                        None
                    }
                });
                let nets = nets.collect();
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
