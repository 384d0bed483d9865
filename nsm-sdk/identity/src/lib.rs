//! SPIFFE identities: X.509 source, mTLS configurations, path tokens.
//!
//! * [`X509Source`] keeps the newest X.509-SVID and the trust bundles of the Workload API. It survives restarts of the agent: the
//!   last SVID stays in use and the stream is opened again.
//! * [`X509Source::server_config`] and [`X509Source::client_config`] are rustls configurations for mutual TLS with ALPN `h2`. A rotated SVID
//!   is used from the next handshake on; streams that are open stay open.
//! * [`token`] signs and checks the JWTs of an NSM path.
//! * [`clock`] is the time that all this goes by; tests may advance it.
//! * [`Authority`] issues SVIDs, for the development issuer and for tests.

mod authority;
pub mod clock;
mod error;
mod id;
mod source;
mod svid;
mod tls;
pub mod token;
mod workload;

pub use authority::Authority;
pub use error::Error;
pub use id::SpiffeId;
pub use source::{Authorizer, DEFAULT_ENDPOINT_SOCKET, X509Source};
pub use svid::{Bundles, Identity, Peer, Svid, split_certificates};
pub use tls::ALPN_H2;
pub use token::{Claims, Token};
