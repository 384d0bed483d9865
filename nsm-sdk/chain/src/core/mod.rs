//! What every element is made of.

mod call;
mod chain;
pub mod clock;
mod context;
mod element;
mod error;
mod fd;
mod kept;
mod metadata;
mod task;

pub use call::{Call, CloseCall, Operation, Outcome, RequestCall};
pub use chain::{Chain, ChainBuilder};
pub use context::{Candidates, ClientToken, Context, Extensions, Postponed};
pub use element::{Element, ElementLayer, Next, unwind};
pub use error::Error;
pub(crate) use fd::inode_of;
pub use fd::{FdChannel, FdTransceiver};
pub use kept::Kept;
pub use metadata::{Key, Metadata, Side};
pub use nsm_identity::Peer;
pub use task::Task;

#[cfg(test)]
pub(crate) mod testing;
