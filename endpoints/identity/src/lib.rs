//! Development issuer of SPIFFE identities: the Workload API without SPIRE.
