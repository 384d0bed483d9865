//! Where to connect.

use crate::{CloseCall, Connection, Element, Error, Next, RequestCall};

/// Puts a URL into the context for `dial`. `None` leaves what is there.
#[derive(Clone, Debug)]
pub struct ClientUrl(Option<String>);

impl ClientUrl {
    /// An element that sets this URL.
    pub fn new(url: Option<String>) -> Self {
        Self(url)
    }
}

#[async_trait::async_trait]
impl Element for ClientUrl {
    fn name(&self) -> &'static str {
        "clienturl"
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        if let Some(url) = &self.0 {
            call.ctx.client_url = Some(url.clone());
        }
        next.request(call).await
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        if let Some(url) = &self.0 {
            call.ctx.client_url = Some(url.clone());
        }
        next.close(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Chain, Context, core::testing::request_id};

    struct Show;

    #[async_trait::async_trait]
    impl Element for Show {
        fn name(&self) -> &'static str {
            "show"
        }

        async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
            let url = call.ctx.client_url.clone().unwrap_or_default();
            call.connection_mut().payload = url;
            next.request(call).await
        }
    }

    // Conformance 64
    #[tokio::test]
    async fn sets_overwrites_and_leaves() {
        for (own, before, after) in [(Some("b"), None, "b"), (Some("b"), Some("a"), "b"), (None, Some("a"), "a")] {
            let chain = Chain::builder().element(ClientUrl::new(own.map(str::to_owned))).element(Show).build();
            let ctx = Context { client_url: before.map(str::to_owned), ..Context::new() };
            assert_eq!(chain.request(request_id("c", ctx)).await.unwrap().payload, after);
        }
    }
}
