//! End-to-end scenarios, conformance and benches.
//!
//! Scenarios need root and the `meridio` binary of the same profile (`cargo build -p meridio`). They share the demo's harness, run one
//! at a time, and print what they measured.

pub mod leaks;
pub mod mesh;
pub mod peers;
pub mod scene;
