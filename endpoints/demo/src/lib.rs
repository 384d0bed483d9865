//! Topologies in namespaces: the demo, its traffic, its events and its report.
