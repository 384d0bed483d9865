//! Live peers that share no code with this project: SPIRE server and agent, and registry, manager, endpoint and client of NSM's own Go SDK
//! in two versions. `tools/peers` builds them.

mod log;
mod mesh;
mod ours;

pub use log::Log;
pub use mesh::{Component, GoSdk, Infra, Mesh, TOKEN_LIFETIME, listening};
pub use ours::{OurClient, OurEndpoint, Pings, connections, registered};

use std::path::PathBuf;

use anyhow::{Result, bail};

const PROGRAMS: [&str; 4] = ["spire-server", "spire-agent", GoSdk::Pinned.program(), GoSdk::Current.program()];

/// The directory of the peers. `None`, after a line that says so, where they are not built and nothing requires them.
///
/// # Errors
/// If they are missing and required: `MERIDIO_PEERS=required`.
pub fn installed() -> Result<Option<PathBuf>> {
    let directory = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/peers/bin"));
    let missing: Vec<_> = PROGRAMS.iter().filter(|name| !directory.join(name).is_file()).collect();
    if missing.is_empty() {
        return Ok(Some(directory.canonicalize()?));
    }
    if std::env::var("MERIDIO_PEERS").is_ok_and(|wanted| wanted == "required") {
        bail!("{missing:?} are not in {}: run tools/peers", directory.display());
    }
    println!("skipped: the peers {missing:?} are not built (tools/peers builds them where Go is)");
    Ok(None)
}
