//! Source-based routes of a client.

use crate::{Connection, Element, Error, Next, PolicyRoute, RequestCall};
use std::sync::Arc;

/// Sets the policies of each request to the current ones and their source addresses among the client's addresses.
#[derive(Clone)]
pub struct PolicyRoutes(Arc<dyn Fn() -> Vec<PolicyRoute> + Send + Sync>);

impl PolicyRoutes {
    /// Asks `current` at each request.
    pub fn new(current: impl Fn() -> Vec<PolicyRoute> + Send + Sync + 'static) -> Self {
        Self(Arc::new(current))
    }
}

#[async_trait::async_trait]
impl Element for PolicyRoutes {
    fn name(&self) -> &'static str {
        "policyroute"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let context = call.connection_mut().context.get_or_insert_default().ip_context.get_or_insert_default();
        let old: Vec<String> = context.policies.drain(..).map(|policy| policy.from).collect();
        context.src_ip_addrs.retain(|address| !old.contains(address));
        context.policies = (self.0)();
        for policy in context.policies.iter().filter(|policy| !policy.from.is_empty()) {
            if !context.src_ip_addrs.contains(&policy.from) {
                context.src_ip_addrs.push(policy.from.clone());
            }
        }
        next.request(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context,
        core::testing::{request_id, request_with},
    };
    use std::sync::Mutex;

    // Conformance 99
    #[tokio::test]
    async fn addresses_follow_policies() {
        let from = Arc::new(Mutex::new("20.0.0.1/32"));
        let current = from.clone();
        let element = PolicyRoutes::new(move || {
            vec![PolicyRoute { from: (*current.lock().unwrap()).into(), ..Default::default() }]
        });
        let chain = Chain::builder().element(element).build();
        let mut call = request_id("c", Context::new());
        let context = call.connection_mut().context.get_or_insert_default().ip_context.get_or_insert_default();
        context.src_ip_addrs = vec!["172.16.0.1/24".into()];
        let connection = chain.request(call).await.unwrap();
        let addresses = |connection: &Connection| {
            connection.context.as_ref().unwrap().ip_context.as_ref().unwrap().src_ip_addrs.clone()
        };
        assert_eq!(addresses(&connection), ["172.16.0.1/24", "20.0.0.1/32"]);
        *from.lock().unwrap() = "40.0.0.1/32";
        let connection = chain.request(request_with(connection)).await.unwrap();
        assert_eq!(addresses(&connection), ["172.16.0.1/24", "40.0.0.1/32"]);
    }
}
