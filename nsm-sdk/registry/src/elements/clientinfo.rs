//! Says where an endpoint runs: labels `nodeName`, `podName`, `clusterName` for each of its services.

use crate::{Call, Element, Error, Next};
use meridio_proto::nsm::registry::NetworkServiceEndpoint;
use std::collections::BTreeMap;

const NAME: &str = "clientinfo";

/// The element.
#[derive(Clone, Debug, Default)]
pub struct ClientInfo {
    labels: BTreeMap<String, String>,
}

impl ClientInfo {
    /// Adds these labels where they are absent.
    pub fn new(labels: BTreeMap<String, String>) -> Self {
        Self { labels }
    }

    /// From NODE_NAME, POD_NAME and CLUSTER_NAME of the environment.
    pub fn from_env() -> Self {
        let names = [("NODE_NAME", "nodeName"), ("POD_NAME", "podName"), ("CLUSTER_NAME", "clusterName")];
        let labels = names
            .into_iter()
            .filter_map(|(variable, label)| Some((label.to_owned(), std::env::var(variable).ok()?)))
            .filter(|(_, value)| !value.is_empty())
            .collect();
        Self { labels }
    }
}

#[async_trait::async_trait]
impl Element<NetworkServiceEndpoint> for ClientInfo {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(
        &self,
        mut call: Call<NetworkServiceEndpoint>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<NetworkServiceEndpoint, Error> {
        for own in call.message.network_service_labels.values_mut() {
            for (key, value) in &self.labels {
                own.labels.entry(key.clone()).or_insert_with(|| value.clone());
            }
        }
        next.register(call).await
    }
}
