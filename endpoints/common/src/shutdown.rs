//! Signals that end a process.

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::Error;

/// A token that is cancelled by SIGTERM, SIGINT, SIGHUP or SIGQUIT. A second signal ends the process at once with
/// status 130, for an operator who does not want to wait.
///
/// # Errors
/// When the signal handlers cannot be installed.
pub fn token() -> Result<CancellationToken, Error> {
    let install = |kind| signal(kind).map_err(|e| Error::io("signal handler", e));
    let mut terminate = install(SignalKind::terminate())?;
    let mut interrupt = install(SignalKind::interrupt())?;
    let mut hangup = install(SignalKind::hangup())?;
    let mut quit = install(SignalKind::quit())?;
    let stop = CancellationToken::new();
    let cancel = stop.clone();
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
                _ = hangup.recv() => "SIGHUP",
                _ = quit.recv() => "SIGQUIT",
            };
            if cancel.is_cancelled() {
                std::process::exit(130);
            }
            tracing::info!(signal = name, "stopping");
            cancel.cancel();
        }
    });
    Ok(stop)
}
