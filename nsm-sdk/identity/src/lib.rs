//! SPIFFE identities: X.509 source, mTLS configurations, path tokens.
