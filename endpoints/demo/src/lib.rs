//! Topologies in namespaces: the demo, its traffic, its events and its report.

pub mod cleanup;
pub mod cluster;
pub mod config;
pub mod fabric;
pub mod namespace;
pub mod process;
pub mod topology;
pub mod traffic;
