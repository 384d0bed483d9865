//! The manager's bypass: the world sees local endpoints under the manager's URL, the manager under their own.

use crate::{Call, Element, Error, Events, Next, Query, chain::Table, elements::expire::Forget};
use futures_util::StreamExt;
use nsm_identity::clock;
use nsm_proto::registry::NetworkServiceEndpoint;
use std::{sync::Arc, time::SystemTime};

const NAME: &str = "localbypass";

/// The element.
pub struct LocalBypass {
    manager_url: String,
    urls: Arc<Table<Local>>,
}

/// Where a local endpoint is.
#[derive(Clone)]
struct Local {
    url: String,
    /// Known from a former run of this manager: the SPIFFE id that had registered it, and until when.
    former: Option<(String, SystemTime)>,
}

impl Local {
    /// Whether it is the endpoint that the registry above has under this name.
    fn is(&self, published: &NetworkServiceEndpoint) -> bool {
        self.former
            .as_ref()
            .is_none_or(|(owner, until)| published.path_ids.first() == Some(owner) && clock::now() < *until)
    }
}

impl LocalBypass {
    /// `manager_url` is where other nodes reach this one's manager.
    pub fn new(manager_url: impl Into<String>) -> Self {
        Self { manager_url: manager_url.into(), urls: Arc::default() }
    }

    /// Takes an endpoint for local that a former run of this manager has registered for `owner`; until `until`, or until it is
    /// registered again.
    pub(crate) fn adopt(&self, name: &str, url: String, owner: String, until: SystemTime) {
        self.urls.insert(name, Local { url, former: Some((owner, until)) });
    }
}

impl Forget for LocalBypass {
    fn forget(&self, name: &str) {
        self.urls.remove(name);
    }
}

