//! Defaults that a registry fills in: a service's payload and an endpoint's first registration time.

use crate::{Call, Element, Error, Next, chain::Table};
use nsm_identity::clock;
use nsm_proto::registry::{NetworkService, NetworkServiceEndpoint};
use prost_types::Timestamp;

/// A network service without a payload carries IP.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetPayload;

#[async_trait::async_trait]
impl Element<NetworkService> for SetPayload {
    fn name(&self) -> &'static str {
        "setpayload"
    }

    async fn register(
        &self,
        mut call: Call<NetworkService>,
        next: Next<NetworkService>,
    ) -> Result<NetworkService, Error> {
        if call.message.payload.is_empty() {
            call.message.payload = "IP".into();
        }
        next.register(call).await
    }
}

/// An endpoint keeps the time of its first registration.
#[derive(Default)]
pub struct SetRegistrationTime {
    first: Table<Timestamp>,
}

#[async_trait::async_trait]
impl Element<NetworkServiceEndpoint> for SetRegistrationTime {
    fn name(&self) -> &'static str {
        "setregistrationtime"
    }

    async fn register(
        &self,
        mut call: Call<NetworkServiceEndpoint>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<NetworkServiceEndpoint, Error> {
        let time = self
            .first
            .get(&call.message.name)
            .or(call.message.initial_registration_time)
            .unwrap_or_else(|| clock::now().into());
        call.message.initial_registration_time = Some(time);
        let answer = next.register(call).await?;
        self.first.insert(&answer.name, time);
        Ok(answer)
    }

    async fn unregister(
        &self,
        call: Call<NetworkServiceEndpoint>,
        next: Next<NetworkServiceEndpoint>,
    ) -> Result<(), Error> {
        self.first.remove(&call.message.name);
        next.unregister(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Context;
    use std::sync::Arc;

    // Conformance 120
    #[tokio::test]
    async fn the_first_registration_time_stays() {
        let chain = Next::new(vec![Arc::new(SetRegistrationTime::default())]);
        let endpoint = |seconds: Option<i64>| NetworkServiceEndpoint {
            name: "e".into(),
            initial_registration_time: seconds.map(|seconds| Timestamp { seconds, nanos: 0 }),
            ..Default::default()
        };
        for given in [Some(5), Some(9), None] {
            let answer = chain.register(Call::new(endpoint(given), Context::new())).await.unwrap();
            assert_eq!(answer.initial_registration_time.unwrap().seconds, 5);
        }
    }

    // Conformance 120, 121
    #[tokio::test]
    async fn the_default_payload_is_ip() {
        let chain = Next::new(vec![Arc::new(SetPayload)]);
        let answer = chain.register(Call::new(NetworkService::default(), Context::new())).await.unwrap();
        assert_eq!(answer.payload, "IP");
    }
}
