//! The chain of responsibility of Network Service Mesh.
//!
//! A chain carries two operations, *request* and *close*, through an ordered list of [`Element`]s. Each element
//! acts before or after `next`, or does not call it at all. The same trait serves endpoints, clients and
//! everything that is both (manager, forwarder). See the README for a picture and for how to write an element.
//!
//! * [`core`]: call, context, metadata, element, chain, error;
//! * [`elements`]: one module per element;
//! * [`remote`]: how a chain reaches the next process (gRPC) or the next chain (in process);
//! * [`stock`]: the endpoint and client chains in their documented order, with builders.

pub mod core;
pub mod elements;
pub mod events;
pub mod path;
pub mod registry;
pub mod remote;
pub mod serve;
pub mod stock;
pub mod token;

pub use crate::core::{
    Call, Candidates, Chain, ChainBuilder, ClientToken, CloseCall, Context, Element, ElementLayer, Error, FdChannel,
    FdTransceiver, Kept, Key, Metadata, Next, Operation, Outcome, Peer, Postponed, RequestCall, Side, Task, clock,
    unwind,
};
pub use crate::elements::begin::{Event, EventFactory, EventOptions, Fired};
pub use crate::remote::{Connector, EventStream, REMOTE, Remote, RemoteService};
pub use crate::stock::{Client, ClientBuilder, Endpoint, EndpointBuilder};
pub use nsm_proto::{
    connection::{
        Connection, ConnectionEvent, ConnectionEventType, Mechanism, MonitorScopeSelector, Path, PathSegment, State,
    },
    connectioncontext::{ConnectionContext, IpContext, PolicyRoute, Route},
    networkservice::NetworkServiceRequest,
};
