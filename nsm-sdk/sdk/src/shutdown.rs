//! The end of a process.

use crate::Error;
use tokio::signal::unix::{SignalKind, signal};

/// Waits for SIGTERM, SIGINT, SIGHUP or SIGQUIT.
pub(crate) async fn signalled() -> Result<(), Error> {
    let install = |kind| signal(kind).map_err(Error::Signal);
    let (mut terminate, mut interrupt) = (install(SignalKind::terminate())?, install(SignalKind::interrupt())?);
    let (mut hangup, mut quit) = (install(SignalKind::hangup())?, install(SignalKind::quit())?);
    let name = tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        _ = hangup.recv() => "SIGHUP",
        _ = quit.recv() => "SIGQUIT",
    };
    tracing::info!(signal = name, "stopping");
    Ok(())
}
