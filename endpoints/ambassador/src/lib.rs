//! Client of the ambassador API (`ambassador.v1.Tap`), for applications that want traffic of a stream.
//!
//! An application runs beside a TAPA (target access point ambassador) and talks to it over a unix socket.
//! [`Ambassador::open`] asks for a stream once; [`Ambassador::keep_open`] asks again whenever the TAPA has
//! forgotten it, for as long as the application lives:
//!
//! ```no_run
//! # async fn example() -> Result<(), meridio_ambassador::Error> {
//! use meridio_ambassador::{Ambassador, StreamName};
//! let tapa = Ambassador::new("unix:///ambassador.sock")?;
//! let stream = StreamName::new("trench-a", "conduit-a-1", "stream-a-i");
//! tapa.open(&stream).await?;
//! // ... serve ...
//! tapa.close(&stream).await?;
//! # Ok(()) }
//! ```

mod keep;
mod text;

use std::fmt;

use futures_util::{Stream, StreamExt};
use meridio_proto::ambassador::v1 as api;
use meridio_proto::ambassador::v1::tap_client::TapClient;
use tonic::transport::{Channel, Endpoint};

pub use meridio_proto::ambassador::v1::stream_status::Status as StreamState;
pub use text::render;

/// What can go wrong between an application and its TAPA.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address is not one of a unix socket.
    #[error("ambassador socket {address:?}: {source}")]
    Address {
        /// The address as given.
        address: String,
        /// Why it was refused.
        source: tonic::transport::Error,
    },
    /// The TAPA answered with an error, or could not be reached.
    #[error("{call} of {stream}: {status}")]
    Call {
        /// The method: `open`, `close` or `watch`.
        call: &'static str,
        /// The stream it was about.
        stream: String,
        /// What came back.
        status: Box<tonic::Status>,
    },
}

/// A stream by its full name. An empty part is a wildcard in [`Ambassador::watch`].
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamName {
    /// Name of the trench.
    pub trench: String,
    /// Name of the conduit in the trench.
    pub conduit: String,
    /// Name of the stream in the conduit.
    pub stream: String,
}

/// A stream that the application asked for, and how far it has come (spec: OPEN, PENDING, UNAVAILABLE, UNDEFINED).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamStatus {
    /// Which stream.
    pub name: StreamName,
    /// Its state.
    pub state: StreamState,
}

/// A connection to the TAPA of this pod. Cheap to clone; connects when it is first used and again after a restart of the TAPA.
#[derive(Clone, Debug)]
pub struct Ambassador {
    client: TapClient<Channel>,
}

// === impl StreamName ===

impl StreamName {
    /// A stream of `conduit` in `trench`.
    pub fn new(trench: impl Into<String>, conduit: impl Into<String>, stream: impl Into<String>) -> Self {
        Self { trench: trench.into(), conduit: conduit.into(), stream: stream.into() }
    }

    fn to_api(&self) -> api::Stream {
        let trench = api::Trench { name: self.trench.clone() };
        let conduit = api::Conduit { name: self.conduit.clone(), trench: Some(trench) };
        api::Stream { name: self.stream.clone(), conduit: Some(conduit) }
    }

    fn from_api(stream: api::Stream) -> Self {
        let conduit = stream.conduit.unwrap_or_default();
        Self { trench: conduit.trench.unwrap_or_default().name, conduit: conduit.name, stream: stream.name }
    }
}

impl fmt::Display for StreamName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stream {} of conduit {} in trench {}", self.stream, self.conduit, self.trench)
    }
}

// === impl Ambassador ===

impl Ambassador {
    /// A client of the TAPA at `socket`: `unix:///path`, or a bare path. Needs a runtime.
    ///
    /// # Errors
    /// [`Error::Address`] if it is neither.
    pub fn new(socket: &str) -> Result<Self, Error> {
        Ok(Self { client: TapClient::new(Self::endpoint(socket)?.connect_lazy()) })
    }

    /// Whether `socket` is an address, without a runtime to connect in.
    ///
    /// # Errors
    /// As [`Ambassador::new`].
    pub fn check(socket: &str) -> Result<(), Error> {
        Self::endpoint(socket).map(|_| ())
    }

    fn endpoint(socket: &str) -> Result<Endpoint, Error> {
        let address = if socket.starts_with('/') { format!("unix://{socket}") } else { socket.to_owned() };
        Endpoint::try_from(address).map_err(|source| Error::Address { address: socket.to_owned(), source })
    }

    /// Asks for the stream. Returns once the TAPA has noted it; [`Ambassador::watch`] tells when it is OPEN.
    ///
    /// # Errors
    /// [`Error::Call`], for instance when the pod is connected to another trench.
    pub async fn open(&self, stream: &StreamName) -> Result<(), Error> {
        let answer = self.client.clone().open(stream.to_api()).await;
        answer.map(|_| ()).map_err(|status| Error::call("open", stream, status))
    }

    /// Gives the stream up. Returns once the TAPA has noted it.
    ///
    /// # Errors
    /// [`Error::Call`] if the TAPA cannot be reached.
    pub async fn close(&self, stream: &StreamName) -> Result<(), Error> {
        let answer = self.client.clone().close(stream.to_api()).await;
        answer.map(|_| ()).map_err(|status| Error::call("close", stream, status))
    }

    /// The streams that match `filter`: the full list at once, and again after every change.
    ///
    /// # Errors
    /// [`Error::Call`] if the TAPA cannot be reached, or as an item when the stream breaks.
    pub async fn watch(
        &self,
        filter: &StreamName,
    ) -> Result<impl Stream<Item = Result<Vec<StreamStatus>, Error>> + use<>, Error> {
        let answer = self.client.clone().watch(filter.to_api()).await;
        let messages = answer.map_err(|status| Error::call("watch", filter, status))?.into_inner();
        let filter = filter.clone();
        Ok(messages.map(move |message| match message {
            Ok(list) => Ok(list.stream_status.into_iter().map(StreamStatus::from_api).collect()),
            Err(status) => Err(Error::call("watch", &filter, status)),
        }))
    }
}

// === impl StreamStatus ===

impl StreamStatus {
    fn from_api(status: api::StreamStatus) -> Self {
        Self { state: status.status(), name: StreamName::from_api(status.stream.unwrap_or_default()) }
    }
}

// === impl Error ===

impl Error {
    fn call(call: &'static str, stream: &StreamName, status: tonic::Status) -> Self {
        Self::Call { call, stream: stream.to_string(), status: Box::new(status) }
    }
}

#[cfg(test)]
mod tests;
