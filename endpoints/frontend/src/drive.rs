//! From settings to a running loop; everything of the frontend that needs neither NSP nor load balancer.

use std::collections::BTreeSet;

use meridio_proto::nsp::v1 as nsp;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::agent::{Agent, Report, Told};
use crate::bird::process::{Bird, Paths};
use crate::bird::render::{Inputs, render, router_id_of};
use crate::bird::status::{Status, router_id};
use crate::error::Error;
use crate::gateway::{Attraction, Family};
use crate::kernel::netlink::Kernel;
use crate::settings::Settings;

/// Ends of the channels that lead to the loop and from it.
#[derive(Debug)]
pub struct Channels {
    /// The attractor as the NSP tells it; `None` until then.
    pub attractor: watch::Receiver<Option<nsp::Attractor>>,
    /// Whether the load balancer forwards; `None` until it is known.
    pub forwarding: watch::Receiver<Option<bool>>,
    /// What the loop finds.
    pub report: watch::Sender<Report>,
}

/// Finds or starts BIRD and runs the loop until `stop`.
///
/// # Errors
/// When there is no BIRD, or the kernel gives no netlink socket. Everything else is tried again for ever.
pub async fn drive(settings: &Settings, channels: Channels, stop: CancellationToken) -> Result<(), Error> {
    let paths = settings.paths();
    let version = paths.version().await?;
    tracing::info!(version, "BIRD found");
    paths.prepare()?;
    let mut tasks = JoinSet::new();
    let (kernel, news) = Kernel::open(settings.table_id, &mut tasks)?;
    let (bird, id, advertise) = find_or_start(settings, paths, &kernel).await?;
    let agent = Agent::new(settings.options(id), bird, kernel, advertise, channels.report);
    let told = Told { attractor: channels.attractor, forwarding: channels.forwarding, kernel: news };
    agent.run(told, stop).await;
    tasks.shutdown().await;
    Ok(())
}

/// BIRD, its router id, and the families whose VIPs it announces. A BIRD that runs keeps its id: another one would restart every
/// session.
async fn find_or_start(
    settings: &Settings,
    paths: Paths,
    kernel: &Kernel,
) -> Result<(Bird, std::net::Ipv4Addr, BTreeSet<Family>), Error> {
    let mut bird = Bird::new(paths);
    let fallback = match settings.named_router_id() {
        Some(id) => id,
        None => {
            let address = kernel.ipv4_of(&settings.external_interface).await.unwrap_or_default();
            address.unwrap_or_else(|| router_id_of(&settings.hostname()))
        }
    };
    if !bird.adopt().await {
        let inputs = Inputs { attraction: &Attraction::default(), passwords: &[], advertise: &BTreeSet::new() };
        match bird.start_first(&render(&settings.options(fallback).base, &inputs)).await {
            Ok(()) => {}
            Err(error @ Error::NoBird { .. }) => return Err(error),
            Err(error) => tracing::error!(%error, "BIRD does not start; trying again"),
        }
    }
    let Some(control) = bird.control() else { return Ok((bird, fallback, BTreeSet::new())) };
    let running_id = control.ask("show status").await.ok().and_then(|reply| router_id(&reply));
    let protocols = control.ask("show protocols all").await.unwrap_or_default();
    let advertise = Status::parse(&protocols, &Default::default()).advertises();
    let id = settings.named_router_id().or(running_id).unwrap_or(fallback);
    Ok((bird, id, advertise))
}
