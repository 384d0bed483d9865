//! The main job on one machine: build, start, wait, measure, disturb, report.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio_util::sync::CancellationToken;

use crate::cluster::Blueprint;
use crate::events::{self, Director};
use crate::report::Report;
use crate::settings::Settings;
use crate::stage::Stage;
use crate::status::Observer;
use crate::topology::{Options, Trench};
use crate::traffic::continuous::Continuous;
use crate::traffic::sniffer::Sniffer;
use crate::traffic::{path, tcp, udp};
use crate::{preflight, view};

/// Patience for the trench to come up.
const START: Duration = Duration::from_secs(90);

/// 5-tuples sent through both load balancers, by VIP.
const AGREEMENT: u16 = 200;

/// Bytes of a bulk transfer.
const BULK: usize = 1_000_000;

/// Runs the demo until it is done or `stop` is given. Blocks.
///
/// # Errors
/// If it cannot run, or a criterion does not hold; each fault has been printed by then.
pub fn run(settings: &Settings, stop: &CancellationToken) -> Result<()> {
    let mut faults = settings.validate();
    faults.extend(preflight::faults(&settings.bird));
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    let logs = settings.log_dir.clone().unwrap_or_else(|| PathBuf::from(format!("/tmp/meridio-demo-{}", settings.id)));
    let outcome = Show { settings, stop, logs: logs.clone(), begin: Instant::now(), report: Report::default() }.run();
    match &outcome {
        Ok(()) if settings.log_dir.is_none() => drop(std::fs::remove_dir_all(&logs)),
        _ => println!("logs: {}", logs.display()),
    }
    outcome
}

/// One run.
struct Show<'a> {
    settings: &'a Settings,
    stop: &'a CancellationToken,
    logs: PathBuf,
    begin: Instant,
    report: Report,
}

/// A line of progress with the time since the begin.
fn say(begin: Instant, line: &str) {
    println!("[{:>7.2} s] {line}", begin.elapsed().as_secs_f64());
}

