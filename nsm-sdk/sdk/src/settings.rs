//! Settings that endpoints and clients share, and how settings are read from the environment of NSM's own programs.

use crate::Error;
use nsm_identity::{DEFAULT_ENDPOINT_SOCKET, X509Source};
use nsm_transport::Transport;
use std::{str::FromStr, time::Duration};

/// Where a node's manager listens unless told otherwise.
pub const DEFAULT_MANAGER: &str = "unix:///var/lib/networkservicemesh/nsm.io.sock";

/// Who this process is and how it reaches its node.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) name: String,
    pub(crate) manager: String,
    pub(crate) workload_api: String,
    pub(crate) source: Option<X509Source>,
    pub(crate) max_token_lifetime: Duration,
    pub(crate) dial_timeout: Duration,
    pub(crate) patience: Duration,
}

impl Settings {
    pub(crate) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            manager: DEFAULT_MANAGER.to_owned(),
            workload_api: DEFAULT_ENDPOINT_SOCKET.to_owned(),
            source: None,
            max_token_lifetime: Duration::from_secs(600),
            dial_timeout: Duration::from_secs(5),
            patience: Duration::from_secs(60),
        }
    }

    pub(crate) fn read(&mut self, env: &mut Env<'_>) {
        env.text("NSM_NAME", &mut self.name);
        env.text("NSM_CONNECT_TO", &mut self.manager);
        env.text("SPIFFE_ENDPOINT_SOCKET", &mut self.workload_api);
        env.duration("NSM_MAX_TOKEN_LIFETIME", &mut self.max_token_lifetime);
        env.duration("NSM_DIAL_TIMEOUT", &mut self.dial_timeout);
    }

    /// The identity, waited for, and the transport that uses it.
    pub(crate) async fn transport(&self) -> Result<(X509Source, Transport), Error> {
        if self.name.is_empty() {
            return Err(Error::setting("NSM_NAME", "an endpoint or client needs a name"));
        }
        let source = match &self.source {
            Some(source) => source.clone(),
            None => X509Source::connect(&self.workload_api, self.patience).await.map_err(Error::Identity)?,
        };
        let transport = Transport::new(source.clone()).map_err(|cause| match cause {
            nsm_transport::Error::Identity(cause) => Error::Identity(cause),
            cause => Error::Serve { endpoint: self.name.clone(), cause },
        })?;
        Ok((source, transport.with_max_token_lifetime(self.max_token_lifetime)))
    }
}

/// The setters that both builders have: `setters!(name: "...", max_token_lifetime: "...", patience: "...")`, with what each of the
/// three means there. The builder has a field `settings` and a field `elements`.
macro_rules! setters {
    (name: $name:literal, max_token_lifetime: $lifetime:literal, patience: $patience:literal, element: $element:literal) => {
        #[doc = $name]
        #[must_use]
        pub fn name(mut self, name: impl Into<String>) -> Self {
            self.settings.name = name.into();
            self
        }

        /// The manager, [`DEFAULT_MANAGER`](crate::DEFAULT_MANAGER) by default.
        #[must_use]
        pub fn connect_to(mut self, url: impl Into<String>) -> Self {
            self.settings.manager = url.into();
            self
        }

        /// Socket of the SPIFFE Workload API, `unix:///run/spire/sockets/agent.sock` by default.
        #[must_use]
        pub fn workload_api(mut self, socket: impl Into<String>) -> Self {
            self.settings.workload_api = socket.into();
            self
        }

        /// An identity that is there already.
        #[must_use]
        pub fn identity(mut self, source: nsm_identity::X509Source) -> Self {
            self.settings.source = Some(source);
            self
        }

        #[doc = $lifetime]
        #[must_use]
        pub fn max_token_lifetime(mut self, lifetime: Duration) -> Self {
            self.settings.max_token_lifetime = lifetime;
            self
        }

        /// What connecting to the manager may take (5 s).
        #[must_use]
        pub fn dial_timeout(mut self, timeout: Duration) -> Self {
            self.settings.dial_timeout = timeout;
            self
        }

        #[doc = $patience]
        #[must_use]
        pub fn patience(mut self, patience: Duration) -> Self {
            self.settings.patience = patience;
            self
        }

        #[doc = $element]
        #[must_use]
        pub fn element(mut self, element: impl Element) -> Self {
            self.elements.push(Arc::new(element));
            self
        }
    };
}
pub(crate) use setters;

