//! Linux kernel side of network services: namespaces, links, addresses, routes, rules, neighbours.
//!
//! Everything that changes the kernel here follows one pattern: a desired state, a pure function that compares it with what was
//! read back and gives a plan, and a thin loop that applies the plan until nothing is left to do. Applying the same desired
//! state twice writes nothing the second time.

mod aliases;
pub mod config;
pub mod elements;
pub mod error;
pub mod monitor;
pub mod netlink;
pub mod netns;
pub mod ping;
pub mod sysctl;
#[cfg(test)]
mod testing;
pub mod wire;

pub use error::Error;
pub use netlink::{Link, Mac, Netlink, NextHop, Route, RouteKind, Rule};
pub use netns::{Netns, NetnsId};
