//! Figures of the NSM SDK on one machine: client -> manager -> forwarder -> endpoint, over real sockets with mutual TLS.
//!
//! `tools/bench nsm [PART...] [--quick] [--ours]` as root; parts are `rate`, `live` and `leaks`, all by default. `--ours` leaves the other
//! manager out.
//! The manager and registry of NSM's own Go SDK are measured in the same run, with our forwarder, endpoint and client around them, where
//! `tools/peers` has built them; `NSM_MANAGER` names another program that is a manager by its argument `manager` and a registry by
//! `registry`. They are started with NSM's settings: `NSM_NAME`, `NSM_LISTEN_ON`, `NSM_REGISTRY_URL`, `SPIFFE_ENDPOINT_SOCKET`. A table is
//! printed, and written as JSON to `target/bench/nsm.json`.
//!
//! Each step has a bound: one that a manager does not finish in time is broken off, said so, and its figures are those of what was done.

#[path = "nsm/figures.rs"]
mod figures;

use anyhow::{Context as _, Result, bail};
use figures::{Latency, aims, mib, ms};
use meridio_tests::{
    leaks,
    mesh::{self, Carrier, Nse, Process, TIMEOUT, World},
    peers::{GoSdk, listening},
};
use nsm_chain::{Client, Connection};
use serde_json::{Value, json};
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Requests under way at the same time.
const WORKERS: usize = 8;
/// Requests before anything is measured.
const WARM_UP: usize = 20;
/// How often one request is repeated.
const ATTEMPTS: usize = 10;
/// Life of tokens while refreshing is measured: the shortest that NSM's users set.
const SHORT_LIFE: Duration = Duration::from_secs(60);
const LONG_LIFE: Duration = Duration::from_secs(600);
/// What the descriptors of closed connections may take to go.
const LEFT: Duration = Duration::from_secs(15);

/// How much is measured.
struct Size {
    sequential: usize,
    rate: Duration,
    live: usize,
    refreshing: Duration,
    /// What establishing all connections may take, and then each of the other steps.
    patience: (Duration, Duration),
    cycles: leaks::Cycles,
}

const FULL: Size = Size {
    sequential: 300,
    rate: Duration::from_secs(5),
    live: 1000,
    refreshing: Duration::from_secs(45),
    patience: (Duration::from_secs(90), Duration::from_secs(25)),
    cycles: leaks::Cycles { nothing: 10_000, veth: 500 },
};
const QUICK: Size = Size {
    sequential: 50,
    rate: Duration::from_secs(1),
    live: 100,
    refreshing: Duration::from_secs(20),
    patience: (Duration::from_secs(30), Duration::from_secs(10)),
    cycles: leaks::Cycles { nothing: 500, veth: 50 },
};

/// Another manager and registry: what `NSM_MANAGER` names, or else the ones among the live peers.
fn other_program() -> Option<PathBuf> {
    if let Some(program) = std::env::var_os("NSM_MANAGER") {
        return Some(program.into());
    }
    let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/peers/bin");
    Some(peers.join(GoSdk::Current.program())).filter(|program| program.is_file())
}

/// Starts one of its roles.
fn start_other(world: &World, program: &Path, role: &str, listen_on: &str, registry: &str) -> Result<Process> {
    let mut command = world.command(program);
    command
        .arg(role)
        .env("NSM_NAME", role)
        .env("NSM_LISTEN_ON", listen_on)
        .env("NSM_REGISTRY_URL", registry)
        .env("NSM_MAX_TOKEN_LIFETIME", format!("{}s", LONG_LIFE.as_secs()))
        .env("NSM_LOG_LEVEL", "")
        .env("SPIFFE_ENDPOINT_SOCKET", world.workload(role)?)
        // Its SDK logs, at levels that cannot all be turned off, what it does about searches that ended.
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null());
    Ok(Process(command.spawn().with_context(|| program.display().to_string())?))
}

/// Manager, forwarder, endpoint and client.
struct Path4 {
    world: World,
    manager: String,
    /// The process that is the manager.
    pid: u32,
    nse: Nse,
    client: Client,
    _processes: Vec<Process>,
}

