//! Says where an endpoint runs: labels `nodeName`, `podName`, `clusterName` for each of its services.

use crate::{Call, Element, Error, Next};
use nsm_proto::registry::NetworkServiceEndpoint;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Context;
    use nsm_proto::registry::NetworkServiceLabels;
    use std::sync::Arc;

    // Conformance 120
    #[tokio::test]
    async fn each_service_gets_the_labels_it_does_not_have() {
        let own = ["nodeName", "podName"].map(|key| (key.to_owned(), "mine".to_owned())).into();
        let chain = Next::new(vec![Arc::new(ClientInfo::new(own))]);
        let theirs = [("podName".to_owned(), "theirs".to_owned())].into();
        let network_service_labels = [
            ("a".to_owned(), NetworkServiceLabels { labels: theirs }),
            ("b".to_owned(), NetworkServiceLabels::default()),
        ];
        let endpoint = NetworkServiceEndpoint {
            name: "e".into(),
            network_service_labels: network_service_labels.into(),
            ..Default::default()
        };
        let labels = chain.register(Call::new(endpoint, Context::new())).await.unwrap().network_service_labels;
        assert_eq!(
            (labels["a"].labels["nodeName"].as_str(), labels["a"].labels["podName"].as_str()),
            ("mine", "theirs")
        );
        assert_eq!((labels["b"].labels["nodeName"].as_str(), labels["b"].labels["podName"].as_str()), ("mine", "mine"));
    }
}
