//! The newest identity of this process.

use crate::{
    Error, Identity, SpiffeId, Svid, Token, clock, tls,
    token::{Header, WireClaims},
    workload,
};
use rustls::{
    ClientConfig, ServerConfig,
    pki_types::{CertificateDer, UnixTime},
};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, task::AbortHandle, time::Instant};

/// Where the Workload API listens unless told otherwise.
pub const DEFAULT_ENDPOINT_SOCKET: &str = "unix:///run/spire/sockets/agent.sock";

/// Decides whether a peer, whose certificate is already known to be genuine, may talk to us.
pub type Authorizer = Arc<dyn Fn(&SpiffeId) -> bool + Send + Sync>;

/// A cached token is signed anew after this part of its life, so that the life it promises is nearly all left.
const TOKEN_CACHE_FRACTION: u32 = 20;
/// Audiences kept; more than any one process talks to, few enough to forget at once.
const TOKEN_CACHE_SIZE: usize = 1024;

/// The newest X.509-SVID and trust bundles of this process. Cheap to clone; the stream to the Workload API ends with the last clone.
#[derive(Clone)]
pub struct X509Source {
    shared: Arc<Shared>,
    authorizer: Option<Authorizer>,
}

struct Shared {
    identity: watch::Sender<Identity>,
    tokens: Mutex<HashMap<TokenKey, CachedToken>>,
    feed: Option<AbortHandle>,
}

type TokenKey = (Option<String>, Duration);

struct CachedToken {
    token: Token,
    signed: Instant,
    by: Arc<Svid>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(feed) = &self.feed {
            feed.abort();
        }
    }
}

impl fmt::Debug for X509Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("X509Source").field(&self.spiffe_id()).finish()
    }
}

impl X509Source {
    /// Connects to the Workload API (`unix:///path`) and waits for the first SVID. From then on the source never fails: while the
    /// agent is away the last SVID stays, and the stream is opened again with back-off.
    pub async fn connect(endpoint_socket: &str, timeout: Duration) -> Result<Self, Error> {
        let (first, sender, feed) = workload::subscribe(endpoint_socket, timeout).await?;
        tracing::info!(spiffe_id = %first.svid.id(), "identity received");
        Ok(Self {
            shared: Arc::new(Shared { identity: sender, tokens: Mutex::default(), feed: Some(feed) }),
            authorizer: None,
        })
    }

    /// A source that is fed by [`X509Source::update`] only.
    pub fn fixed(identity: Identity) -> Self {
        let shared = Shared { identity: watch::Sender::new(identity), tokens: Mutex::default(), feed: None };
        Self { shared: Arc::new(shared), authorizer: None }
    }

    /// Replaces the identity, as a rotation does. All clones see it.
    pub fn update(&self, identity: Identity) {
        self.shared.identity.send_replace(identity);
    }

    /// The same source with another rule about who may talk to us. The default is any workload of the own trust domain.
    #[must_use]
    pub fn with_authorizer(mut self, authorizer: impl Fn(&SpiffeId) -> bool + Send + Sync + 'static) -> Self {
        self.authorizer = Some(Arc::new(authorizer));
        self
    }

    /// The newest identity.
    pub fn identity(&self) -> Identity {
        self.shared.identity.borrow().clone()
    }

    /// The newest SVID.
    pub fn svid(&self) -> Arc<Svid> {
        self.shared.identity.borrow().svid.clone()
    }

    /// Own SPIFFE ID.
    pub fn spiffe_id(&self) -> String {
        self.shared.identity.borrow().svid.id().to_string()
    }

    /// Tells of each rotation.
    pub fn updates(&self) -> watch::Receiver<Identity> {
        self.shared.identity.subscribe()
    }

    pub(crate) fn authorizes(&self, id: &SpiffeId) -> bool {
        match &self.authorizer {
            Some(authorizer) => authorizer(id),
            None => self.shared.identity.borrow().svid.id().trust_domain() == id.trust_domain(),
        }
    }

    /// Whether a client that shows this certificate chain, and has its key, is let in now; whose it is.
    ///
    /// # Errors
    /// The certificate is none, names nobody, leads to no bundle, has ended, or its owner is not authorised.
    pub fn trusts_client(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<SpiffeId, Error> {
        let usage = webpki::KeyUsage::client_auth();
        let id = self.identity().bundles.verify(leaf, intermediates, UnixTime::now(), usage)?;
        match self.authorizes(&id) {
            true => Ok(id),
            false => Err(Error::Untrusted { id: id.to_string(), cause: "it is not authorised".into() }),
        }
    }

    /// Mutual TLS, server side: ALPN `h2`, client certificate demanded.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>, Error> {
        tls::server_config(self.clone()).map(Arc::new).map_err(|cause| Error::certificate("TLS server", cause))
    }

    /// Mutual TLS, client side: ALPN `h2`, no check of host names.
    pub fn client_config(&self) -> Result<Arc<ClientConfig>, Error> {
        tls::client_config(self.clone()).map(Arc::new).map_err(|cause| Error::certificate("TLS client", cause))
    }

    /// Signs a token. It ends after `max_lifetime` or with the own certificate, whichever is first. `audience` is the SPIFFE ID of the
    /// TLS peer, `None` without TLS.
    pub fn sign(&self, audience: Option<&str>, max_lifetime: Duration) -> Result<Token, Error> {
        sign(&self.svid(), audience, max_lifetime)
    }

    /// Like [`X509Source::sign`], but the same token serves for a small part of its life: signing is not per call.
    pub fn token(&self, audience: Option<&str>, max_lifetime: Duration) -> Result<Token, Error> {
        self.token_by(&self.svid(), audience, max_lifetime)
    }

    /// Like [`X509Source::token`], signed by an SVID that may have been rotated since: for a connection that was made with it.
    pub fn token_by(&self, svid: &Arc<Svid>, audience: Option<&str>, max_lifetime: Duration) -> Result<Token, Error> {
        let (key, now) = ((audience.map(str::to_owned), max_lifetime), Instant::now());
        let mut tokens = self.shared.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cached) = tokens.get(&key)
            && Arc::ptr_eq(&cached.by, svid)
            && now.duration_since(cached.signed) < max_lifetime / TOKEN_CACHE_FRACTION
        {
            return Ok(cached.token.clone());
        }
        if tokens.len() >= TOKEN_CACHE_SIZE {
            tokens.clear();
        }
        let token = sign(svid, audience, max_lifetime)?;
        tokens.insert(key, CachedToken { token: token.clone(), signed: now, by: svid.clone() });
        Ok(token)
    }
}

fn sign(svid: &Svid, audience: Option<&str>, max_lifetime: Duration) -> Result<Token, Error> {
    let key = svid.token_key().ok_or_else(|| Error::certificate("SVID private key", "tokens need ECDSA P-256"))?;
    let expires = (clock::now() + max_lifetime).min(svid.not_after());
    let seconds = expires.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let claims = WireClaims { aud: audience.as_slice(), exp: seconds, iat: None, sub: svid.id().as_str() };
    let jwt = key.sign(&Header::es256(None), &claims)?;
    Ok(Token { jwt, expires: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) })
}