/// Reads variables, and collects every fault instead of stopping at the first.
pub(crate) struct Env<'a> {
    lookup: &'a dyn Fn(&str) -> Option<String>,
    faults: Vec<String>,
}

impl<'a> Env<'a> {
    pub(crate) fn new(lookup: &'a dyn Fn(&str) -> Option<String>) -> Self {
        Self { lookup, faults: Vec::new() }
    }

    /// The variable's value; an empty one counts as not set.
    fn get(&self, name: &str) -> Option<String> {
        (self.lookup)(name).filter(|value| !value.is_empty())
    }

    pub(crate) fn text(&mut self, name: &str, value: &mut String) {
        if let Some(text) = self.get(name) {
            *value = text;
        }
    }

    pub(crate) fn read<T>(&mut self, name: &str, value: &mut T, parse: impl Fn(&str) -> Result<T, String>) {
        match self.get(name).map(|text| parse(&text)) {
            Some(Ok(new)) => *value = new,
            Some(Err(cause)) => self.faults.push(format!("{name}: {cause}")),
            None => {}
        }
    }

    /// A duration such as `10m` or `1m30s`.
    pub(crate) fn duration(&mut self, name: &str, value: &mut Duration) {
        self.read(name, value, |text| {
            humantime::parse_duration(text).map_err(|cause| format!("{text:?} is no duration such as 10m: {cause}"))
        });
    }

    pub(crate) fn boolean(&mut self, name: &str, value: &mut bool) {
        self.read(name, value, |text| text.parse().map_err(|_| format!("{text:?} is neither true nor false")));
    }

    /// Values between commas.
    pub(crate) fn list<T: FromStr<Err: std::fmt::Display>>(&mut self, name: &str, value: &mut Vec<T>) {
        self.read(name, value, |text| {
            let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
            parts.map(|part| part.parse().map_err(|cause: T::Err| cause.to_string())).collect()
        });
    }

    pub(crate) fn finish(self) -> Result<(), Error> {
        if self.faults.is_empty() { Ok(()) } else { Err(Error::Settings(self.faults)) }
    }
}

/// The process's environment.
pub(crate) fn process(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

#[cfg(test)]
pub(crate) fn fixed(pairs: &'static [(&'static str, &'static str)]) -> impl Fn(&str) -> Option<String> {
    move |name| pairs.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_set_stays_and_every_fault_is_named() {
        let lookup = fixed(&[
            ("NSM_NAME", "nse-1"),
            ("NSM_CONNECT_TO", ""),
            ("NSM_MAX_TOKEN_LIFETIME", "1m30s"),
            ("NSM_DIAL_TIMEOUT", "soon"),
            ("FLAG", "perhaps"),
        ]);
        let (mut env, mut settings, mut flag) = (Env::new(&lookup), Settings::new(""), true);
        settings.read(&mut env);
        env.boolean("FLAG", &mut flag);
        assert_eq!((settings.name.as_str(), settings.manager.as_str()), ("nse-1", DEFAULT_MANAGER));
        assert_eq!(settings.max_token_lifetime, Duration::from_secs(90));
        let faults = env.finish().unwrap_err().to_string();
        assert!(faults.contains("NSM_DIAL_TIMEOUT: \"soon\"") && faults.contains("FLAG: \"perhaps\""), "{faults}");
        assert_eq!(faults.lines().count(), 2);
    }

    #[tokio::test]
    async fn a_name_is_demanded() {
        let error = Settings::new("").transport().await.unwrap_err();
        assert!(error.to_string().starts_with("NSM_NAME"), "{error}");
    }
}
