//! Trench, attractor, gateway, VIP, conduit, stream, flow and target as parsed, validated values. No I/O.
//!
//! [`Configuration::parse`] reads the ConfigMap layout of the original (seven keys) strictly and reports all faults at
//! once; [`Configuration::resolve`] leaves out what leads nowhere, with warnings; [`Configuration::to_config_map`] writes it; [`Configuration::to_nsp`] makes the `nsp.v1` messages; [`plan::warnings`] finds
//! what is allowed but has no effect.

mod check;
mod fault;
mod matching;
mod nsp;
mod parse;
pub mod plan;
mod read;
mod resolve;
mod values;
mod write;

pub use fault::{Fault, Faults};
pub use matching::{ByteMatch, PortRange, Protocol, canonical_subnet};
pub use nsp::NspLists;
pub use values::{
    Attractor, Bfd, BgpAuth, Conduit, Configuration, DEFAULT_MAX_TARGETS, Flow, Gateway, GatewayProtocol,
    MAX_TARGETS_LIMIT, PortNat, Stream, Trench, Vip,
};
