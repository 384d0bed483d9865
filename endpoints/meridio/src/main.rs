//! The one binary: a subcommand for each component and the user's tools.

mod cli;
mod components;
#[cfg(feature = "target")]
mod target;

use std::future::Future;
use std::process::ExitCode;

use anyhow::Context as _;
use tokio_util::sync::CancellationToken;

/// Exit status of settings that cannot be used (`EX_USAGE` of sysexits).
const INVALID_SETTINGS: u8 = 64;

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(cli::Exit::Printed(status)) => return ExitCode::from(status),
        Err(cli::Exit::Faults(faults)) => return refuse(&faults),
    };
    let faults = cli.command.validate();
    if !faults.is_empty() {
        return refuse(&faults);
    }
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("meridio: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn refuse(faults: &[String]) -> ExitCode {
    for fault in faults {
        eprintln!("meridio: {fault}");
    }
    ExitCode::from(INVALID_SETTINGS)
}

fn run(cli: cli::Cli) -> anyhow::Result<()> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.worker_threads(cli.workers.into()).enable_all().build().context("cannot start threads")?;
    let outcome = runtime.block_on(async {
        if let Some(log) = cli.command.log() {
            meridio_common::logging::init(log.service_id, &log.level);
        }
        if let Err(error) = meridio_common::raise_open_files() {
            eprintln!("meridio: the limit of open files stays as it is: {error}");
        }
        let stop = meridio_common::shutdown::token().context("cannot listen to signals")?;
        watched(cli.command.run(stop.clone()), stop).await
    });
    // Whatever still hangs in a blocking call does not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    outcome
}

/// A component that ends by itself ends everything it has started.
async fn watched(component: impl Future<Output = anyhow::Result<()>>, stop: CancellationToken) -> anyhow::Result<()> {
    let outcome = component.await;
    stop.cancel();
    outcome
}
