//! The load-balancing engine.
//!
//! * [`config`]: what a user wants, as values; [`classifier`] and [`table`] compile it.
//! * [`Engine`]: eBPF programs, pinned maps, atomic switches, counters.
//! * [`Image`]: the same tables in memory, for questions about packets without a kernel.
//! * [`reference`]: a slow, obvious model that tests compare both with.

pub mod classifier;
pub mod config;
mod engine;
mod error;
mod image;
mod inspect;
mod kernel;
pub mod reference;
mod sys;
pub mod table;

pub use config::{Config, Flow, Nat, Protocol, Stream, Target, Targets};
pub use engine::{Engine, MARK_FLAG, MARK_MASK, Settings};
pub use error::Error;
pub use image::{Bytes, Image};
pub use inspect::Hits;
pub use kernel::Options;
pub use meridio_decision::layout::{Counter, TargetEntry};
pub use meridio_decision::{Decision, ETH_IPV4, ETH_IPV6, Reason, Verdict};
pub use sys::TestRun;
