//! Puts this process's segment into the path.

use crate::{CloseCall, Connection, Element, Error, Next, RequestCall, path};
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
        path::advance(connection, &self.name)
            .map_err(|error| Error::new(NAME, &connection.id, error.to_string()).with_code(Code::InvalidArgument))
    }
}

#[async_trait::async_trait]
impl Element for UpdatePath {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let back = self.advance(call.connection_mut())?;
        let mut connection = next.request(call).await?;
        path::restore(&mut connection, back);
        Ok(connection)
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        self.advance(&mut call.message)?;
        next.close(call).await
    }
}
