//! gRPC health on a unix socket, and what a component waits for.
//!
//! Three probe services (`Startup`, `Readiness`, `Liveness`) are the logical AND of named subservices; service `""` serves as
//! soon as the process does. Beside the socket lies a JSON file with the same state and its reasons (`/tmp/health.sock` →
//! `/tmp/health.json`).

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::{Stream, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::health_server::{Health as HealthApi, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use crate::Error;

/// Default of the setting `HEALTH_SOCKET`.
pub const DEFAULT_SOCKET: &str = "unix:///tmp/health.sock";

/// The probe services that Kubernetes asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Probe {
    /// Has the component started?
    Startup,
    /// Can it do its work?
    Readiness,
    /// Is it worth keeping, or better restarted?
    Liveness,
}

impl fmt::Display for Probe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// State of one subservice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subservice {
    /// Whether it serves.
    pub serving: bool,
    /// Since when (RFC 3339, UTC).
    pub since: String,
    /// What is waited for; empty while serving.
    #[serde(default)]
    pub waits_for: String,
    /// What an operator can do about it; empty when nothing is known.
    #[serde(default)]
    pub to_do: String,
}

/// The structured status of a component, as written beside its health socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Component, e.g. `Meridio-nsp`.
    pub service_id: String,
    /// Process that wrote the report.
    pub pid: u32,
    /// Probe service → serving.
    pub probes: BTreeMap<String, bool>,
    /// Subservice → state.
    pub subservices: BTreeMap<String, Subservice>,
    /// Remarks that do not make the component not ready, e.g. the faults of a configuration that was refused.
    pub notes: BTreeMap<String, Vec<String>>,
}

impl Report {
    /// Whether every registered readiness subservice serves.
    pub fn ready(&self) -> bool {
        self.probes.get("Readiness").copied().unwrap_or(true)
    }

    /// One line for each thing waited for, `<name> waits for X since T: what to do`, and for each remark.
    pub fn lines(&self) -> Vec<String> {
        let waiting = self.subservices.iter().filter(|(_, state)| !state.serving).map(|(name, state)| {
            let to_do = if state.to_do.is_empty() { String::new() } else { format!(": {}", state.to_do) };
            format!("{name} waits for {} since {}{to_do}", state.waits_for, state.since)
        });
        let notes = self.notes.iter().flat_map(|(key, lines)| lines.iter().map(move |line| format!("{key}: {line}")));
        waiting.chain(notes).collect()
    }
}

#[derive(Debug)]
struct State {
    report: Report,
    members: BTreeMap<Probe, Vec<String>>,
    file: Option<PathBuf>,
}

/// The health of one component. Clones share the state.
#[derive(Clone, Debug)]
pub struct Health {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<u64>,
}

impl Health {
    /// Health without a socket: for tests, and for a port of its own ([`Health::service`]).
    pub fn detached(service_id: &str) -> Self {
        let report = Report { service_id: service_id.to_owned(), pid: std::process::id(), ..Report::default() };
        let state = State { report, members: BTreeMap::new(), file: None };
        Self { state: Arc::new(Mutex::new(state)), changed: watch::Sender::new(0) }
    }

