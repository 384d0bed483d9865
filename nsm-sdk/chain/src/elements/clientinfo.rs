//! Says where a client runs.

use crate::{Connection, Element, Error, Next, RequestCall};

/// Adds the labels nodeName, podName and clusterName unless the connection has them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientInfo(Vec<(String, String)>);

impl ClientInfo {
    /// Labels from the environment: NODE_NAME, POD_NAME, CLUSTER_NAME.
    pub fn from_env() -> Self {
        Self::read(|variable| std::env::var(variable).ok())
    }

    /// As [`ClientInfo::from_env`], from variables looked up elsewhere.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let names = [("nodeName", "NODE_NAME"), ("podName", "POD_NAME"), ("clusterName", "CLUSTER_NAME")];
        let value = |variable| lookup(variable).filter(|value: &String| !value.is_empty());
        Self(names.into_iter().filter_map(|(label, variable)| Some((label.to_owned(), value(variable)?))).collect())
    }

    /// These labels.
    pub fn new(labels: impl IntoIterator<Item = (String, String)>) -> Self {
        Self(labels.into_iter().collect())
    }
}

#[async_trait::async_trait]
impl Element for ClientInfo {
    fn name(&self) -> &'static str {
        "clientinfo"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let labels = &mut call.connection_mut().labels;
        for (key, value) in &self.0 {
            labels.entry(key.clone()).or_insert_with(|| value.clone());
        }
        next.request(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Chain, Context, core::testing::request_id};

    // Conformance 100
    #[tokio::test]
    async fn adds_but_does_not_override() {
        let labels = ["nodeName", "podName"].map(|key| (key.to_owned(), "mine".to_owned()));
        let chain = Chain::builder().element(ClientInfo::new(labels)).build();
        let mut call = request_id("c", Context::new());
        call.connection_mut().labels.insert("podName".into(), "theirs".into());
        let labels = chain.request(call).await.unwrap().labels;
        assert_eq!((labels["nodeName"].as_str(), labels["podName"].as_str()), ("mine", "theirs"));
    }
}
