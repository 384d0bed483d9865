//! What scenarios start from: a stage of the demo with every component running.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use meridio_demo::cluster::{Blueprint, Pod};
use meridio_demo::preflight;
use meridio_demo::stage::Stage;
use meridio_demo::topology::{Options, Trench};
use tokio_util::sync::CancellationToken;

/// Scenarios use the same cores, so that figures mean something they take turns.
static TURN: Mutex<()> = Mutex::new(());

/// Waits for the turn of a scenario.
pub fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The `meridio` binary beside the test's directory.
///
/// # Errors
/// If it has not been built.
pub fn binary() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find the test's own file")?;
    let directory = own.parent().and_then(std::path::Path::parent).context("find the target directory")?;
    let binary = directory.join("meridio");
    if !binary.is_file() {
        bail!("{} does not exist: run cargo build -p meridio first", binary.display());
    }
    Ok(binary)
}

/// An example program of the workspace, as `cargo test` of its crate builds it.
///
/// # Errors
/// If it has not been built.
pub fn example(name: &str) -> Result<PathBuf> {
    let file = binary()?.with_file_name("examples").join(name);
    if !file.is_file() {
        bail!("{} does not exist: run cargo build -p nsm-sdk --examples first", file.display());
    }
    Ok(file)
}

/// What a stage with these trenches is made from.
///
/// # Errors
/// If a program is missing.
pub fn blueprint(id: &str, trenches: Vec<Trench>) -> Result<Blueprint> {
    Ok(Blueprint {
        id: id.to_owned(),
        binary: binary()?,
        logs: std::env::temp_dir().join(format!("meridio-e2e-{id}")),
        trenches,
        options: Options {
            log_level: "INFO".to_owned(),
            bird: preflight::find("bird", "").context("bird is not installed")?,
            load_balancers: Vec::new(),
        },
    })
}

/// A stage on which every trench is whole.
///
/// # Errors
/// If a trench is not whole after a minute; the message says what is missing.
pub fn scene(id: &str, trenches: Vec<Trench>) -> Result<Stage> {
    of(blueprint(id, trenches)?)
}

/// The same from a blueprint.
///
/// # Errors
/// As [`scene`].
pub fn of(blueprint: Blueprint) -> Result<Stage> {
    let (begin, id) = (Instant::now(), blueprint.id.clone());
    let mut say = |line: &str| println!("[{:>6.2} s] {id}: {line}", begin.elapsed().as_secs_f64());
    let mut stage = Stage::build(blueprint, &CancellationToken::new(), &mut say)?;
    stage.prove_sniffer()?;
    let took = stage.up(Duration::from_secs(60), &mut say)?;
    say(&format!("whole after {} ms", took.as_millis()));
    Ok(stage)
}

/// Fails if a VIP was seen on the primary network or a component ended by itself.
///
/// # Errors
/// With what was seen.
pub fn check_clean(stage: &Stage) -> Result<()> {
    let (leaks, samples) = stage.sniffer.leaks();
    let exits = stage.cluster.unexpected();
    if leaks > 0 || !exits.is_empty() {
        bail!(
            "{leaks} frames with a VIP on the primary network ({}); components that ended: {}",
            samples.join(", "),
            exits.join(", ")
        );
    }
    Ok(())
}

/// Addresses of global scope of an interface of a pod, with their prefix lengths.
///
/// # Errors
/// If they cannot be listed.
pub fn addresses(pod: &Pod, interface: &str) -> Result<Vec<(IpAddr, u8)>> {
    let text = pod.namespace.output("ip", &["-o", "address", "show", "dev", interface, "scope", "global"])?;
    let net = |line: &str| {
        let (address, length) = line.split_whitespace().nth(3)?.split_once('/')?;
        Some((address.parse().ok()?, length.parse().ok()?))
    };
    Ok(text.lines().filter_map(net).collect())
}
