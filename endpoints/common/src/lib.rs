//! What every component shares: settings, logs, health, shutdown, dialling and serving.
//!
//! A component is `Settings` (clap, validated at once) and `run(settings, stop)`. The binary calls
//! [`logging::init`] and [`shutdown::token`] once; everything else is called by the component itself.

mod backoff;
mod duration;
mod empty_hold;
mod error;
pub mod grpc;
pub mod health;
pub mod logging;
pub mod memory;
mod metrics;
pub mod names;
pub mod shutdown;
#[cfg(feature = "storage")]
pub mod storage;
pub mod sysctl;
mod watch;

pub use backoff::Backoff;
pub use duration::GoDuration;
pub use empty_hold::{EmptyHold, Word};
pub use error::Error;
pub use grpc::{connect, serve};
pub use health::{Health, Probe};
pub use metrics::MetricsServer;
pub use watch::{WatchEvent, watch_events, watch_loop};

pub use nsm_transport::raise_open_files;
