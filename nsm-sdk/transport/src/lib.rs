//! gRPC over mTLS on TCP and unix sockets, with file descriptors beside the stream.
//!
//! * [`Transport`] dials ([`Transport::dial`], one connection; [`Transport::channel`], lazy and reconnecting) and serves
//!   ([`Transport::serve`]).
//! * [`FdTransceiver`] passes descriptors over a unix socket in the wire form of `grpcfd`: below TLS, one byte and one descriptor
//!   per `sendmsg`, found again by device and inode.
//! * [`ConnInfo`] is in the extensions of each request that a server gets: who called, and the connection's descriptors.
//! * [`PerRpcToken`] adds the path token to each call.

mod address;
mod credentials;
mod deadline;
mod error;
mod fd;
mod listener;
mod serve;
mod stream;
mod transport;
pub mod unauthenticated;

pub use address::Address;
pub use credentials::{
    ClientToken, PerRpcToken, TOKEN_EXPIRES_HEADER, TOKEN_HEADER, client_token, format_rfc3339, parse_rfc3339,
};
pub use deadline::{grpc_timeout, with_deadline_code};
pub use error::Error;
pub use fd::{FdStream, FdTransceiver, inode_of, raise_open_files};
pub use listener::Listener;
pub use stream::{ConnInfo, Stream, UnixCredentials};
pub use transport::{KeepAlive, Link, OptionalToken, Transport};
