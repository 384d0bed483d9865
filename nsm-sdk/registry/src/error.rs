//! What goes wrong in a registry: who said so, about which object, and why.

use std::fmt;
use tonic::{Code, Status};

/// The failure of a registry operation.
#[derive(Clone, Debug, thiserror::Error)]
pub struct Error {
    /// Identity of the process; empty as long as the error has not left its chain.
    process: String,
    element: &'static str,
    object: String,
    message: String,
    code: Code,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.process.is_empty() {
            write!(f, "{}/", self.process)?;
        }
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
        Self {
            process: String::new(),
            element,
            object: object.into(),
            message: message.to_string(),
            code: Code::Unknown,
        }
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
        Self { code, ..Self::new(element, object, message) }
    }

    /// The time of the call was over.
    pub fn deadline(element: &'static str, object: impl Into<String>, waiting_for: &str) -> Self {
        Self::new(element, object, format_args!("context deadline exceeded while waiting for {waiting_for}"))
            .with_code(Code::DeadlineExceeded)
    }

    /// The same with the object, if it names none.
    #[must_use]
    pub fn about(mut self, object: &str) -> Self {
        if self.object.is_empty() {
            object.clone_into(&mut self.object);
        }
        self
    }

    /// The same with the identity of the process, unless it has one. Whoever reads it far away learns whose registry it was.
    #[must_use]
    pub fn at(mut self, process: &str) -> Self {
        if self.process.is_empty() {
            process.clone_into(&mut self.process);
        }
        self
    }

    /// The failure of a clean-up that followed this failure.
    #[must_use]
    pub fn also(mut self, what: &str, other: &Error) -> Self {
        self.message = format!("{}; {what}: {other}", self.message);
        self
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
