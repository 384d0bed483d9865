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
    /// The text comes from another process, which has named itself, element and object.
    verbatim: bool,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.verbatim {
            return f.write_str(&self.message);
        }
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
            verbatim: false,
        }
    }

    /// The same with another code.
    #[must_use]
    pub fn with_code(mut self, code: Code) -> Self {
        self.code = code;
        self
    }

    /// What another process answered, or that it did not: a status with a cause was made on this side, by a transport
    /// that broke, and counts as UNAVAILABLE. What that process answered is passed on as it is, so that an error that crosses
    /// manager and registry still reads as one sentence.
    pub fn remote(element: &'static str, object: impl Into<String>, status: &Status) -> Self {
        let cause = std::error::Error::source(status);
        let code = match (cause, status.code()) {
            (Some(_), Code::Unknown | Code::Internal | Code::Cancelled) => Code::Unavailable,
            (_, code) => code,
        };
        let verbatim = cause.is_none() && !status.message().is_empty();
        let message = match cause {
            Some(cause) => format!("{}: {cause}", status.message()),
            None if verbatim => status.message().to_owned(),
            None => format!("{code:?} without a reason"),
        };
        Self { code, verbatim, ..Self::new(element, object, message) }
    }

    /// The time of the call was over.
    pub fn deadline(element: &'static str, object: impl Into<String>, waiting_for: &str) -> Self {
        Self::new(element, object, format_args!("context deadline exceeded while waiting for {waiting_for}"))
            .with_code(Code::DeadlineExceeded)
    }

    /// The same with the object, if it names none and comes from this process.
    #[must_use]
    pub fn about(mut self, object: &str) -> Self {
        if self.object.is_empty() && !self.verbatim {
            object.clone_into(&mut self.object);
        }
        self
    }

    /// The same with the identity of the process, unless it has one or comes from another process. Whoever reads it far away learns whose registry it was.
    #[must_use]
    pub fn at(mut self, process: &str) -> Self {
        if self.process.is_empty() && !self.verbatim {
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

    /// Whether another process has answered it, and not this one.
    pub fn is_remote(&self) -> bool {
        self.verbatim
    }

    /// What happened, without element and object; all of the text if another process has answered it.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sentence_however_many_hops() {
        let mut error = Error::new("authorize", "svc", "not yours").with_code(Code::PermissionDenied).at("registry");
        for process in ["manager", "client"] {
            error = Error::remote("connect", "svc", &error.into()).about("svc").at(process);
            assert!(error.is_remote());
        }
        assert_eq!(error.to_string(), "registry/authorize (svc): not yours");
        assert_eq!(error.code(), Code::PermissionDenied);
        // What says nothing is named here.
        let silent = Error::remote("connect", "svc", &Status::new(Code::Unavailable, "")).at("manager");
        assert_eq!(
            (silent.to_string().as_str(), silent.is_remote()),
            ("manager/connect (svc): Unavailable without a reason", false)
        );
    }
}
