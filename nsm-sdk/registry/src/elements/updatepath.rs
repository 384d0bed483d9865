//! Adds the caller's and the own token to the registry path, and both identities to the object.

use crate::{Call, Context, Element, Error, Events, Next, Object, Query};
use nsm_identity::{Error as IdentityError, Token, X509Source, token};
use std::{sync::Arc, time::Duration};

const NAME: &str = "updatepath";

type Generator = Arc<dyn Fn(Option<&str>) -> Result<Token, IdentityError> + Send + Sync>;

/// The element.
pub struct UpdatePath {
    generate: Generator,
    /// The own identity, by which errors name this process.
    own: Arc<dyn Fn() -> String + Send + Sync>,
}

impl UpdatePath {
    /// Tokens signed by `source`, living `max_lifetime` at most.
    pub fn new(source: X509Source, max_lifetime: Duration) -> Self {
        let identity = source.clone();
        Self {
            generate: Arc::new(move |audience| source.token(audience, max_lifetime)),
            own: Arc::new(move || identity.spiffe_id()),
        }
    }

    fn named(&self, error: Error) -> Error {
        error.at(&(self.own)())
    }

    /// The way down: path and object get both identities.
    fn advance<T: Object>(&self, object: &mut T, ctx: &mut Context) -> Result<(), Error> {
        let own = (self.generate)(ctx.peer.as_ref().map(|peer| peer.spiffe_id.as_str()))
            .map_err(|cause| Error::new(NAME, object.name(), cause))?;
        let peer = ctx.token.as_ref().map_or("", |token| token.jwt.as_str());
        let path = ctx.path.get_or_insert_default();
        let index = path
            .update(|path| path.advance(peer, &own.jwt).map(|()| path.index))
            .map_err(|cause| Error::new(NAME, object.name(), cause).with_code(tonic::Code::InvalidArgument))?;
        let caller = token::decode(peer).map(|claims| claims.sub).unwrap_or_else(|cause| {
            tracing::warn!(object = object.name(), %cause, "the caller's token names nobody");
            String::new()
        });
        let own_id = token::decode(&own.jwt).map_err(|cause| Error::new(NAME, object.name(), cause))?.sub;
        put(object.path_ids_mut(), index.saturating_sub(1), caller);
        put(object.path_ids_mut(), index, own_id);
        ctx.own_expires = Some(own.expires);
        Ok(())
    }
}

/// Sets the element of that index, which is at most one behind the end in a sound object.
fn put(ids: &mut Vec<String>, index: usize, id: String) {
    match ids.get_mut(index) {
        Some(slot) => *slot = id,
        None => ids.push(id),
    }
}

fn step_back(ctx: &Context) {
    if let Some(path) = &ctx.path {
        path.update(|path| path.index = path.index.saturating_sub(1));
    }
}

#[async_trait::async_trait]
impl<T: Object> Element<T> for UpdatePath {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn register(&self, mut call: Call<T>, next: Next<T>) -> Result<T, Error> {
        self.advance(&mut call.message, &mut call.ctx).map_err(|error| self.named(error))?;
        let ctx = call.ctx.clone();
        let answer = next.register(call).await.map_err(|error| self.named(error))?;
        step_back(&ctx);
        Ok(answer)
    }

    async fn find(&self, call: Call<Query<T>>, next: Next<T>) -> Result<Events<T>, Error> {
        next.find(call).await.map_err(|error| self.named(error))
    }

    async fn unregister(&self, mut call: Call<T>, next: Next<T>) -> Result<(), Error> {
        self.advance(&mut call.message, &mut call.ctx).map_err(|error| self.named(error))?;
        let ctx = call.ctx.clone();
        next.unregister(call).await.map_err(|error| self.named(error))?;
        step_back(&ctx);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ClientToken;
    use nsm_identity::Authority;
    use nsm_proto::registry::NetworkServiceEndpoint;
    use std::time::SystemTime;

    // Conformance 111
    #[tokio::test]
    async fn a_registration_carries_the_identities_of_its_way() {
        let authority = Authority::generate("example.org").unwrap();
        let hour = Duration::from_secs(3600);
        let own = authority.source("/registry", hour).unwrap();
        let peer = authority.source("/endpoint", hour).unwrap();
        let chain = Next::new(vec![Arc::new(UpdatePath::new(own, hour))]);
        let token = peer.sign(Some("spiffe://example.org/registry"), hour).unwrap();
        let ctx = Context {
            token: Some(ClientToken { jwt: token.jwt.clone(), expires: SystemTime::now() }),
            path: Some(Default::default()),
            ..Context::new()
        };
        let object = NetworkServiceEndpoint { name: "e".into(), ..Default::default() };
        for _ in 0..2 {
            let answer = chain.register(Call::new(object.clone(), ctx.clone())).await.unwrap();
            assert_eq!(answer.path_ids, ["spiffe://example.org/endpoint", "spiffe://example.org/registry"]);
            let path = ctx.path.as_ref().unwrap().get();
            assert_eq!((path.index, path.segments.len()), (0, 2));
            assert_eq!(path.segments[0].token, token.jwt);
        }
    }
}
