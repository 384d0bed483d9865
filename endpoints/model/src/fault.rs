//! What is wrong with a configuration.

use std::fmt;

/// One fault: which object, and why it is refused. Displayed as one line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    /// Kind and name, e.g. `flow flow-a-z-tcp`, or the key of the ConfigMap.
    pub object: String,
    /// Why, with the offending value.
    pub reason: String,
}

impl Fault {
    /// A fault of `object`.
    pub fn new(object: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { object: object.into(), reason: reason.into() }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A parser's message may span lines; a fault is one.
        let line = format!("{}: {}", self.object, self.reason);
        f.write_str(&line.split_whitespace().collect::<Vec<_>>().join(" "))
    }
}

/// All faults of a configuration, one line each. Never empty as an error.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
pub struct Faults(pub Vec<Fault>);

impl Faults {
    /// One line for each fault.
    pub fn lines(&self) -> Vec<String> {
        self.0.iter().map(Fault::to_string).collect()
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.lines().join("\n"))
    }
}
