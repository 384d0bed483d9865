//! The component: the loop, its conversations with NSP and load balancer, and its health.

use anyhow::Context as _;
use meridio_common::{Health, Probe, grpc};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::agent::Report;
use crate::drive::{Channels, drive};
use crate::load_balancer::watch_load_balancer;
use crate::nsp_client::{HEALTH_NSP, announce, watch_attractor};
use crate::settings::Settings;

/// Name of the health subservice of external connectivity.
const HEALTH_EGRESS: &str = "Egress";

/// Runs the frontend until `stop`; then withdraws VIPs, leaves the NSP's list and ends BIRD.
///
/// # Errors
/// When there is no BIRD, no netlink socket, or an address of the settings cannot be used.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    // Health and the identity's stream outlive the orderly end of the rest.
    let health = Health::start("Meridio-frontend", &settings.health_socket, &stop)?;
    health.register(Probe::Startup, &[]);
    health.register(Probe::Liveness, &[]);
    health.register(Probe::Readiness, &[HEALTH_NSP, HEALTH_EGRESS]);
    let (attractor, forwarding) = (watch::Sender::new(None), watch::Sender::new(None));
    let report = watch::Sender::new(Report::default());
    let channels =
        Channels { attractor: attractor.subscribe(), forwarding: forwarding.subscribe(), report: report.clone() };
    // Ends the rest when the loop cannot run.
    let ending = stop.child_token();
    let driving = async {
        let outcome = drive(&settings, channels, ending.clone()).await;
        ending.cancel();
        outcome.context("frontend")
    };
    let talking = async {
        let outcome = converse(&settings, attractor, forwarding, report.subscribe(), &health, ending.clone()).await;
        if outcome.is_err() {
            ending.cancel();
        }
        outcome
    };
    let (driven, talked, ()) = tokio::join!(driving, talking, tell_health(report.subscribe(), &health, ending.clone()));
    driven.and(talked)
}

/// Talks to NSP and load balancer as soon as there is an identity. BIRD is looked after meanwhile.
async fn converse(
    settings: &Settings,
    attractor: watch::Sender<Option<meridio_proto::nsp::v1::Attractor>>,
    forwarding: watch::Sender<Option<bool>>,
    report: watch::Receiver<Report>,
    health: &Health,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    health.waiting(HEALTH_NSP, "an identity from the Workload API", "check SPIFFE_ENDPOINT_SOCKET");
    let Some(source) = grpc::identity(&settings.spiffe_endpoint_socket, &stop).await else { return Ok(()) };
    health.waiting(HEALTH_NSP, "the NSP", "check the NSP and its address");
    let keep_alive = settings.grpc_keepalive_time.get();
    let nsp = grpc::connect_with(&source, &settings.nsp_service, keep_alive)?;
    let load_balancer = grpc::connect_with(&source, &settings.lb_socket, keep_alive)?;
    let hostname = settings.hostname();
    let connected = watch::Sender::new(None);
    let (trench, name) = (&settings.trench_name, &settings.attractor_name);
    tokio::join!(
        watch_attractor(nsp.clone(), trench, name, attractor, health.clone(), stop.clone()),
        announce(nsp, &hostname, settings.nsp_entry_timeout.get(), connected.subscribe(), stop.clone()),
        watch_load_balancer(load_balancer, &hostname, forwarding, stop.clone()),
        distil(report, connected, stop),
    );
    Ok(())
}

/// Of the loop's reports only connectivity, and only its changes.
async fn distil(mut report: watch::Receiver<Report>, connected: watch::Sender<Option<bool>>, stop: CancellationToken) {
    loop {
        let now = report.borrow_and_update().connected;
        connected.send_if_modified(|known| std::mem::replace(known, now) != now);
        let Some(Ok(())) = stop.run_until_cancelled(report.changed()).await else { return };
    }
}

async fn tell_health(mut report: watch::Receiver<Report>, health: &Health, stop: CancellationToken) {
    loop {
        let Report { connected, waits, .. } = report.borrow_and_update().clone();
        if connected == Some(true) {
            health.serving(HEALTH_EGRESS);
        } else {
            let waits_for = if waits.is_empty() { "external connectivity".to_owned() } else { waits.join("; ") };
            health.waiting(HEALTH_EGRESS, &waits_for, "check the gateways of the attractor and the external interface");
        }
        health.note("frontend", waits);
        let Some(Ok(())) = stop.run_until_cancelled(report.changed()).await else { return };
    }
}
