//! Counts what is left after many connections were made and closed, with everybody in one process.

use crate::mesh::{Carrier, TIMEOUT, World};
use anyhow::{Context as _, Result};
use std::time::{Duration, Instant};

/// Cycles at the same time.
const WORKERS: usize = 8;
/// Background work of closed connections may take so long to end.
const SETTLE: Duration = Duration::from_secs(10);

/// How many times a connection is requested and closed.
#[derive(Clone, Copy, Debug)]
pub struct Cycles {
    /// Without kernel work.
    pub nothing: usize,
    /// With interfaces.
    pub veth: usize,
}

/// What exists at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    /// Open descriptors of the process.
    pub descriptors: usize,
    /// Tasks of the runtime that are not finished.
    pub tasks: usize,
    /// Interfaces in the namespaces of client and endpoint.
    pub interfaces: usize,
    /// Connections that the endpoint knows.
    pub connections: usize,
}

/// Before and after.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// When everything stood and a few connections had come and gone.
    pub before: Count,
    /// When the last cycle was over.
    pub after: Count,
    /// How long the cycles took.
    pub took: Duration,
}

impl Report {
    /// What there is more of than before, in words.
    pub fn left(&self) -> Vec<String> {
        let pairs = [
            ("descriptors", self.before.descriptors, self.after.descriptors),
            ("tasks", self.before.tasks, self.after.tasks),
            ("interfaces", self.before.interfaces, self.after.interfaces),
            ("connections", self.before.connections, self.after.connections),
        ];
        pairs
            .into_iter()
            .filter(|(_, before, after)| after > before)
            .map(|(what, before, after)| format!("{what}: {before} before, {after} after"))
            .collect()
    }
}

/// Runs the cycles on a runtime of its own.
///
/// # Errors
/// Something could not be started, or a request or close has failed.
pub fn run(cycles: Cycles) -> Result<Report> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let report = runtime.block_on(work(cycles));
    runtime.shutdown_timeout(Duration::from_secs(5));
    report
}

async fn work(cycles: Cycles) -> Result<Report> {
    let world = World::start().await?;
    world.node_here("node")?;
    let manager = world.url("node");
    let nse = world.endpoint("nse", &manager).await?;
    let client = world.client("nsc", &manager, Duration::from_secs(600)).await?;
    world.ready(&client).await?;
    // What is made once and kept is there from now on.
    cycle(&world, &client, Carrier::Nothing, 2 * WORKERS).await?;
    cycle(&world, &client, Carrier::Veth, 2 * WORKERS).await?;
    let count = async || -> Result<Count> {
        let mut interfaces = 0;
        for netns in world.client_ns.iter().chain([&world.endpoint_ns]) {
            interfaces += netns.netlink().await?.links().await?.len();
        }
        Ok(Count {
            descriptors: std::fs::read_dir("/proc/self/fd")?.count(),
            tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
            interfaces,
            connections: nse.connections(),
        })
    };
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (before, begin) = (count().await?, Instant::now());
    cycle(&world, &client, Carrier::Nothing, cycles.nothing).await?;
    cycle(&world, &client, Carrier::Veth, cycles.veth).await?;
    let (took, end) = (begin.elapsed(), Instant::now());
    let mut report = Report { before, after: count().await?, took };
    while !report.left().is_empty() && end.elapsed() < SETTLE {
        tokio::time::sleep(Duration::from_millis(50)).await;
        report.after = count().await?;
    }
    Ok(report)
}

async fn cycle(world: &World, client: &nsm_chain::Client, carrier: Carrier, times: usize) -> Result<()> {
    let workers = (0..WORKERS).map(|worker| async move {
        for round in 0..times.div_ceil(WORKERS) {
            let id = format!("leak-{worker}-{round}");
            let connection = client.request(world.request(&id, carrier), TIMEOUT).await.context("request")?;
            client.close(connection, TIMEOUT).await.context("close")?;
        }
        anyhow::Ok(())
    });
    futures_util::future::try_join_all(workers).await.map(drop)
}
