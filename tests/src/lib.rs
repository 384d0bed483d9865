//! End-to-end scenarios, conformance and benches.
