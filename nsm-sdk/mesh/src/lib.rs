//! Stock chains of a node: manager and kernel forwarder.
//!
//! ```text
//!  client --unix socket--> manager --in process--> forwarder --unix socket--> endpoint
//!                             |                        |
//!                             |                        +--tcp--> manager of another node --> its forwarder --> endpoint
//!                             +-- registry (upstream, embedded, or built in)
//! ```
//!
//! Both are real chains with path segments of their own: 4 segments on one node, 6 across nodes. [`Node`] builds them;
//! [`Forwarder`] is the forwarder by itself, for a manager in another process.

pub mod alive;
pub mod excluded;
pub mod find;
mod node;

pub use node::{Forwarder, Node, NodeConfig, NodeError};
