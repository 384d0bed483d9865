//! Topologies in namespaces: the demo, its traffic, its events and its report.

pub mod bird;
pub mod cleanup;
pub mod cluster;
pub mod config;
pub mod demo;
pub mod events;
pub mod excerpt;
pub mod fabric;
pub mod namespace;
pub mod preflight;
pub mod process;
pub mod report;
pub mod settings;
pub mod stage;
pub mod status;
pub mod topology;
pub mod traffic;
pub mod view;

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;

pub use settings::Settings;

/// Runs the demo until it is done, or until `stop` is given.
///
/// # Errors
/// If it cannot run, one line per reason, or if a criterion does not hold.
pub async fn run(settings: Settings, stop: CancellationToken) -> anyhow::Result<()> {
    let show = tokio::task::spawn_blocking(move || demo::run(&settings, &stop));
    show.await.context("the demo died")?
}
