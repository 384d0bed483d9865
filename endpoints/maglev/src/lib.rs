//! The load-balancing engine.
//!
//! * [`config`]: what a user wants, as values; [`classifier`] and [`table`] compile it.
//! * [`Engine`]: eBPF programs, pinned maps, atomic switches, counters.
//! * [`Image`]: the same tables in memory, for questions about packets without a kernel.
//! * [`Live`]: counters of an engine in another process; [`Image::of`] its tables; [`Tracer`] its packets.
//! * [`reference`]: a slow, obvious model that tests compare both with.

mod adopt;
pub mod classifier;
pub mod config;
mod config_entry;
mod counters;
mod detour;
mod engine;
mod error;
mod explain;
mod flat;
mod gone;
mod grace;
mod image;
mod inspect;
mod kernel;
mod live;
mod maps;
mod owner;
mod place;
mod qdisc;
mod quote;
pub mod reference;
mod snapshot;
mod steps;
mod sys;
pub mod table;
mod tap;
mod trace;
mod write;

pub use config::{Config, Flow, Nat, Protocol, Stream, Target, Targets};
pub use engine::{Engine, MARK_FLAG, MARK_MASK, Settings};
pub use error::Error;
pub use explain::{Candidate, Chosen, Explanation, Headers, Standing, StreamState};
pub use gone::remove_gone;
pub use image::{Bytes, Image};
pub use kernel::Options;
pub use live::{Counters, Hits, Live, StreamHits};
pub use meridio_decision::layout::{Counter, DEFAULT_CHUNKS, LAYOUT_VERSION, TargetEntry, TraceEvent, trace_flag};
pub use meridio_decision::packet::Kind;
pub use meridio_decision::{Decision, ETH_IPV4, ETH_IPV6, NONE, Reason, Verdict};
pub use owner::{own_directory, vacant};
pub use sys::{TestRun, monotonic};
pub use trace::{Filter, Tracer};