impl Show<'_> {
    fn run(mut self) -> Result<()> {
        let begin = self.begin;
        let trench = Trench::fixture('a', 0);
        let mut stage = self.build(&trench)?;
        stage.prove_sniffer()?;
        self.step("the watch over the primary network sees VIPs");
        stage.cluster.start()?;
        self.step("all components started");
        let Stage { cluster, observers, sniffer } = stage;
        let observer = observers.into_iter().next().context("no trench")?;
        let targets: BTreeSet<String> = trench.target_pods().into_iter().collect();
        let outcome = self.perform(&observer, &targets, &sniffer);
        (self.report.primary_leaks, _) = sniffer.leaks();
        if let (1.., samples) = sniffer.leaks() {
            self.report.failures.push(format!("on the primary network: {}", samples.join(", ")));
        }
        self.report.exits = cluster.unexpected();
        self.report.versions = versions(&self.settings.bird);
        let interrupted = self.stop.is_cancelled() && self.settings.once;
        if let Err(error) = outcome {
            self.report.failures.push(if interrupted { "interrupted".to_owned() } else { format!("{error:#}") });
        }
        self.report.judge(targets.len());
        if let Some(file) = &self.settings.report {
            self.report.write(file)?;
        }
        println!("{}", self.report.table());
        for failure in &self.report.failures {
            println!("FAILED: {failure}");
        }
        for line in self.report.events.iter().flat_map(|event| &event.log) {
            println!("{line}");
        }
        if self.settings.keep && self.settings.once {
            println!("kept up until Ctrl-C; look inside with: ip netns exec mdm-{}-lb-1 ip address", self.settings.id);
            while !self.stop.is_cancelled() {
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        say(begin, "cleaning up");
        drop(sniffer);
        drop(observer);
        drop(cluster);
        say(begin, "done");
        if self.report.passed { Ok(()) } else { bail!("{} criteria do not hold", self.report.failures.len()) }
    }

    fn build(&mut self, trench: &Trench) -> Result<Stage> {
        let path = std::env::var("PATH").unwrap_or_default();
        let blueprint = Blueprint {
            id: self.settings.id.clone(),
            binary: self.settings.binary.clone().map_or_else(std::env::current_exe, Ok).context("find the binary")?,
            logs: self.logs.clone(),
            trenches: vec![trench.clone()],
            options: Options {
                log_level: self.settings.log_level.clone(),
                bird: preflight::find(&self.settings.bird, &path).context("find BIRD")?,
                load_balancers: Vec::new(),
            },
        };
        let begin = self.begin;
        let stage = Stage::build(blueprint, self.stop, &mut |line| say(begin, line))?;
        self.step("namespaces, bridges and cables made");
        Ok(stage)
    }

    fn step(&mut self, what: &str) {
        say(self.begin, what);
        let elapsed = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.report.timings_ms.steps.push((what.to_owned(), elapsed));
        self.report.timings_ms.setup = elapsed;
    }

    /// From the opening of the streams to the last event.
    fn perform(&mut self, observer: &Observer, targets: &BTreeSet<String>, sniffer: &Sniffer) -> Result<()> {
        let begin = self.begin;
        for target in targets {
            observer.open(target, Duration::from_secs(30))?;
        }
        self.step("streams asked for");
        observer.wait_whole(targets, START, &mut |line| say(begin, line))?;
        self.step("both VIPs learnt by BGP, every target answers through each load balancer");
        self.measure(observer, targets.len())?;
        let traffic = observer.traffic()?;
        if !self.settings.skip_events {
            self.disturb(observer, &traffic)?;
        }
        if !self.settings.once {
            let footer = format!("{}\nCtrl-C ends and cleans up.", self.report.table());
            view::run(observer, &traffic, sniffer, &footer, self.stop);
        }
        Ok(())
    }

    /// Counted runs, bulk transfers, agreement of the load balancers.
    fn measure(&mut self, observer: &Observer, targets: usize) -> Result<()> {
        let begin = self.begin;
        for vip in observer.vips() {
            self.pause()?;
            let run = observer.generator.run(tcp::connections(vip, self.settings.tcp, 32, targets))?;
            say(begin, &format!("{} TCP connections to {vip}: {} failed", run.attempted, run.failed));
            self.report.traffic.push(run);
            let run = observer.generator.run(udp::packets(vip, self.settings.udp_ports, 5, 32, targets))?;
            say(begin, &format!("{} UDP packets to {vip}: {} failed", run.attempted, run.failed));
            self.report.traffic.push(run);
            match observer.generator.run(tcp::bulk(vip, BULK, targets))? {
                Ok(speeds) => drop(self.report.transfers_mbit.insert(vip.to_string(), speeds)),
                Err(error) => self.report.failures.push(format!("bulk transfers: {error:#}")),
            }
            let agreement = observer.generator.run(path::agreement(vip, AGREEMENT))?;
            say(
                begin,
                &format!(
                    "1 MB to and from each target by {vip}; load balancers agree on {} of {} 5-tuples",
                    agreement.same, agreement.tried
                ),
            );
            self.report.agreement.insert(vip.to_string(), agreement);
        }
        Ok(())
    }

    fn disturb(&mut self, observer: &Observer, traffic: &Continuous) -> Result<()> {
        let begin = self.begin;
        let mut tell = |line: &str| say(begin, line);
        let mut director = Director { observer, traffic, say: &mut tell, openings: Vec::new() };
        std::thread::sleep(Duration::from_secs(1));
        let wanted = |name: &String| self.settings.only_event.is_empty() || self.settings.only_event.contains(name);
        for name in events::names().into_iter().filter(wanted) {
            if self.stop.is_cancelled() {
                bail!("interrupted");
            }
            let event = director.run(&name);
            let verdict = if event.failures.is_empty() { "ok".to_owned() } else { event.failures.join("; ") };
            say(
                begin,
                &format!(
                    "{name}: lost {} of {}, back after {} ms: {verdict}",
                    event.lost, event.attempted, event.recovered_ms
                ),
            );
            self.report.events.push(event);
        }
        let mut openings = director.openings;
        self.report.timings_ms.open_to_first_packet.clone_from(&openings);
        openings.sort_unstable();
        self.report.timings_ms.open_to_first_packet_max = openings.last().copied().unwrap_or(0);
        self.report.timings_ms.open_to_first_packet_p50 =
            openings.get(openings.len().saturating_sub(1) / 2).copied().unwrap_or(0);
        Ok(())
    }

    fn pause(&self) -> Result<()> {
        if self.stop.is_cancelled() { bail!("interrupted") } else { Ok(()) }
    }
}

/// Versions of what takes part.
fn versions(bird: &str) -> BTreeMap<String, String> {
    let first_line = |program: &str, arg: &str| {
        let output = std::process::Command::new(program).arg(arg).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        text.lines().next().map(str::to_owned)
    };
    let path = std::env::var("PATH").unwrap_or_default();
    let bird = preflight::find(bird, &path).map_or_else(|| bird.to_owned(), |path| path.display().to_string());
    let kernel =
        nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    BTreeMap::from([
        ("meridio".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
        ("kernel".to_owned(), kernel),
        ("bird".to_owned(), first_line(&bird, "--version").unwrap_or_default()),
        ("iproute2".to_owned(), first_line("ip", "-V").unwrap_or_default()),
    ])
}
