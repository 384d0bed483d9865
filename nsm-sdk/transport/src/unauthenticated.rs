//! What happens to the bytes of a client that nobody knows yet, as functions: for fuzzing and property tests.
//!
//! Below TLS there is only [`FdStream`](crate::FdStream), which does not look at bytes. Before a client is authenticated
//! a server reads TLS records and one certificate chain; everything else comes after.

use nsm_identity::X509Source;
use rustls::{ServerConfig, ServerConnection, pki_types::CertificateDer};
use std::{io, sync::Arc};

/// Whether `bytes`, all that a client sends, authenticate it. They cannot: a genuine client has to see the server's
/// answer first.
pub fn handshake(config: &Arc<ServerConfig>, bytes: &[u8]) -> bool {
    let Ok(mut session) = ServerConnection::new(config.clone()) else { return false };
    let mut rest = bytes;
    while !rest.is_empty() && session.wants_read() {
        if !matches!(session.read_tls(&mut rest), Ok(1..)) || session.process_new_packets().is_err() {
            return false;
        }
        while session.wants_write() {
            if !matches!(session.write_tls(&mut io::sink()), Ok(1..)) {
                return false;
            }
        }
    }
    !session.is_handshaking() && session.peer_certificates().is_some()
}

/// Whether a client would be let in that shows this certificate (DER) and has its key.
pub fn certificate(source: &X509Source, der: &[u8]) -> bool {
    let named = nsm_identity::Peer::from_leaf(der).is_ok();
    let chain = nsm_identity::split_certificates(der).unwrap_or_default();
    let intermediates = chain.get(1..).unwrap_or_default();
    source.trusts_client(&CertificateDer::from(der), intermediates).is_ok() && named
}
