//! Everything the proxy knows, collected from watches, in one value.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tokio::sync::watch;

/// One load balancer, under the name of its NSM endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Balancer {
    /// Its addresses on the conduit: next hops of replies, at most one per family.
    pub(crate) addresses: BTreeSet<IpAddr>,
    /// Interface towards it, once there is a connection.
    pub(crate) interface: Option<String>,
    /// Its endpoint is in the registry: it has a gateway.
    pub(crate) registered: bool,
    /// NSM does not report the connection DOWN.
    pub(crate) up: bool,
}

/// What the desired state is computed from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inputs {
    /// VIPs of the trench; `None` until the NSP has told them for the first time.
    pub(crate) vips: Option<BTreeSet<IpNet>>,
    /// Addresses of the bridge with the prefix length of the node's prefix; the targets' gateways.
    pub(crate) bridge: BTreeSet<IpNet>,
    /// Load balancers by endpoint name.
    pub(crate) balancers: BTreeMap<String, Balancer>,
    /// Interface towards each target that this proxy serves, and the target's addresses, by connection id.
    pub(crate) targets: BTreeMap<String, (String, BTreeSet<IpAddr>)>,
    /// Next hops found in the table at start, in use until all load balancers are known by name, or long enough.
    pub(crate) inherited: BTreeSet<IpAddr>,
    /// Addresses that answer probes.
    pub(crate) answering: BTreeSet<IpAddr>,
    /// Addresses that do not.
    pub(crate) silent: BTreeSet<IpAddr>,
    /// Interfaces of connections, to be ports of the bridge.
    pub(crate) ports: BTreeSet<String>,
    /// Who will vouch by name for what was found at start has done so.
    pub(crate) settled: bool,
}

impl Inputs {
    /// Addresses that are or may become next hops: those to probe.
    pub(crate) fn probed(&self) -> BTreeSet<IpAddr> {
        let known = self.balancers.values().flat_map(|balancer| balancer.addresses.iter().copied());
        known.chain(self.inherited.iter().copied()).collect()
    }

    /// The addresses of whoever is behind the port `name`.
    pub(crate) fn behind(&self, name: &str) -> Option<&BTreeSet<IpAddr>> {
        let mut balancers = self.balancers.values();
        let balancer = balancers.find(|balancer| balancer.interface.as_deref() == Some(name));
        let target = || self.targets.values().find(|(interface, _)| interface == name);
        balancer.map(|balancer| &balancer.addresses).or_else(|| target().map(|(_, addresses)| addresses))
    }

    /// Whether there is a connection to every load balancer in the registry, and to one at least.
    pub(crate) fn all_connected(&self) -> bool {
        let mut registered = self.balancers.values().filter(|balancer| balancer.registered).peekable();
        registered.peek().is_some() && registered.all(|balancer| balancer.interface.is_some())
    }

    /// Takes down what the probes say of an address.
    pub(crate) fn judge(&mut self, address: IpAddr, answering: bool) {
        if answering {
            self.silent.remove(&address);
            self.answering.insert(address);
        } else {
            self.answering.remove(&address);
            self.silent.insert(address);
        }
        self.outgrow();
    }

    /// Forgets what was found at start and is known by name now, or is silent where one that is known by name answers. Until there is
    /// such a one, silence proves nothing: a process that has just begun may be too busy to hear answers, and without its next hops the
    /// data path is broken for certain.
    pub(crate) fn outgrow(&mut self) {
        let named: BTreeSet<IpAddr> = self.balancers.values().flat_map(|b| b.addresses.iter().copied()).collect();
        let replaced = |address: &IpAddr| {
            let same = |other: &&IpAddr| other.is_ipv4() == address.is_ipv4();
            self.silent.contains(address) && named.intersection(&self.answering).any(|other| same(&other))
        };
        self.inherited.retain(|address| !named.contains(address) && !replaced(address));
    }
}

/// The shared inputs: whoever learns something changes them, the reconcile loop reads them.
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

    /// What `of` says of the inputs as they are now.
    pub(crate) fn look<T>(&self, of: impl FnOnce(&Inputs) -> T) -> T {
        of(&self.0.borrow())
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Inputs> {
        self.0.subscribe()
    }
}
