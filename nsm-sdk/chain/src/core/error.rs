//! What goes wrong in a chain: who said so, about which connection, and why.

use std::{fmt, sync::Arc};
use tonic::{Code, Status};

/// The failure of an operation.
///
/// Elements pass errors of `next` on as they are: the message names the element that failed first, not the
/// whole way back. On the wire it becomes a [`Status`] with the same code and text.
#[derive(Clone, Debug, thiserror::Error)]
pub struct Error {
    element: &'static str,
    connection: String,
    message: String,
    code: Code,
    /// The text comes from another process, which has named element and connection.
    verbatim: bool,
    #[source]
    cause: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.verbatim {
            return f.write_str(&self.message);
        }
        f.write_str(self.element)?;
        if !self.connection.is_empty() {
            write!(f, " (connection {})", self.connection)?;
        }
        write!(f, ": {}", self.message)
    }
}

impl Error {
    /// A failure with code UNKNOWN, which is what most NSM errors carry.
    pub fn new(element: &'static str, connection: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            element,
            connection: connection.into(),
            message: message.into(),
            code: Code::Unknown,
            verbatim: false,
            cause: None,
        }
    }

    /// The same with another code.
    #[must_use]
    pub fn with_code(mut self, code: Code) -> Self {
        self.code = code;
        self
    }

    /// The same with a cause, whose text is appended to the message.
    #[must_use]
    pub fn with_cause(mut self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.message = format!("{}: {cause}", self.message);
        self.cause = Some(Arc::new(cause));
        self
    }

    /// The failure of a call to another process. What that process answered is passed on as it is, so that an error
    /// that crosses five hops still reads as one sentence; what the transport says gets the URL.
    pub fn remote(element: &'static str, connection: impl Into<String>, url: &str, status: Status) -> Self {
        let local = std::error::Error::source(&status).is_some() || status.message().is_empty();
        let code = status.code();
        let message = match local {
            true => format!("calling {url}: {code:?} {}", status.message()),
            false => status.message().to_owned(),
        };
        Self { code, verbatim: !local, cause: Some(Arc::new(status)), ..Self::new(element, connection, message) }
    }

    /// The deadline of the call has passed.
    pub fn deadline(element: &'static str, connection: impl Into<String>, waiting_for: &str) -> Self {
        Self::new(element, connection, format!("context deadline exceeded while waiting for {waiting_for}"))
            .with_code(Code::DeadlineExceeded)
    }

    /// The failure of a clean-up that followed this failure.
    #[must_use]
    pub fn also(mut self, what: &str, other: &Error) -> Self {
        self.message = format!("{}; {what}: {other}", self.message);
        self
    }

    /// The element that failed.
    pub fn element(&self) -> &'static str {
        self.element
    }

    /// The connection's id in this process; may be empty.
    pub fn connection(&self) -> &str {
        &self.connection
    }

    /// What happened, without element and connection.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The status code it has on the wire.
    pub fn code(&self) -> Code {
        self.code
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        Status::new(error.code, error.to_string())
    }
}
