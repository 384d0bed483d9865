//! The load-balancing engine: table and classifier compiler, eBPF program and loader, reference model.
