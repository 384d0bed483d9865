//! Cuts stale segments off the end of a path.

use crate::{Connection, Element, Error, Key, Next, RequestCall, Side, path};

/// Left by the client side: the segments behind ours are alive.
#[derive(Clone, Copy, Debug, Default)]
struct Passthrough;

const MARK: Key<Passthrough> = Key::shared(Side::Client);

/// In an endpoint, segments behind its own are left-overs of an earlier branch and are cut off on return. A client
/// chain in the same process marks the connection as passed through, which is then left whole.
#[derive(Clone, Copy, Debug)]
pub struct TrimPath(Side);

impl TrimPath {
    /// The cutting (server) or marking (client) flavour.
    pub fn new(side: Side) -> Self {
        Self(side)
    }
}

#[async_trait::async_trait]
impl Element for TrimPath {
    fn name(&self) -> &'static str {
        "trimpath"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let metadata = call.ctx.metadata(self.name(), call.id())?.clone();
        let mut connection = next.request(call).await?;
        match self.0 {
            Side::Client => _ = metadata.insert(&MARK, Passthrough),
            Side::Server => {
                if metadata.remove(&MARK).is_none() {
                    let length = path::index(&connection) + 1;
                    if let Some(path) = &mut connection.path {
                        path.path_segments.truncate(length);
                    }
                }
            }
        }
        Ok(connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Chain, Path, PathSegment, core::testing::request_with, elements::metadata::MetadataElement};

    async fn length(chain: &Chain) -> usize {
        let path = Path { index: 1, path_segments: vec![PathSegment::default(); 4] };
        let connection = Connection { id: "c".into(), path: Some(path), ..Default::default() };
        chain.request(request_with(connection)).await.unwrap().path.unwrap().path_segments.len()
    }

    // Conformance 36
    #[tokio::test]
    async fn endpoints_cut_passthroughs_do_not() {
        let endpoint = Chain::builder().element(MetadataElement::new()).element(TrimPath::new(Side::Server)).build();
        assert_eq!(length(&endpoint).await, 2);
        let passthrough = Chain::builder()
            .element(MetadataElement::new())
            .element(TrimPath::new(Side::Server))
            .element(TrimPath::new(Side::Client))
            .build();
        assert_eq!(length(&passthrough).await, 4);
        assert_eq!(length(&passthrough).await, 4);
    }
}
