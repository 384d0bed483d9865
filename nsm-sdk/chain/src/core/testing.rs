//! What the tests of elements share.

use crate::{Call, Chain, CloseCall, Connection, Context, Element, Error, NetworkServiceRequest, Next, RequestCall};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

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

/// A generator whose tokens are the name of their owner and live for an hour.
pub(crate) fn tokens(name: &'static str) -> crate::token::Tokens {
    let hour = std::time::Duration::from_secs(3600);
    std::sync::Arc::new(move |_: Option<&crate::Peer>| {
        Ok(crate::token::Token { jwt: name.to_owned(), expires: crate::clock::now() + hour })
    })
}

/// Counts what passes, and fails or takes its time on demand.
#[derive(Default)]
pub(crate) struct Spy {
    requests: Mutex<Vec<NetworkServiceRequest>>,
    closes: Mutex<Vec<Connection>>,
    fail: AtomicBool,
    fail_close: Mutex<Option<tonic::Code>>,
    delay: Mutex<Duration>,
}

impl Spy {
    pub(crate) fn requests(&self) -> usize {
        self.requests.lock().unwrap().len()
    }

    pub(crate) fn closes(&self) -> usize {
        self.closes.lock().unwrap().len()
    }

    pub(crate) fn last_request(&self) -> NetworkServiceRequest {
        self.requests.lock().unwrap().last().cloned().unwrap()
    }

    pub(crate) fn last_close(&self) -> Connection {
        self.closes.lock().unwrap().last().cloned().unwrap()
    }

    pub(crate) fn fail_requests(&self, fail: bool) {
        self.fail.store(fail, Ordering::SeqCst);
    }

    pub(crate) fn fail_closes(&self, code: Option<tonic::Code>) {
        *self.fail_close.lock().unwrap() = code;
    }

    pub(crate) fn set_delay(&self, delay: Duration) {
        *self.delay.lock().unwrap() = delay;
    }
}

#[async_trait::async_trait]
impl Element for Spy {
    fn name(&self) -> &'static str {
        "spy"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        self.requests.lock().unwrap().push(call.message.clone());
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        if self.fail.load(Ordering::SeqCst) {
            return Err(Error::new("spy", call.id(), "told to fail"));
        }
        next.request(call).await
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        self.closes.lock().unwrap().push(call.message.clone());
        if let Some(code) = *self.fail_close.lock().unwrap() {
            return Err(Error::new("spy", call.id(), "told to fail").with_code(code));
        }
        next.close(call).await
    }
}
