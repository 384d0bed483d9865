//! Tries candidates in turn.

use crate::{Connection, Element, Error, Next, RequestCall};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// Starts each request for a service at the next of its candidates and goes on until one succeeds.
#[derive(Debug, Default)]
pub struct RoundRobin(Mutex<HashMap<String, usize>>);

const NAME: &str = "roundrobin";

impl RoundRobin {
    fn next_turn(&self, service: &str) -> usize {
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = turns.entry(service.to_owned()).or_default();
        *turn = turn.wrapping_add(1);
        turn.wrapping_sub(1)
    }
}

#[async_trait::async_trait]
impl Element for RoundRobin {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let Some(candidates) = call.ctx.candidates.clone().filter(|_| call.ctx.client_url.is_none()) else {
            return next.request(call).await;
        };
        let mut errors = Vec::new();
        for _ in &candidates.endpoints {
            let turn = self.next_turn(&candidates.network_service.name);
            let Some(endpoint) = candidates.endpoints.get(turn % candidates.endpoints.len()) else { break };
            let mut attempt = call.clone();
            attempt.connection_mut().network_service_endpoint_name.clone_from(&endpoint.name);
            attempt.ctx.client_url = Some(endpoint.url.clone());
            match next.request(attempt).await {
                Ok(connection) => return Ok(connection),
                Err(error) => errors.push(error),
            }
        }
        Err(Error::many(NAME, call.id(), "all candidates have failed", errors))
    }
}
