//! What goes wrong in a chain: who said so, in which process, about which connection, and why.

use std::{fmt, sync::Arc};
use tonic::{Code, Status};

/// The failure of an operation.
///
/// Elements pass errors of `next` on as they are: the message names the element that failed first, not the
/// whole way back. On the wire it becomes a [`Status`] with the same code and text.
#[derive(Clone, Debug, thiserror::Error)]
pub struct Error {
    /// Name of the process, as on the path; empty as long as the error has not left its chain.
    process: String,
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
        if !self.process.is_empty() {
            write!(f, "{}/", self.process)?;
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
            process: String::new(),
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

    /// The same with the name of the process, unless it has one or comes from another process. Whoever reads it far away knows
    /// the processes of a path by these names.
    #[must_use]
    pub fn at(mut self, process: &str) -> Self {
        if self.process.is_empty() && !self.verbatim {
            process.clone_into(&mut self.process);
        }
        self
    }

    /// The same with the connection, if it names none and comes from this process.
    #[must_use]
    pub fn about(mut self, connection: &str) -> Self {
        if self.connection.is_empty() && !self.verbatim {
            connection.clone_into(&mut self.connection);
        }
        self
    }

    /// One error for many attempts. Attempts that failed alike are one; one error stays as it is, so that it does not get
    /// longer with every hop that could not help.
    pub(crate) fn many(element: &'static str, connection: &str, what: &str, errors: Vec<Error>) -> Self {
        let code = errors.last().map_or(Code::Unknown, Error::code);
        let mut different: Vec<(String, Error)> = Vec::new();
        for error in errors {
            let text = error.to_string();
            if different.iter().all(|(known, _)| *known != text) {
                different.push((text, error));
            }
        }
        if different.len() > 1 || different.is_empty() {
            let texts: Vec<String> = different.into_iter().map(|(text, _)| text).collect();
            let message = if texts.is_empty() { what.to_owned() } else { format!("{what}: {}", texts.join("; ")) };
            return Self::new(element, connection, message).with_code(code);
        }
        let (_, error) = different.remove(0);
        error.with_code(code)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What the next process makes of an error.
    fn hop(error: Error) -> Error {
        Error::remote("connect", "here", "unix:///next", error.into())
    }

    #[test]
    fn one_sentence_however_many_hops() {
        let first = Error::new("ipam", "c4", "no address is free").with_code(Code::ResourceExhausted).at("nse-1");
        let mut error = first.at("not this one");
        for process in ["forwarder", "manager", "client"] {
            error = Error::many("discover", "c", "all have failed", vec![hop(error)]).at(process);
        }
        assert_eq!(error.to_string(), "nse-1/ipam (connection c4): no address is free");
        assert_eq!(error.code(), Code::ResourceExhausted);
    }

    #[test]
    fn attempts_that_failed_alike_are_one_the_others_are_listed() {
        let failed = |why: &str| Error::new("dial", "c", why).with_code(Code::Unavailable);
        let many = |errors| Error::many("roundrobin", "c", "all candidates have failed", errors);
        let refused = many(vec![failed("refused"), failed("refused")]);
        assert_eq!(refused.to_string(), "dial (connection c): refused");
        let both = many(vec![failed("refused"), failed("late").with_code(Code::DeadlineExceeded), failed("refused")]);
        let text = "roundrobin (connection c): all candidates have failed: \
                    dial (connection c): refused; dial (connection c): late";
        assert_eq!((both.to_string().as_str(), both.code()), (text, Code::Unavailable));
        assert_eq!(many(Vec::new()).to_string(), "roundrobin (connection c): all candidates have failed");
    }
}
