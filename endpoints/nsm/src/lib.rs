//! The embedded Network Service Mesh of one node: registry (optional), manager and kernel forwarder in one process.
//!
//! Killed and started again, it finds everything: the registry's entries in its store, interfaces by their alias, the
//! forwarder and endpoint of a connection on the connection's path, local endpoints by their sockets, which it has noted.

mod run;
mod settings;

pub use run::run;
pub use settings::Settings;
