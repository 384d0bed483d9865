//! rustls configurations for mutual TLS between SPIFFE workloads.
//!
//! Both sides must show a certificate with exactly one SPIFFE URI name that leads to the bundle of its trust domain; host names mean
//! nothing. Sessions are not resumed: a resumed session would outlive a rotated SVID.

use crate::{SpiffeId, X509Source};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::{
        ClientHello, NoServerSessionStorage, ResolvesServerCert,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use std::sync::Arc;

/// The one application protocol: gRPC is HTTP/2, and grpc-go refuses connections that do not say so.
pub const ALPN_H2: &[u8] = b"h2";

pub(crate) fn server_config(source: X509Source) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let side = Arc::new(Side { source, provider: provider.clone() });
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_client_cert_verifier(side.clone())
        .with_cert_resolver(side);
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

pub(crate) fn client_config(source: X509Source) -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let side = Arc::new(Side { source, provider: provider.clone() });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .dangerous()
        .with_custom_certificate_verifier(side.clone())
        .with_client_cert_resolver(side);
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// One side of a handshake: shows the newest SVID, checks the other's against the newest bundles.
#[derive(Debug)]
struct Side {
    source: X509Source,
    provider: Arc<CryptoProvider>,
}

impl Side {
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: webpki::KeyUsage,
    ) -> Result<(), rustls::Error> {
        let bundles = self.source.identity().bundles;
        let id: SpiffeId = bundles.verify(leaf, intermediates, now, usage).map_err(|cause| {
            tracing::debug!(%cause, "peer refused");
            rustls::Error::General(cause.to_string())
        })?;
        if self.source.authorizes(&id) {
            Ok(())
        } else {
            tracing::debug!(%id, "peer not authorised");
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }
}

macro_rules! signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls12_signature(message, cert, signature, &self.provider.signature_verification_algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            cert: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls13_signature(message, cert, signature, &self.provider.signature_verification_algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.provider.signature_verification_algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for Side {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, webpki::KeyUsage::server_auth()).map(|()| ServerCertVerified::assertion())
    }

    signatures!();
}

impl ClientCertVerifier for Side {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Hints would have to be borrowed from bundles that change; an empty list asks for any certificate.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(leaf, intermediates, now, webpki::KeyUsage::client_auth()).map(|()| ClientCertVerified::assertion())
    }

    signatures!();
}

impl ResolvesServerCert for Side {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.source.svid().certified().clone())
    }
}

impl ResolvesClientCert for Side {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.source.svid().certified().clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}
