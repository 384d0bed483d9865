//! Everything the load balancer knows, collected from watches, in one value.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use meridio_proto::nsp::v1 as nsp;
use tokio::sync::watch;

/// A subnet that is reached through an NSM interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Subnet {
    /// The interface's own address and prefix length.
    pub(crate) net: IpNet,
    /// Interface index.
    pub(crate) index: u32,
    /// MTU of the interface.
    pub(crate) mtu: u32,
    /// The interface is one end of a veth pair whose other end is in another network namespace.
    pub(crate) direct: bool,
}

/// What the desired state is computed from. `None`: not told yet.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Inputs {
    pub(crate) vips: Option<Vec<nsp::Vip>>,
    pub(crate) conduits: Option<Vec<nsp::Conduit>>,
    pub(crate) streams: Option<Vec<nsp::Stream>>,
    pub(crate) flows: Option<Vec<nsp::Flow>>,
    pub(crate) targets: Option<Vec<nsp::Target>>,
    /// The collocated frontend has connectivity.
    pub(crate) frontend: Option<bool>,
    /// Subnets of NSM interfaces that are up.
    pub(crate) subnets: Option<BTreeSet<Subnet>>,
    /// NSM interfaces whose packets have no Ethernet header: nothing can be sent through them.
    pub(crate) unusable: BTreeSet<String>,
    /// Index of the external interface.
    pub(crate) external: Option<u32>,
    /// Whether an earlier process has left tables with targets in them, which forward until something else is told.
    pub(crate) kept: Option<bool>,
    /// Addresses of targets whose link-layer address cannot be resolved.
    pub(crate) unreachable: BTreeSet<IpAddr>,
    /// Next hops (interface, address) of targets whose link-layer address is another one than before, each with the number of its
    /// last change. No number comes twice: who remembers it sees each change, also one that came while it did something else.
    pub(crate) mac_changes: BTreeMap<(u32, IpAddr), u64>,
}

/// The shared inputs: whoever learns something changes them, the loops read them.
#[derive(Clone, Debug)]
pub(crate) struct Shared(Arc<watch::Sender<Inputs>>);

impl Shared {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Inputs::default())))
    }

    /// Changes the inputs; who waits is woken only if they differ afterwards.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Inputs)) {
        self.0.send_if_modified(|inputs| {
            let before = inputs.clone();
            change(inputs);
            *inputs != before
        });
    }

    /// Looks at the inputs without a copy; whoever changes them waits meanwhile.
    pub(crate) fn look<R>(&self, look: impl FnOnce(&Inputs) -> R) -> R {
        look(&self.0.borrow())
    }

    pub(crate) fn get(&self) -> Inputs {
        self.0.borrow().clone()
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Inputs> {
        self.0.subscribe()
    }
}