impl Path4 {
    /// Ours in the middle, one process for manager and forwarder; or another manager with our forwarder beside it.
    async fn start(other: Option<&Path>) -> Result<Self> {
        let world = World::start().await?;
        let mut processes = Vec::new();
        let manager = world.url("manager");
        match other {
            None => processes.push(world.node("manager", None)?),
            Some(program) => {
                let registry = world.url("registry");
                let listen_on = format!("{manager},tcp://127.0.0.1:5001");
                // In order: what is registered with NSM's manager while it has no registry is not reached later.
                let keeper = start_other(&world, program, "registry", &registry, "")?;
                listening(&world.path("registry")).await?;
                processes.push(start_other(&world, program, "manager", &listen_on, &registry)?);
                listening(&world.path("manager")).await?;
                processes.push(keeper);
                processes.push(world.node("forwarder", Some(&manager))?);
            }
        }
        let nse = world.endpoint("nse", &manager).await?;
        let client = world.client("nsc", &manager, LONG_LIFE).await?;
        world.ready(&client).await?;
        let pid = processes.first().map_or(0, |process| process.0.id());
        Ok(Self { world, manager, pid, nse, client, _processes: processes })
    }

    async fn one(&self, client: &Client, id: &str, carrier: Carrier) -> Result<(Connection, Duration)> {
        let begin = Instant::now();
        let connection = client.request(self.world.request(id, carrier), TIMEOUT).await?;
        Ok((connection, begin.elapsed()))
    }

