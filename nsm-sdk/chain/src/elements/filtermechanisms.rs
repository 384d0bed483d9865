//! Offers only mechanisms that can reach the next hop.

use super::kernel_mechanism::{LOCAL, REMOTE};
use crate::{Connection, Element, Error, Next, RequestCall};

/// Keeps LOCAL preferences for a next hop on this node (`unix://`, `inode://`), REMOTE ones for all others.
#[derive(Clone, Copy, Debug, Default)]
pub struct FilterMechanisms;

#[async_trait::async_trait]
impl Element for FilterMechanisms {
    fn name(&self) -> &'static str {
        "filtermechanisms"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        if let Some(url) = &call.ctx.client_url {
            let local = ["unix:", "inode:"].iter().any(|scheme| url.starts_with(scheme));
            let class = if local { LOCAL } else { REMOTE };
            call.message.mechanism_preferences.retain(|preference| preference.cls == class);
        }
        next.request(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context, Mechanism,
        core::testing::{Spy, request_id},
    };
    use std::sync::Arc;

    // Conformance 89
    #[tokio::test]
    async fn by_the_scheme_of_the_url() {
        for (url, kept) in [("unix:///a.sock", LOCAL), ("inode://4/5", LOCAL), ("tcp://10.0.0.1:5001", REMOTE)] {
            let spy = Arc::new(Spy::default());
            let mut call = request_id("c", Context { client_url: Some(url.into()), ..Context::new() });
            let class = |cls: &str| Mechanism { cls: cls.into(), ..Default::default() };
            call.message.mechanism_preferences = vec![class(LOCAL), class(REMOTE), class(LOCAL)];
            Chain::builder().element(FilterMechanisms).element(spy.clone()).build().request(call).await.unwrap();
            let classes = spy.last_request().mechanism_preferences;
            assert!(!classes.is_empty() && classes.iter().all(|mechanism| mechanism.cls == kept));
        }
    }
}