    /// Serves health on `socket` (`unix:///tmp/health.sock`) until `stop`; a socket left over from before is replaced.
    /// An empty `socket` means none.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(service_id: &str, socket: &str, stop: &CancellationToken) -> Result<Self, Error> {
        let health = Self::detached(service_id);
        let path = socket.strip_prefix("unix://").or_else(|| socket.strip_prefix("unix:")).unwrap_or(socket);
        if path.is_empty() {
            return Ok(health);
        }
        let path = Path::new(path);
        let failed = |e| Error::io(format!("health socket {}", path.display()), e);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        {
            let mut state = health.lock();
            state.file = Some(path.with_extension("json"));
            state.write();
        }
        let server = tonic::transport::Server::builder()
            .add_service(health.service())
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.clone().cancelled_owned());
        tokio::spawn(async move {
            if let Err(error) = server.await {
                tracing::error!(%error, "health socket failed");
            }
        });
        Ok(health)
    }

    /// Registers a probe service as the AND of `subservices`; without any it serves at once. A subservice that is not yet
    /// known starts as not serving.
    pub fn register(&self, probe: Probe, subservices: &[&str]) {
        self.update(|state| {
            for name in subservices {
                state.report.subservices.entry((*name).to_owned()).or_insert_with(|| Subservice {
                    serving: false,
                    since: now(),
                    waits_for: "its start".to_owned(),
                    to_do: String::new(),
                });
            }
            state.members.insert(probe, subservices.iter().map(|name| (*name).to_owned()).collect());
        });
    }

    /// The subservice serves.
    pub fn serving(&self, subservice: &str) {
        self.put(subservice, true, "", "");
    }

    /// The subservice does not serve: it waits for `waits_for`; `to_do` tells an operator what to look at.
    pub fn waiting(&self, subservice: &str, waits_for: &str, to_do: &str) {
        self.put(subservice, false, waits_for, to_do);
    }

    /// Replaces the remarks under `key`; an empty list removes them. They do not change any probe.
    pub fn note(&self, key: &str, lines: Vec<String>) {
        self.update(|state| {
            if lines.is_empty() {
                state.report.notes.remove(key);
            } else {
                state.report.notes.insert(key.to_owned(), lines);
            }
        });
    }

    /// A copy of the whole state.
    pub fn report(&self) -> Report {
        self.lock().report.clone()
    }

    /// The gRPC health service, to be served on other ports too.
    pub fn service(&self) -> HealthServer<Api> {
        HealthServer::new(Api(self.clone()))
    }

    /// Asks the health service `service` behind `channel` every 5 s (4 s in total, `rpc_timeout` for the call) and
    /// sets `subservice` accordingly, until `stop`: the self probe of a component's own port.
    pub async fn probe_endpoint(
        &self,
        subservice: &str,
        channel: Channel,
        rpc_timeout: Duration,
        stop: CancellationToken,
    ) {
        let mut client = HealthClient::new(channel);
        let mut interval = tokio::time::interval(Duration::from_secs(5));
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = interval.tick() => {}
            }
            let check = client.check(HealthCheckRequest { service: String::new() });
            match tokio::time::timeout(rpc_timeout.min(Duration::from_secs(4)), check).await {
                Ok(Ok(answer)) if answer.get_ref().status() == ServingStatus::Serving => self.serving(subservice),
                Ok(Ok(_)) => self.waiting(subservice, "its own port to serve", "see the log"),
                Ok(Err(status)) => self.waiting(
                    subservice,
                    &format!("an answer of its own port ({})", status.message()),
                    "see the log",
                ),
                Err(_) => self.waiting(
                    subservice,
                    &format!("an answer of its own port within {rpc_timeout:?}"),
                    "see the log",
                ),
            }
        }
    }

    fn put(&self, name: &str, serving: bool, waits_for: &str, to_do: &str) {
        let known = self.lock().report.subservices.get(name).cloned();
        if known.as_ref().is_some_and(|s| s.serving == serving && s.waits_for == waits_for && s.to_do == to_do) {
            return;
        }
        if known.as_ref().is_none_or(|s| s.serving != serving) {
            tracing::info!(subservice = name, serving, waits_for, to_do, "health changed");
        }
        self.update(|state| {
            let since = known.filter(|s| s.serving == serving).map_or_else(now, |s| s.since);
            let entry = Subservice { serving, since, waits_for: waits_for.to_owned(), to_do: to_do.to_owned() };
            state.report.subservices.insert(name.to_owned(), entry);
        });
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        let before = state.report.clone();
        change(&mut state);
        state.recompute();
        if state.report != before {
            state.write();
            self.changed.send_modify(|version| *version += 1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is replaced in one step, so a panic elsewhere cannot leave it half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self, service: &str) -> Option<ServingStatus> {
        let state = self.lock();
        let serving = if service.is_empty() {
            true
        } else {
            let report = &state.report;
            *report.probes.get(service).or_else(|| report.subservices.get(service).map(|s| &s.serving))?
        };
        Some(if serving { ServingStatus::Serving } else { ServingStatus::NotServing })
    }
}

impl State {
    fn recompute(&mut self) {
        let subservices = &self.report.subservices;
        self.report.probes = self
            .members
            .iter()
            .map(|(probe, names)| {
                (probe.to_string(), names.iter().all(|n| subservices.get(n).is_some_and(|s| s.serving)))
            })
            .collect();
    }

    /// Status is a service to people, not worth failing for: an error is only logged.
    fn write(&self) {
        let Some(file) = &self.file else { return };
        let temporary = file.with_extension("json.new");
        let written = serde_json::to_vec_pretty(&self.report)
            .map_err(std::io::Error::from)
            .and_then(|text| std::fs::write(&temporary, text))
            .and_then(|()| std::fs::rename(&temporary, file));
        if let Err(error) = written {
            tracing::warn!(file = %file.display(), %error, "status file not written");
        }
    }
}

fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// The gRPC side of [`Health`].
#[derive(Clone, Debug)]
pub struct Api(Health);

#[tonic::async_trait]
impl HealthApi for Api {
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        let service = request.into_inner().service;
        let status = self
            .0
            .status(&service)
            .ok_or_else(|| Status::not_found(format!("service {service:?} is not registered")))?;
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let service = request.into_inner().service;
        let health = self.0.clone();
        let mut last = None;
        let statuses = WatchStream::new(self.0.changed.subscribe()).filter_map(move |_| {
            let status = health.status(&service).unwrap_or(ServingStatus::ServiceUnknown);
            let fresh = last.replace(status) != Some(status);
            std::future::ready(fresh.then(|| Ok(HealthCheckResponse { status: status.into() })))
        });
        Ok(Response::new(Box::pin(statuses)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(channel: &Channel, service: &str) -> Result<ServingStatus, tonic::Code> {
        let request = HealthCheckRequest { service: service.to_owned() };
        HealthClient::new(channel.clone()).check(request).await.map(|r| r.get_ref().status()).map_err(|s| s.code())
    }

    #[tokio::test]
    async fn probes_are_the_and_of_their_subservices() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("health.sock");
        std::fs::write(&socket, "left over").unwrap();
        let stop = CancellationToken::new();
        let health = Health::start("Meridio-test", &format!("unix://{}", socket.display()), &stop).unwrap();
        health.register(Probe::Startup, &[]);
        health.register(Probe::Readiness, &["NSPCli", "Egress"]);

        let channel =
            tonic::transport::Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap().connect_lazy();
        assert_eq!(ask(&channel, "").await, Ok(ServingStatus::Serving));
        assert_eq!(ask(&channel, "Startup").await, Ok(ServingStatus::Serving));
        assert_eq!(ask(&channel, "Readiness").await, Ok(ServingStatus::NotServing));
        assert_eq!(ask(&channel, "Liveness").await, Err(tonic::Code::NotFound));

        health.serving("NSPCli");
        health.waiting("Egress", "a load balancer", "check the attractor");
        assert_eq!(ask(&channel, "Readiness").await, Ok(ServingStatus::NotServing));
        health.note("configuration", vec!["vip a: no CIDR".to_owned()]);
        let report: Report = serde_json::from_slice(&std::fs::read(dir.path().join("health.json")).unwrap()).unwrap();
        assert!(!report.ready());
        let lines = report.lines();
        assert!(
            lines[0].starts_with("Egress waits for a load balancer since 2")
                && lines[0].ends_with("Z: check the attractor")
        );
        assert_eq!(lines[1], "configuration: vip a: no CIDR");

        health.serving("Egress");
        assert_eq!(ask(&channel, "Readiness").await, Ok(ServingStatus::Serving));
        stop.cancel();
    }
}
