//! Tells an application how its connection is.

use crate::{
    CloseCall, Connection, Element, Error, Next, RequestCall,
    elements::heal::{ConnectionStatus, StatusSender},
};

/// Reports results to the [`StatusSender`] in the context, if there is one. Events carry it too, so that what refresh
/// and heal bring about is seen as well.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Observe;

#[async_trait::async_trait]
impl Element for Observe {
    fn name(&self) -> &'static str {
        "observe"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let status = call.ctx.extension::<StatusSender>();
        let connection = next.request(call).await?;
        if let Some(status) = status {
            status.set(ConnectionStatus::Up(Box::new(connection.clone())));
        }
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let status = call.ctx.extension::<StatusSender>();
        let result = next.close(call).await;
        if let Some(status) = status {
            status.set(ConnectionStatus::Closed);
        }
        result
    }
}
