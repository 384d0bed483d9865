//! What goes wrong in a registry: who said so, about which object, and why.

use std::fmt;
use tonic::{Code, Status};

/// The failure of a registry operation.
#[derive(Clone, Debug, thiserror::Error)]
pub struct Error {
    element: &'static str,
    object: String,
    message: String,
    code: Code,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.element)?;
        if !self.object.is_empty() {
            write!(f, " ({})", self.object)?;
        }
        write!(f, ": {}", self.message)
    }
}

impl Error {
    /// A failure with code UNKNOWN.
    pub fn new(element: &'static str, object: impl Into<String>, message: impl fmt::Display) -> Self {
        Self { element, object: object.into(), message: message.to_string(), code: Code::Unknown }
    }

    /// The same with another code.
    #[must_use]
    pub fn with_code(mut self, code: Code) -> Self {
        self.code = code;
        self
    }

    /// What another process answered, or that it did not: a status with a cause was made on this side, by a transport
    /// that broke, and counts as UNAVAILABLE.
    pub fn remote(element: &'static str, object: impl Into<String>, status: &Status) -> Self {
        let cause = std::error::Error::source(status);
        let code = match (cause, status.code()) {
            (Some(_), Code::Unknown | Code::Internal | Code::Cancelled) => Code::Unavailable,
            (_, code) => code,
        };
        let message = match cause {
            Some(cause) => format!("{}: {cause}", status.message()),
            None => status.message().to_owned(),
        };
        Self { element, object: object.into(), message, code }
    }

    /// The time of the call was over.
    pub fn deadline(element: &'static str, object: impl Into<String>, waiting_for: &str) -> Self {
        Self::new(element, object, format_args!("context deadline exceeded while waiting for {waiting_for}"))
            .with_code(Code::DeadlineExceeded)
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
