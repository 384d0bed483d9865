//! Names of streams and conduits.

use meridio_proto::{ambassador::v1 as api, nsp::v1 as nsp};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A conduit by its full name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct ConduitKey {
    pub(crate) trench: String,
    pub(crate) conduit: String,
}

/// A stream by its full name.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct StreamKey {
    #[serde(flatten)]
    pub(crate) conduit: ConduitKey,
    pub(crate) stream: String,
}

impl fmt::Display for ConduitKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.conduit, self.trench)
    }
}

impl fmt::Display for StreamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.stream, self.conduit)
    }
}

impl ConduitKey {
    pub(crate) fn to_nsp(&self) -> nsp::Conduit {
        let trench = Some(nsp::Trench { name: self.trench.clone() });
        nsp::Conduit { name: self.conduit.clone(), trench, ..nsp::Conduit::default() }
    }
}

impl StreamKey {
    /// From a request, complete with its parents.
    pub(crate) fn from_api(stream: &api::Stream) -> Result<Self, &'static str> {
        let conduit = stream.conduit.as_ref().ok_or("conduit cannot be nil")?;
        let trench = conduit.trench.as_ref().ok_or("trench cannot be nil")?;
        let conduit = ConduitKey { trench: trench.name.clone(), conduit: conduit.name.clone() };
        Ok(Self { conduit, stream: stream.name.clone() })
    }

    pub(crate) fn to_api(&self) -> api::Stream {
        let trench = Some(api::Trench { name: self.conduit.trench.clone() });
        let conduit = Some(api::Conduit { name: self.conduit.conduit.clone(), trench });
        api::Stream { name: self.stream.clone(), conduit }
    }

    pub(crate) fn to_nsp(&self) -> nsp::Stream {
        nsp::Stream { name: self.stream.clone(), conduit: Some(self.conduit.to_nsp()), ..nsp::Stream::default() }
    }

    /// Whether a filter selects it: absent and empty parts are wildcards.
    pub(crate) fn selected_by(&self, filter: &api::Stream) -> bool {
        let fits = |wanted: &str, name: &str| wanted.is_empty() || wanted == name;
        let conduit = filter.conduit.as_ref();
        let trench = conduit.and_then(|conduit| conduit.trench.as_ref());
        fits(&filter.name, &self.stream)
            && conduit.is_none_or(|conduit| fits(&conduit.name, &self.conduit.conduit))
            && trench.is_none_or(|trench| fits(&trench.name, &self.conduit.trench))
    }
}