#[async_trait::async_trait]
impl Element<NetworkServiceEndpoint> for LocalBypass {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(
        &self,
        mut call: Call<NetworkServiceEndpoint>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<NetworkServiceEndpoint, Error> {
        let (name, local) = (call.message.name.clone(), call.message.url.clone());
        if !local.contains(':') {
            return Err(Error::new(NAME, name, format_args!("{local:?} is no URL of an endpoint"))
                .with_code(tonic::Code::InvalidArgument));
        }
        let here = Local { url: local.clone(), former: None };
        let before = self.urls.insert(&name, here.clone());
        call.message.url.clone_from(&self.manager_url);
        match next.register(call).await {
            Ok(mut answer) => {
                answer.url = local.clone();
                // The registry may have given it another name.
                if answer.name != name {
                    self.urls.remove(&name);
                    self.urls.insert(&answer.name, here);
                }
                Ok(answer)
            }
            Err(error) => {
                // An endpoint that was there before still is, only its refresh has failed.
                if before.is_none() {
                    self.urls.remove(&name);
                }
                Err(error)
            }
        }
    }

    async fn find(
        &self,
        mut call: Call<Query<NetworkServiceEndpoint>>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<Events<NetworkServiceEndpoint>, Error> {
        // The URL in the template is the manager's to every registry above.
        let wanted = std::mem::take(&mut call.message.template.url);
        let (urls, manager_url) = (self.urls.clone(), self.manager_url.clone());
        let events = next.find(call).await?;
        Ok(Box::pin(events.filter_map(move |event| {
            let event = event.map(|mut event| {
                let published = event.object.url.clone();
                if !wanted.is_empty() && !published.contains(&wanted) {
                    return None;
                }
                match urls.get(&event.object.name).filter(|local| local.is(&event.object)) {
                    Some(local) if published == manager_url || event.deleted => event.object.url = local.url,
                    // Registered with the manager that ran here before: unreachable until it registers again.
                    None if published == manager_url && !event.deleted => return None,
                    _ => {}
                }
                Some(event)
            });
            futures_util::future::ready(event.transpose())
        })))
    }

    async fn unregister(
        &self,
        mut call: Call<NetworkServiceEndpoint>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<(), Error> {
        // One that a former run of this manager has registered is passed on as well: nobody else would remove it.
        let local = self.urls.remove(&call.message.name);
        let name = call.message.name.clone();
        call.message.url.clone_from(&self.manager_url);
        let result = next.unregister(call).await;
        if let (Some(local), Err(_)) = (local, &result) {
            self.urls.insert(&name, local);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Context, elements::memory::Memory, store::MemoryStore};

    fn endpoint(name: &str, url: &str) -> NetworkServiceEndpoint {
        NetworkServiceEndpoint { name: name.into(), url: url.into(), ..Default::default() }
    }

    fn call(name: &str, url: &str) -> Call<NetworkServiceEndpoint> {
        Call::new(endpoint(name, url), Context::new())
    }

    // Conformance 118
    #[tokio::test]
    async fn local_urls_are_seen_here_and_the_managers_everywhere_else() {
        let memory: Arc<dyn Element<_>> = Arc::new(Memory::new(Arc::new(MemoryStore::default())));
        let registry = Next::new(vec![memory.clone()]);
        let manager = Next::new(vec![Arc::new(LocalBypass::new("tcp://m")), memory.clone()]);
        let urls = |list: Vec<NetworkServiceEndpoint>| list.into_iter().map(|e| e.url).collect::<Vec<_>>();
        let all = NetworkServiceEndpoint::default;

        let answer = manager.register(call("e", "unix:///e")).await.unwrap();
        assert_eq!(answer.url, "unix:///e");
        assert_eq!(urls(manager.list(all(), Context::new()).await.unwrap()), ["unix:///e"]);
        assert_eq!(urls(registry.list(all(), Context::new()).await.unwrap()), ["tcp://m"]);
        // The forwarders of this node are asked for by the manager's URL.
        assert_eq!(urls(manager.list(endpoint("", "tcp://m"), Context::new()).await.unwrap()), ["unix:///e"]);
        assert!(manager.list(endpoint("", "tcp://n"), Context::new()).await.unwrap().is_empty());

        // After a restart it is hidden until it registers again, under whatever URL it has then.
        let restarted = Next::new(vec![Arc::new(LocalBypass::new("tcp://m")), memory]);
        assert!(restarted.list(all(), Context::new()).await.unwrap().is_empty());
        restarted.register(call("e", "unix:///f")).await.unwrap();
        assert_eq!(urls(restarted.list(all(), Context::new()).await.unwrap()), ["unix:///f"]);
        restarted.unregister(call("e", "unix:///f")).await.unwrap();
        assert!(registry.list(all(), Context::new()).await.unwrap().is_empty());
        assert!(restarted.register(call("g", "")).await.is_err());
        // What a former manager has registered can be removed through this one.
        manager.register(call("h", "unix:///h")).await.unwrap();
        restarted.unregister(call("h", "")).await.unwrap();
        assert!(registry.list(all(), Context::new()).await.unwrap().is_empty());
    }

    // Conformance 118
    #[tokio::test]
    async fn a_watch_sees_local_urls_and_the_removal() {
        let memory: Arc<dyn Element<_>> = Arc::new(Memory::new(Arc::new(MemoryStore::default())));
        let registry = Next::new(vec![memory.clone()]);
        let manager = Next::new(vec![Arc::new(LocalBypass::new("tcp://m")), memory]);
        let query = Query::watch(NetworkServiceEndpoint::default());
        let mut watch = manager.find(Call::new(query, Context::new())).await.unwrap();
        for url in ["unix:///e", "unix:///f"] {
            manager.register(call("e", url)).await.unwrap();
            let event = watch.next().await.unwrap().unwrap();
            assert_eq!((event.object.url.as_str(), event.deleted), (url, false));
        }
        // An endpoint of another node keeps the URL of its manager; one of this node that only the world knows is hidden.
        registry.register(call("lost", "tcp://m")).await.unwrap();
        registry.register(call("far", "tcp://n")).await.unwrap();
        let event = watch.next().await.unwrap().unwrap();
        assert_eq!((event.object.name.as_str(), event.object.url.as_str()), ("far", "tcp://n"));
        manager.unregister(call("e", "")).await.unwrap();
        let event = watch.next().await.unwrap().unwrap();
        assert!(event.deleted && event.object.name == "e");
    }

    /// A registry that takes its time.
    struct Slow;

    #[async_trait::async_trait]
    impl Element<NetworkServiceEndpoint> for Slow {
        fn name(&self) -> &'static str {
            "slow"
        }
        async fn register(
            &self,
            call: Call<NetworkServiceEndpoint>,
            next: Next<NetworkServiceEndpoint>,
        ) -> Result<NetworkServiceEndpoint, Error> {
            let answer = next.register(call).await;
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            answer
        }
    }

    // Conformance 118
    #[tokio::test(start_paused = true)]
    async fn what_a_slow_registry_announces_early_has_its_local_url() {
        let memory: Arc<dyn Element<_>> = Arc::new(Memory::new(Arc::new(MemoryStore::default())));
        let manager =
            Next::new(vec![Arc::new(LocalBypass::new("tcp://m")) as Arc<dyn Element<_>>, Arc::new(Slow), memory]);
        let query = Query::watch(NetworkServiceEndpoint::default());
        let mut watch = manager.find(Call::new(query, Context::new())).await.unwrap();
        let registering = tokio::spawn(async move { manager.register(call("e", "unix:///e")).await });
        let event = watch.next().await.unwrap().unwrap();
        assert_eq!(event.object.url, "unix:///e");
        assert!(!registering.is_finished());
        registering.await.unwrap().unwrap();
    }
}
