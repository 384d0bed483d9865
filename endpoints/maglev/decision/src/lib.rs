//! The packet decision: parse, classify, hash, row, target; for eBPF and for the host.
