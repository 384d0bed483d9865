//! Per-node bridge between the targets of a conduit and its load balancers.

mod bridge;
mod inputs;
mod ipam;
mod ipcontext;
mod probe;
mod routing;
mod settings;

pub use settings::Settings;