    /// Establishes a connection; a request that fails is repeated, as NSM's clients do. Returns how many failed.
    async fn persist(&self, client: &Client, id: &str, carrier: Carrier) -> Result<(Connection, usize)> {
        let mut failed = 0;
        loop {
            match self.one(client, id, carrier).await {
                Ok((connection, _)) => return Ok((connection, failed)),
                Err(error) if failed == ATTEMPTS => return Err(error),
                Err(_) => failed += 1,
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Establishes `count` connections, several at a time, for no longer than `bound`. Returns how many requests failed.
    async fn establish(&self, client: &Client, count: usize, bound: Duration) -> Result<(Vec<Connection>, usize)> {
        let end = tokio::time::Instant::now() + bound;
        let workers = (0..WORKERS).map(|worker| async move {
            let (mut connections, mut failed) = (Vec::new(), 0);
            for number in (worker..count).step_by(WORKERS) {
                let id = format!("live-{number}");
                let Ok(made) = tokio::time::timeout_at(end, self.persist(client, &id, Carrier::Veth)).await else {
                    break;
                };
                let (connection, failures) = made?;
                connections.push(connection);
                failed += failures;
            }
            anyhow::Ok((connections, failed))
        });
        let made = futures_util::future::try_join_all(workers).await?;
        let failed = made.iter().map(|(_, failed)| failed).sum();
        Ok((made.into_iter().flat_map(|(connections, _)| connections).collect(), failed))
    }

    /// Another client of the same name goes on with them, several at a time, for no longer than `bound`. Returns how many it has.
    async fn take_over(&self, client: &Client, connections: &[Connection], bound: Duration) -> usize {
        let (begin, mut done) = (Instant::now(), 0);
        for some in connections.chunks(WORKERS) {
            if begin.elapsed() >= bound {
                break;
            }
            let request = |one: &Connection| {
                let connection = Some(one.clone());
                nsm_chain::NetworkServiceRequest { connection, ..self.world.request(&one.id, Carrier::Veth) }
            };
            let requests = some.iter().map(|one| client.request(request(one), TIMEOUT));
            let results = futures_util::future::join_all(requests).await;
            done += results.iter().filter(|result| result.is_ok()).count();
        }
        done
    }

    /// Closes them, several at a time, for no longer than `bound`. Returns how many are closed, and how many could not be.
    async fn close(&self, client: &Client, connections: &[Connection], bound: Duration) -> (usize, usize) {
        let (begin, mut done) = (Instant::now(), (0, 0));
        for some in connections.chunks(WORKERS) {
            if begin.elapsed() >= bound {
                break;
            }
            let closes = some.iter().map(|one| client.close(one.clone(), TIMEOUT));
            for result in futures_util::future::join_all(closes).await {
                match result {
                    Ok(()) => done.0 += 1,
                    Err(_) => done.1 += 1,
                }
            }
        }
        done
    }

    /// Request and close, one at a time, `times` times but for no longer than `bound`; and how many failed, whose time counts too.
    async fn sequential(&self, carrier: Carrier, times: usize, bound: Duration) -> (Latency, usize) {
        let (start, mut took, mut failed) = (Instant::now(), Vec::with_capacity(times), 0);
        while took.len() < times && (took.is_empty() || start.elapsed() < bound) {
            let begin = Instant::now();
            let made = self.one(&self.client, &format!("seq-{}", took.len()), carrier).await;
            took.push(begin.elapsed());
            let done = match made {
                Ok((connection, _)) => self.client.close(connection, TIMEOUT).await.is_ok(),
                Err(_) => false,
            };
            failed += usize::from(!done);
        }
        if took.len() < times {
            println!("  bounded: {} of {times} requests within {bound:?}", took.len());
        }
        (Latency::of(took), failed)
    }

    /// New connections a second, each closed again, with several under way; and how many requests failed.
    async fn new_rate(&self, carrier: Carrier, duration: Duration) -> Result<(f64, usize)> {
        let begin = Instant::now();
        let workers = (0..WORKERS).map(|worker| async move {
            let (mut count, mut failed) = (0, 0);
            while begin.elapsed() < duration {
                let id = format!("rate-{worker}-{count}");
                let (connection, failures) = self.persist(&self.client, &id, carrier).await?;
                self.client.close(connection, TIMEOUT).await?;
                count += 1;
                failed += failures;
            }
            anyhow::Ok((count, failed))
        });
        let counts = futures_util::future::try_join_all(workers).await?;
        let (count, failed) = counts.into_iter().fold((0u32, 0), |(a, b), (count, failed)| (a + count, b + failed));
        Ok((f64::from(count) / begin.elapsed().as_secs_f64(), failed))
    }

    /// Requests a second for connections that exist: what a refresh is.
    async fn refresh_rate(&self, carrier: Carrier, duration: Duration) -> Result<f64> {
        let mut connections = Vec::new();
        for worker in 0..WORKERS {
            connections.push(self.persist(&self.client, &format!("refresh-{worker}"), carrier).await?.0);
        }
        let begin = Instant::now();
        let workers = connections.iter().map(|connection| async move {
            let mut count = 0;
            while begin.elapsed() < duration {
                let request = nsm_chain::NetworkServiceRequest {
                    connection: Some(connection.clone()),
                    ..self.world.request(&connection.id, carrier)
                };
                self.client.request(request, TIMEOUT).await?;
                count += 1;
            }
            anyhow::Ok(count)
        });
        let counts = futures_util::future::try_join_all(workers).await?;
        let rate = f64::from(counts.iter().sum::<u32>()) / begin.elapsed().as_secs_f64();
        for connection in connections {
            self.client.close(connection, TIMEOUT).await?;
        }
        Ok(rate)
    }
}

async fn rate(other: Option<&Path>, size: &Size) -> Result<Value> {
    let path = Path4::start(other).await?;
    let mut result = json!({});
    for (name, carrier) in [("nothing", Carrier::Nothing), ("veth", Carrier::Veth)] {
        path.sequential(carrier, WARM_UP, size.patience.1).await;
        let (latency, lost) = path.sequential(carrier, size.sequential, size.patience.1).await;
        let (new, failed) = path.new_rate(carrier, size.rate).await?;
        let failed = failed + lost;
        let refresh = path.refresh_rate(carrier, size.rate).await?;
        println!(
            "  {name:<8} new, one at a time: p50 {:>7.2} ms, p99 {:>7.2} ms; {WORKERS} at a time: {new:>7.1}/s with close, {failed} requests failed; refresh {refresh:>8.1}/s",
            ms(latency.p50),
            ms(latency.p99),
        );
        result[name] =
            json!({ "latency": latency.json(), "new_per_s": new, "failed_requests": failed, "refresh_per_s": refresh });
    }
    let usage = mesh::usage(path.pid)?;
    println!("  manager: {:.1} MiB resident, {:.1} MiB of it its own", mib(usage.resident), mib(usage.anonymous));
    result["manager_resident_mib"] = json!(mib(usage.resident));
    Ok(result)
}

/// Many connections at once: time, memory, latency of one more, cost of refreshing, and what is left when they are closed.
async fn live(other: Option<&Path>, size: &Size) -> Result<Value> {
    let path = Path4::start(other).await?;
    let (many, each_step) = size.patience;
    path.sequential(Carrier::Veth, WARM_UP, each_step).await;
    let before = mesh::usage(path.pid)?;
    let client = path.world.client("nsc-live", &path.manager, LONG_LIFE).await?;
    let begin = Instant::now();
    let (connections, failed) = path.establish(&client, size.live, many).await?;
    let (establish, count) = (begin.elapsed(), connections.len());
    let standing = mesh::usage(path.pid)?;
    let each = |after: u64, before: u64| after.saturating_sub(before) as f64 / count.max(1) as f64;
    let kib = each(standing.resident, before.resident) / 1024.0;
    if count < size.live {
        println!("  bounded: {count} of {} connections within {many:?}", size.live);
    }
    println!(
        "  {count} connections in {:.1} s, after {failed} requests that failed; manager {:.1} MiB resident before, {:.1} MiB then: {kib:.1} KiB and {:.1} descriptors each",
        establish.as_secs_f64(),
        mib(before.resident),
        mib(standing.resident),
        each(standing.descriptors as u64, before.descriptors as u64),
    );
    let one_more = async |while_what: &str| {
        let (latency, lost) = path.sequential(Carrier::Veth, size.sequential, each_step).await;
        println!(
            "  one more{while_what}, one at a time: p50 {:.2} ms, p99 {:.2} ms, longest {:.2} ms, {lost} failed",
            ms(latency.p50),
            ms(latency.p99),
            ms(latency.longest)
        );
        (latency, lost)
    };
    let (latency, lost) = one_more("").await;
    drop(client);
    let client = path.world.client("nsc-live", &path.manager, SHORT_LIFE).await?;
    let begin = Instant::now();
    let taken = path.take_over(&client, &connections, each_step).await;
    println!("  {taken} of them go on with tokens of {SHORT_LIFE:?}, by another client of the same name");
    // The first of them are refreshed after a fifth of their tokens' life.
    tokio::time::sleep((SHORT_LIFE / 4).saturating_sub(begin.elapsed())).await;
    let (asked, begin) = (path.nse.requests(), Instant::now());
    let (busy_latency, busy_lost) = one_more(" meanwhile").await;
    let others = (path.nse.requests() - asked).saturating_sub(size.sequential);
    println!("  and {:.1} refreshes a second at that time", others as f64 / begin.elapsed().as_secs_f64());
    let refresh = refreshing(&path, size.refreshing).await?;
    let settled = mesh::usage(path.pid)?;
    println!("  manager {:.1} MiB resident after that", mib(settled.resident));
    let begin = Instant::now();
    let (closed, not_closed) = path.close(&client, &connections, each_step).await;
    let closing = begin.elapsed();
    drop(client);
    let mut after = mesh::usage(path.pid)?;
    while after.descriptors > before.descriptors && begin.elapsed() < closing + LEFT {
        tokio::time::sleep(Duration::from_millis(100)).await;
        after = mesh::usage(path.pid)?;
    }
    if closed + not_closed < count {
        println!("  bounded: {closed} of {count} connections closed within {each_step:?}");
    }
    println!(
        "  {closed} closed in {:.1} s, {not_closed} failed; descriptors {} before, {} then, {} after; {:.1} MiB resident",
        closing.as_secs_f64(),
        before.descriptors,
        standing.descriptors,
        after.descriptors,
        mib(after.resident)
    );
    let memory = |of: fn(&mesh::Usage) -> u64| json!({ "before": mib(of(&before)), "live": mib(of(&standing)), "refreshed": mib(of(&settled)), "after": mib(of(&after)) });
    Ok(json!({
        "connections": count,
        "failed_requests": failed + lost + busy_lost + (count - taken),
        "establish_s": establish.as_secs_f64(),
        "closed": closed,
        "close_s": closing.as_secs_f64(),
        "resident_mib": memory(|usage| usage.resident),
        "anonymous_mib": memory(|usage| usage.anonymous),
        "kib_per_connection": kib,
        "descriptors": { "before": before.descriptors, "live": standing.descriptors, "after": after.descriptors },
        "request_latency": latency.json(),
        "taken_over": taken,
        "request_latency_while_refreshing": busy_latency.json(),
        "refresh": refresh,
    }))
}

/// What refreshing all connections costs the manager, for some time.
async fn refreshing(path: &Path4, time: Duration) -> Result<Value> {
    let (cpu, count, begin) = (mesh::usage(path.pid)?.cpu, path.nse.requests(), Instant::now());
    tokio::time::sleep(time).await;
    let seconds = begin.elapsed().as_secs_f64();
    let refreshes = (path.nse.requests() - count) as f64;
    let busy = (mesh::usage(path.pid)?.cpu - cpu).as_secs_f64();
    let each = (refreshes > 0.0).then(|| busy / refreshes * 1000.0);
    println!(
        "  refreshing them at tokens of {SHORT_LIFE:?}: {:.1}/s, {:.1} % of one core in the manager, {} each",
        refreshes / seconds,
        busy / seconds * 100.0,
        each.map_or("no refresh to share it, nothing".into(), |each| format!("{each:.2} ms")),
    );
    Ok(json!({ "per_s": refreshes / seconds, "core_share": busy / seconds, "cpu_ms_each": each }))
}

fn leak(size: &Size) -> Result<Value> {
    let report = leaks::run(size.cycles)?;
    println!(
        "  {} cycles without and {} with kernel work in {:.1} s: descriptors {} -> {}, tasks {} -> {}, interfaces {} -> {}",
        size.cycles.nothing,
        size.cycles.veth,
        report.took.as_secs_f64(),
        report.before.descriptors,
        report.after.descriptors,
        report.before.tasks,
        report.after.tasks,
        report.before.interfaces,
        report.after.interfaces,
    );
    Ok(json!({
        "cycles": { "nothing": size.cycles.nothing, "veth": size.cycles.veth },
        "seconds": report.took.as_secs_f64(),
        "descriptors": [report.before.descriptors, report.after.descriptors],
        "tasks": [report.before.tasks, report.after.tasks],
        "left": report.left(),
    }))
}

fn machine() -> Value {
    let read = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    json!({
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "cpu": model.unwrap_or_default(),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "profile": if cfg!(debug_assertions) { "dev" } else { "release" },
        "version": env!("CARGO_PKG_VERSION"),
    })
}

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    if runtime.block_on(mesh::run_as_node())? {
        return Ok(());
    }
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let size = if args.iter().any(|arg| arg == "--quick") { &QUICK } else { &FULL };
    let parts: Vec<&str> = args.iter().map(String::as_str).filter(|arg| !arg.starts_with("--")).collect();
    let known = ["rate", "live", "leaks"];
    if let Some(unknown) = parts.iter().find(|part| !known.contains(part)) {
        bail!("{unknown}: no part of this bench, there are: {}", known.join(", "));
    }
    let wanted = |name: &str| parts.is_empty() || parts.contains(&name);
    let other = other_program().filter(|_| !args.iter().any(|arg| arg == "--ours"));
    let mut result = json!({ "machine": machine() });
    println!("nsm: {}", result["machine"]);
    for (name, section) in known.iter().zip(0..) {
        if !wanted(name) {
            continue;
        }
        if section == 2 {
            println!("leaks");
            result["leaks"] = leak(size)?;
            continue;
        }
        for (who, program) in [("ours", None), ("other", other.as_deref())] {
            if who == "other" && program.is_none() {
                println!(
                    "{name}, another manager: skipped (--ours), or tools/peers has not built one and NSM_MANAGER names none"
                );
                continue;
            }
            println!("{name}, manager: {}", program.map_or("ours".into(), |other| other.display().to_string()));
            result[*name][who] = match section {
                0 => runtime.block_on(rate(program, size))?,
                _ => runtime.block_on(live(program, size))?,
            };
        }
    }
    let aims = aims(&result);
    for (text, holds) in &aims {
        println!("{} {text}", if *holds { "ok     " } else { "MISSED " });
    }
    result["aims"] = aims.iter().map(|(text, holds)| json!({ "aim": text, "holds": holds })).collect();
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench/nsm.json");
    std::fs::create_dir_all(file.parent().unwrap_or(Path::new(".")))?;
    std::fs::write(&file, serde_json::to_string_pretty(&result)?).with_context(|| file.display().to_string())?;
    Ok(())
}
