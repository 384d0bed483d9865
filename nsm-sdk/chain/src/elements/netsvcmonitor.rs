//! Closes connections whose network service has changed so that it does not lead to their endpoint any more.

use crate::{
    Connection, Element, Error, EventFactory, EventOptions, Key, Next, RequestCall, Side, State, Task,
    registry::{NetworkService, Registry, endpoint},
};
use futures_util::StreamExt;
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Watches the network service of each connection, in a manager. When its matches no longer allow the connection's endpoint,
/// the connection is closed, and its client looks for another endpoint.
///
/// All connections of a service share one watch. It ends with the last of them.
pub struct NetSvcMonitor {
    registry: Arc<dyn Registry>,
    services: Mutex<HashMap<String, Weak<Service>>>,
    key: Key<Option<Watched>>,
}

const NAME: &str = "netsvcmonitor";
/// Pause before a watch that has ended is opened again ...
const AGAIN: Duration = Duration::from_millis(100);
/// ... and before a registry that did not answer is asked again.
const RETRY: Duration = Duration::from_secs(1);

/// A service, and the task that keeps it up to date.
struct Service {
    latest: watch::Receiver<Option<NetworkService>>,
    _task: Task,
}

/// What the watch of one connection is about.
#[derive(Clone, PartialEq)]
struct Subject {
    service: String,
    endpoint: String,
    labels: BTreeMap<String, String>,
}

struct Watched {
    subject: Subject,
    /// Skips a close that is in the line already.
    cancel: CancellationToken,
    _service: Arc<Service>,
    _task: Task,
}

impl NetSvcMonitor {
    /// An element that asks `registry`.
    pub fn new(registry: Arc<dyn Registry>) -> Self {
        Self { registry, services: Mutex::default(), key: Key::new(Side::Server) }
    }

    fn service(&self, name: &str) -> Arc<Service> {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(service) = services.get(name).and_then(Weak::upgrade) {
            return service;
        }
        services.retain(|_, service| service.strong_count() > 0);
        let (sender, latest) = watch::channel(None);
        let task = Task::spawn(follow(self.registry.clone(), name.to_owned(), sender));
        let service = Arc::new(Service { latest, _task: task });
        services.insert(name.to_owned(), Arc::downgrade(&service));
        service
    }
}

/// Keeps the service up to date, over losses of the registry.
async fn follow(registry: Arc<dyn Registry>, name: String, latest: watch::Sender<Option<NetworkService>>) {
    loop {
        match registry.watch_ns(&name).await {
            Ok(mut changes) => {
                while let Some(service) = changes.next().await {
                    if service.name != name {
                        continue;
                    }
                    // A watch that was opened again begins with what is known.
                    latest.send_if_modified(|known| known.replace(service.clone()).as_ref() != Some(&service));
                }
                tokio::time::sleep(AGAIN).await;
            }
            Err(error) => {
                tracing::debug!(%error, service = name, "the network service cannot be watched");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Looks at each change of the service, until it excludes the endpoint.
async fn judge(
    registry: Arc<dyn Registry>,
    mut latest: watch::Receiver<Option<NetworkService>>,
    subject: Subject,
    factory: EventFactory,
    cancel: CancellationToken,
) {
    loop {
        tokio::select! {
            changed = latest.changed() => if changed.is_err() { return },
            () = factory.closed() => return,
        }
        let Some(service) = latest.borrow_and_update().clone() else { continue };
        let found = loop {
            match endpoint(&*registry, &subject.endpoint, "", None).await {
                Ok(found) => break found,
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        };
        // One that is gone is heal's business.
        let Some(found) = found else { continue };
        if registry.match_endpoints(&service, &subject.labels, std::slice::from_ref(&found)).is_empty() {
            let Subject { service, endpoint, .. } = subject;
            tracing::info!(id = factory.id(), service, endpoint, "closing: the service has changed and excludes it");
            // The close ends this task, among others: the event runs by itself.
            drop(factory.close(EventOptions::default().unless(cancel)));
            return;
        }
    }
}

#[async_trait::async_trait]
impl Element for NetSvcMonitor {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(NAME, call.id())?.clone();
        let Some(factory) = call.ctx.factory.clone() else { return next.request(call).await };
        let (name, labels) = (call.connection().network_service.clone(), call.connection().labels.clone());
        if call.connection().state() == State::ReselectRequested
            && let Some(before) = metadata.remove(&self.key).flatten()
        {
            before.cancel.cancel();
        }
        // Taken before the endpoint is chosen: no change from here on is missed.
        let service = self.service(&name);
        let latest = service.latest.clone();
        let connection = next.request(call).await?;
        let endpoint = connection.network_service_endpoint_name.clone();
        let subject = Subject { service: name, endpoint, labels };
        let known = metadata.with(&self.key, |watched| watched.as_ref().is_some_and(|known| known.subject == subject));
        if !known {
            let cancel = CancellationToken::new();
            let task = judge(self.registry.clone(), latest, subject.clone(), factory, cancel.clone());
            let watched = Watched { subject, cancel, _service: service, _task: Task::spawn(task) };
            drop(metadata.insert(&self.key, Some(watched)));
        }
        Ok(connection)
    }

    async fn close(&self, call: crate::CloseCall, next: Next) -> Result<(), Error> {
        if let Some(watched) = call.ctx.metadata(NAME, call.id())?.remove(&self.key).flatten() {
            watched.cancel.cancel();
        }
        next.close(call).await
    }
}

#[cfg(test)]
mod tests;
