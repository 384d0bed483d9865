//! What the tests of elements share.

use crate::{Call, Chain, Connection, Context, Error, NetworkServiceRequest, RequestCall};

/// A request for the connection `id`.
pub(crate) fn request_id(id: &str, ctx: Context) -> RequestCall {
    let connection = Connection { id: id.into(), ..Default::default() };
    Call::new(NetworkServiceRequest { connection: Some(connection), ..Default::default() }, ctx)
}

/// A request with this connection.
pub(crate) fn request_with(connection: Connection) -> RequestCall {
    Call::new(NetworkServiceRequest { connection: Some(connection), ..Default::default() }, Context::new())
}

/// Closes the connection `id`.
pub(crate) async fn close(chain: &Chain, id: &str) -> Result<(), Error> {
    chain.close(Call::new(Connection { id: id.into(), ..Default::default() }, Context::new())).await
}
