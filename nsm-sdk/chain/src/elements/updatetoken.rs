//! Puts the caller's and the own token into the path.

use crate::{CloseCall, Connection, Context, Element, Error, Next, RequestCall, path, token, token::Tokens};
use tonic::Code;

/// Writes the token that came in gRPC metadata into the caller's segment, and an own token, meant for the caller,
/// into the own segment.
pub struct UpdateToken {
    tokens: Tokens,
}

const NAME: &str = "updatetoken";

impl UpdateToken {
    /// An element that signs with `tokens`.
    pub fn new(tokens: Tokens) -> Self {
        Self { tokens }
    }

    fn update(&self, ctx: &Context, connection: &mut Connection) -> Result<(), Error> {
        let id = connection.id.clone();
        if path::segment(connection, 0).is_none() {
            return Err(
                Error::new(NAME, id, "the path has no segment for this process").with_code(Code::InvalidArgument)
            );
        }
        if let Some(caller) = path::segment_mut(connection, -1) {
            match &ctx.token {
                Some(sent) => token::set(caller, &sent.jwt, sent.expires),
                // Tolerated as Go does; policies decide.
                None => tracing::debug!(id, "no token in the caller's metadata"),
            }
        }
        let own = self.tokens.token(ctx.peer.as_ref()).map_err(|cause| {
            Error::new(NAME, &id, format!("no token for this process: {cause}")).with_code(Code::Internal)
        })?;
        if let Some(segment) = path::segment_mut(connection, 0) {
            token::set(segment, &own.jwt, own.expires);
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Element for UpdateToken {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let ctx = call.ctx.clone();
        self.update(&ctx, call.connection_mut())?;
        next.request(call).await
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        let ctx = call.ctx.clone();
        self.update(&ctx, &mut call.message)?;
        next.close(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, ClientToken, NetworkServiceRequest, Path, PathSegment,
        core::testing::{request_id, tokens},
        elements::updatepath::UpdatePath,
    };
    use std::{sync::Arc, time::Duration};

    fn at(index: u32, names: &[&str]) -> Connection {
        let segment = |name: &&str| PathSegment {
            name: (*name).into(),
            id: (*name).into(),
            token: "old".into(),
            ..Default::default()
        };
        let path_segments = names.iter().map(segment).collect();
        Connection { id: "c".into(), path: Some(Path { index, path_segments }), ..Default::default() }
    }

    // Conformance 19
    #[tokio::test]
    async fn writes_where_the_index_points() {
        let chain = Chain::builder().element(UpdateToken::new(tokens("me"))).build();
        let empty = chain.request(request_id("c", Context::new())).await.unwrap_err();
        assert_eq!(empty.code(), Code::InvalidArgument);

        let expires = crate::clock::now() + Duration::from_secs(5);
        let ctx = Context { token: Some(ClientToken { jwt: "theirs".into(), expires }), ..Context::new() };
        let request = |connection| NetworkServiceRequest { connection: Some(connection), ..Default::default() };
        let call = RequestCall::new(request(at(1, &["a", "b"])), ctx.clone());
        let path = chain.request(call).await.unwrap().path.unwrap();
        let tokens: Vec<_> = path.path_segments.iter().map(|segment| &*segment.token).collect();
        assert_eq!(tokens, ["theirs", "me"]);
        assert!(path.path_segments.iter().all(|segment| segment.expires.is_some()));

        let call = RequestCall::new(request(at(2, &["a", "b"])), ctx);
        assert!(chain.request(call).await.is_err());
    }

    // Conformance 19
    #[tokio::test]
    async fn a_chain_of_three_fills_each_segment() {
        let hop = |name: &'static str| {
            [Arc::new(UpdatePath::new(name)) as Arc<dyn Element>, Arc::new(UpdateToken::new(tokens(name)))]
        };
        let chain = Chain::builder().extend(hop("nsc")).extend(hop("mgr")).extend(hop("nse")).build();
        let connection = chain.request(request_id("c", Context::new())).await.unwrap();
        let segments = connection.path.unwrap().path_segments;
        let tokens: Vec<_> = segments.iter().map(|segment| &*segment.token).collect();
        assert_eq!(tokens, ["nsc", "mgr", "nse"]);
    }
}
