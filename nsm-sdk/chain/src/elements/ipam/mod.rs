//! Addresses for connections.
//!
//! * [`PointToPoint`]: a pair of host addresses for each connection; several of them in a [`Chain`](crate::Chain) make
//!   a group, one pair from each (IPv4 and IPv6, say);
//! * [`SinglePoint`]: one address with the prefix's mask for each client;
//! * [`Strict`]: above them, drops addresses that are not the endpoint's or that another connection has.

mod point2point;
mod pool;
mod singlepoint;
mod strict;

pub use point2point::PointToPoint;
pub use singlepoint::SinglePoint;
pub use strict::Strict;

use crate::{Connection, IpContext};

/// The addresses of a connection, made if absent.
fn ip_context(connection: &mut Connection) -> &mut IpContext {
    connection.context.get_or_insert_default().ip_context.get_or_insert_default()
}
