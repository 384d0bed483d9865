//! Chain elements that do the kernel work of a connection.
//!
//! Where each stands in a kernel forwarder (top to bottom as a request travels; all of them work on the way back):
//!
//! ```text
//! endpoint chain (updatepath begin updatetoken authorize metadata timeout monitor trimpath)
//!   recvfd(S) discover roundrobin
//!   context::ServerContext            addresses, routes, policies, MTU in the client's namespace
//!   mechanisms{ KERNEL: null, NOOP: null, VXLAN: vxlan::VxlanServer }
//!   (a node's forwarder notes the client's namespace here, for what keeps connections while they are alive)
//!   wire::WireServer                  tells the wire which mechanism the client's side has
//!   connect(S)[ client chain (updatepath begin metadata ... dial)
//!     mechanismtranslation
//!     (it notes the endpoint's namespace here)
//!     context::ClientContext          addresses and routes in the endpoint's namespace
//!     wire::WireClient                offers KERNEL and VXLAN, makes the link
//!     filtermechanisms recvfd(C) sendfd(C)
//!     authorize trimpath connect ]
//! ```
//!
//! There is no `sendfd(S)`: the namespace in the answer is the one that the caller has sent.
//!
//! [`liveness::KernelLiveness`] asks the data path of a connection, for `heal` and for what would close a connection by expiry.
//! An endpoint or client that wants to know its interfaces has [`interface_monitor::InterfaceMonitor`] below `mechanisms`.

pub mod context;
pub mod interface_monitor;
pub mod liveness;
pub mod vxlan;
pub mod wire;

use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use nsm_chain::{Connection, Mechanism, path};

use crate::wire::Names;
use crate::{Error, Netns};

/// Mechanism type of interfaces in a namespace of this node.
pub const KERNEL: &str = "KERNEL";
/// Mechanism type of tunnels to another node.
pub const VXLAN: &str = "VXLAN";
/// Mechanism type of connections that carry no packets: path, context and monitoring only.
pub const NOOP: &str = "NOOP";
/// Mechanism class of this node.
pub const LOCAL: &str = "LOCAL";
/// Mechanism class of other nodes.
pub const REMOTE: &str = "REMOTE";

pub(crate) fn parameter<'a>(mechanism: &'a Mechanism, key: &str) -> &'a str {
    mechanism.parameters.get(key).map_or("", String::as_str)
}

/// Name of the interface of a KERNEL mechanism, cut to what an interface can have.
pub fn interface_name(mechanism: &Mechanism) -> &str {
    let name = parameter(mechanism, "name");
    let mut end = name.len().min(crate::wire::NAME_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

/// Opens the namespace that a KERNEL mechanism names.
pub fn netns_of(mechanism: &Mechanism) -> Result<Netns, Error> {
    Netns::from_url(parameter(mechanism, "inodeURL"))
}

/// Namespaces that one operation works in: open until it is done, so that each element does not open them, and a netlink socket in
/// them, anew.
#[derive(Debug, Default)]
pub(crate) struct Open(Mutex<Vec<Netns>>);

impl Open {
    pub(crate) fn hold(&self, netns: &Netns) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(netns.clone());
    }
}

/// True for a KERNEL mechanism without VLAN: an interface whose addresses and routes are ours to set.
pub(crate) fn configurable(mechanism: Option<&Mechanism>) -> Option<&Mechanism> {
    mechanism.filter(|m| m.r#type == KERNEL && matches!(parameter(m, "vlan"), "" | "0"))
}

/// The id that names a connection on all its hops: that of the first path segment.
pub(crate) fn first_id(connection: &Connection) -> &str {
    let first = connection.path.as_ref().and_then(|p| p.path_segments.first());
    first.map(|s| s.id.as_str()).filter(|id| !id.is_empty()).unwrap_or(&connection.id)
}

/// What the interfaces of a connection are called in this forwarder, whose own segment is the current one of the path.
pub(crate) fn names(connection: &Connection) -> Names {
    let first = first_id(connection);
    // Between whoever has asked for it and the forwarder is the manager.
    let asker = path::segment(connection, -2).map_or("", |segment| &segment.id);
    Names::new(&connection.id, if asker.is_empty() { first } else { asker }, first)
}

/// The failure of kernel work for a connection.
pub(crate) fn failed(
    element: &'static str,
    id: impl Into<String>,
    what: impl Into<String>,
    cause: crate::Error,
) -> nsm_chain::Error {
    let code = cause.code();
    nsm_chain::Error::new(element, id, what).with_cause(cause).with_code(code)
}

/// A KERNEL or VXLAN mechanism for use as a preference.
pub(crate) fn preference(class: &str, kind: &str, parameters: &[(&str, String)]) -> Mechanism {
    let parameters = parameters.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
    Mechanism { cls: class.into(), r#type: kind.into(), parameters }
}

pub(crate) fn address(mechanism: &Mechanism, key: &str) -> Result<IpAddr, Error> {
    let text = parameter(mechanism, key);
    text.parse().map_err(|_| Error::Invalid(format!("mechanism {}: {key} {text:?} is no address", mechanism.r#type)))
}
