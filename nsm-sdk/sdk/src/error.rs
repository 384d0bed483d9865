//! What goes wrong, in one sentence each.

use std::fmt;

/// Why an endpoint or a client cannot go on. The text names the object and the cause, once; it is what `Debug` prints too, so that a
/// `main` may return it.
#[derive(thiserror::Error)]
pub enum Error {
    /// Settings that cannot be used, one line each.
    #[error("{}", .0.join("\n"))]
    Settings(Vec<String>),
    /// No identity, or one that cannot be used.
    #[error("identity: {0}")]
    Identity(nsm_identity::Error),
    /// A socket cannot be listened on, or its server has ended.
    #[error("endpoint {endpoint}: {cause}")]
    Serve {
        /// Name of the endpoint.
        endpoint: String,
        /// Why.
        cause: nsm_transport::Error,
    },
    /// The manager does not take the registration.
    #[error("endpoint {endpoint} cannot be registered at {manager}: {cause}")]
    Register {
        /// Name of the endpoint, or of its network service.
        endpoint: String,
        /// URL of the manager.
        manager: String,
        /// What failed last.
        cause: nsm_registry::Error,
    },
    /// The registration cannot be taken back; it will expire.
    #[error("endpoint {endpoint} cannot be unregistered: {cause}")]
    Unregister {
        /// Name of the endpoint.
        endpoint: String,
        /// Why.
        cause: nsm_registry::Error,
    },
    /// A connection cannot be established.
    #[error("no connection {id} to {service}: {cause}")]
    Request {
        /// Id of the connection in this process.
        id: String,
        /// Network service.
        service: String,
        /// What failed last; it names the element and the process.
        cause: nsm_chain::Error,
    },
    /// A connection could not be closed in order.
    #[error("connection {id} is not closed in order: {cause}")]
    Close {
        /// Id of the connection in this process.
        id: String,
        /// Why.
        cause: nsm_chain::Error,
    },
    /// Handlers of signals cannot be installed.
    #[error("signals: {0}")]
    Signal(std::io::Error),
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Error {
    pub(crate) fn setting(name: &str, cause: impl fmt::Display) -> Self {
        Self::Settings(vec![format!("{name}: {cause}")])
    }
}
