//! Puts this process's segment into the path.

use crate::{CloseCall, Connection, Element, Error, Next, RequestCall, State, path, unwind};
use tonic::Code;

/// Finds or makes the segment called `name` and gives the connection its id; restores the sender's view on return.
///
/// The name has to differ from those of the neighbours on the path: a sender's segment of the same name counts as
/// this process's own (a client chain inside a server chain relies on that).
#[derive(Clone, Debug)]
pub struct UpdatePath {
    name: String,
}

const NAME: &str = "updatepath";

impl UpdatePath {
    /// An element for the process called `name`.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    fn advance(&self, connection: &mut Connection) -> Result<usize, Error> {
        path::advance(connection, &self.name).map_err(|error| {
            Error::new(NAME, &connection.id, error.to_string()).with_code(Code::InvalidArgument).at(&self.name)
        })
    }

    /// The way back: `own` and the sender's segment are where they were, and the view is the sender's.
    fn restore(&self, connection: &mut Connection, own: &At, sender: &At) -> Result<(), Error> {
        let restored =
            path::restore(connection, own.0, &own.1).and_then(|()| path::restore(connection, sender.0, &sender.1));
        restored.map_err(|error| Error::new(NAME, &own.1, error.to_string()).with_code(Code::Internal).at(&self.name))
    }
}

/// Index and id of a segment.
type At = (usize, String);

#[async_trait::async_trait]
impl Element for UpdatePath {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let reselect = call.connection().state() == State::ReselectRequested;
        let asked_before = !reselect && path::leads_through(&call.connection(), &self.name);
        let back = self.advance(call.connection_mut())?;
        call.ctx.refresh |= asked_before;
        let own = (path::index(&call.connection()), call.id().to_owned());
        let before = back as isize - own.0 as isize;
        let sender = path::segment(&call.connection(), before).map_or_else(String::new, |sender| sender.id.clone());
        let postponed = call.ctx.postpone();
        let mut connection = next.request(call).await.map_err(|error| error.at(&self.name))?;
        if let Err(error) = self.restore(&mut connection, &own, &(back, sender)) {
            connection.id = own.1;
            return Err(unwind(&next, connection, &postponed, error).await);
        }
        Ok(connection)
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        self.advance(&mut call.message)?;
        next.close(call).await.map_err(|error| error.at(&self.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Path, PathSegment,
        core::testing::{Spy, request_with},
        unwind,
    };
    use std::sync::Arc;

    /// Fails once what is below it has succeeded.
    struct Fails;

    #[async_trait::async_trait]
    impl Element for Fails {
        fn name(&self) -> &'static str {
            "fails"
        }

        async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
            let (id, postponed) = (call.id().to_owned(), call.ctx.postpone());
            let connection = next.request(call).await?;
            Err(unwind(&next, connection, &postponed, Error::new("fails", id, "on purpose")).await)
        }
    }

    /// An element that loses the path on the way back.
    struct Loses;

    #[async_trait::async_trait]
    impl Element for Loses {
        fn name(&self) -> &'static str {
            "loses"
        }

        async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
            Ok(Connection { path: None, ..next.request(call).await? })
        }
    }

    // Bad input 1
    #[tokio::test]
    async fn a_path_that_is_lost_on_the_way_back_is_an_error_and_is_closed() {
        let spy = Arc::<Spy>::default();
        let chain = Chain::builder().element(UpdatePath::new("mgr")).element(Loses).element(spy.clone()).build();
        let path_segments = vec![PathSegment { name: "nsc".into(), id: "0".into(), ..Default::default() }];
        let path = Some(Path { index: 0, path_segments });
        let error = chain.request(request_with(Connection { id: "0".into(), path, ..Default::default() })).await;
        let (error, id) = (error.unwrap_err().to_string(), spy.last_close().id);
        assert!(
            error.starts_with(&format!("mgr/updatepath (connection {id}): Path.PathSegments[1].Id==None")),
            "{error}"
        );
        assert_eq!(spy.closes(), 1);
    }

    #[tokio::test]
    async fn a_failed_refresh_closes_nothing_even_if_this_process_is_new() {
        let connection = |names: &[&str], state: State| Connection {
            id: "0".into(),
            path: Some(Path {
                index: 0,
                path_segments: names
                    .iter()
                    .enumerate()
                    .map(|(n, name)| PathSegment { name: (*name).into(), id: n.to_string(), ..Default::default() })
                    .collect(),
            }),
            state: state.into(),
            ..Default::default()
        };
        for (names, state, closes) in [
            (&["nsc", "mgr", "fwd"][..], State::Up, 0),
            (&["nsc", "mgr", "fwd"], State::ReselectRequested, 1),
            (&["nsc"], State::Up, 1),
            // Somebody else's: our own segment is new.
            (&["nsc", "other", "fwd"], State::Up, 1),
            // Nothing was established below us.
            (&["nsc", "mgr"], State::Up, 1),
        ] {
            let spy = Arc::<Spy>::default();
            let chain = Chain::builder().element(UpdatePath::new("mgr")).element(Fails).element(spy.clone()).build();
            chain.request(request_with(connection(names, state))).await.unwrap_err();
            assert_eq!((spy.requests(), spy.closes()), (1, closes), "{names:?} {state:?}");
        }
    }
}
