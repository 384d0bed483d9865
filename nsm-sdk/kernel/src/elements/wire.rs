//! The link of a connection in a kernel forwarder: veth between two namespaces of the node, VXLAN where one side is on
//! another node.
//!
//! [`WireServer`] tells [`WireClient`] below it which mechanism was chosen with the caller; the client element makes the link when
//! the answer of the next hop says which mechanism it has. What is remembered of a connection does not keep the
//! pods' namespaces alive; after a restart of the forwarder links are found again by alias.

use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nsm_chain::{CloseCall, Connection, Element, Error, Key, Mechanism, Next, RequestCall, Side, unwind};

use super::vxlan::PORT;
use super::{
    KERNEL, LOCAL, NOOP, Open, REMOTE, VXLAN, address, failed, interface_name, names, netns_of, parameter, preference,
};
use crate::netlink::VxlanParameters;
use crate::wire::{self, Alias, End, Names, Wire};
use crate::{Netns, NetnsId, aliases};

/// Bytes that VXLAN adds, with Ethernet, UDP and IPv4 or IPv6 headers.
const OVERHEAD_V4: u32 = 50;
const OVERHEAD_V6: u32 = 70;
const SERVER: &str = "wire-server";
const CLIENT: &str = "wire";

/// The mechanism between the caller and this forwarder.
#[derive(Debug)]
struct Inward(Option<Mechanism>);

/// Stands below the server's `mechanisms`.
#[derive(Clone, Copy, Debug, Default)]
pub struct WireServer;

#[async_trait::async_trait]
impl Element for WireServer {
    fn name(&self) -> &'static str {
        SERVER
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let mechanism = call.connection().mechanism.clone();
        call.ctx.insert_extension(Inward(mechanism));
        next.request(call).await
    }

    async fn close(&self, mut call: CloseCall, next: Next) -> Result<(), Error> {
        let mechanism = call.message.mechanism.clone();
        call.ctx.insert_extension(Inward(mechanism));
        next.close(call).await
    }
}

/// One interface that was made or adopted, without a handle on its namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Known {
    netns: NetnsId,
    /// Id of the namespace as the node knows it.
    nsid: i32,
    name: String,
    index: u32,
    alias: String,
}

/// Offers the mechanisms that this node can do and makes the link.
#[derive(Debug)]
pub struct WireClient {
    node: Netns,
    tunnel_ip: Option<IpAddr>,
    key: Key<Vec<Known>>,
    /// What could not be deleted when its connection was closed: tried again whenever one is closed.
    left: Mutex<Vec<Known>>,
}

impl WireClient {
    /// `node` is the node's own namespace, where the underlay is; without a `tunnel_ip` there are no other nodes.
    pub fn new(node: Netns, tunnel_ip: Option<IpAddr>) -> Self {
        WireClient { node, tunnel_ip, key: Key::new(Side::Client), left: Mutex::default() }
    }

    /// The mechanisms to offer to the next hop: what can be joined with the caller's.
    /// `name` is the one that the endpoint's interface has already, if there is one.
    fn offer(&self, inward: &Mechanism, name: Option<String>, preferences: &mut Vec<Mechanism>) {
        let mut add = |class: &str, kind: &str, parameters: &[(&str, String)]| {
            if !preferences.iter().any(|p| p.r#type == kind) {
                preferences.push(preference(class, kind, parameters));
            }
        };
        if inward.r#type == NOOP {
            return add(LOCAL, NOOP, &[]);
        }
        add(LOCAL, KERNEL, name.map(|name| ("name", name)).as_slice());
        if let Some(ip) = self.tunnel_ip {
            add(REMOTE, VXLAN, &[("src_ip", ip.to_string()), ("src_port", PORT.to_string())]);
        }
    }

    /// The name of the endpoint's interface, where a forwarder that is gone has made the wire: the endpoint is asked to keep it.
    async fn found(&self, inward: &Mechanism, names: &Names) -> Option<String> {
        if inward.r#type != KERNEL {
            return None;
        }
        let netns = netns_of(inward).ok()?;
        // Without an answer the endpoint chooses, and the interface is renamed.
        wire::endpoint_name(&netns, interface_name(inward), names).await.ok()?
    }

    /// Which wire joins the two mechanisms of a connection; none where neither side wants to carry packets.
    fn wire(&self, inward: &Mechanism, connection: &Connection, names: &Names) -> Result<Option<Wire>, crate::Error> {
        let none = Mechanism::default();
        let outward = connection.mechanism.as_ref().unwrap_or(&none);
        let end = |mechanism: &Mechanism, alias: Alias| {
            let (netns, name) = (netns_of(mechanism)?, interface_name(mechanism).to_string());
            Ok::<_, crate::Error>(End { netns, name, alias })
        };
        match (inward.r#type.as_str(), outward.r#type.as_str()) {
            (NOOP, NOOP) => Ok(None),
            (KERNEL, KERNEL) => {
                Ok(Some(Wire::Veth { client: end(inward, names.client())?, endpoint: end(outward, names.endpoint())? }))
            }
            (KERNEL, VXLAN) => self.tunnel(end(inward, names.client())?, outward, ("src_ip", "dst_ip")).map(Some),
            (VXLAN, KERNEL) => self.tunnel(end(outward, names.endpoint())?, inward, ("dst_ip", "src_ip")).map(Some),
            (a, b) => Err(crate::Error::Invalid(format!("no wire joins mechanism {a:?} with {b:?}"))),
        }
    }

    fn tunnel(&self, end: End, mechanism: &Mechanism, (own, other): (&str, &str)) -> Result<Wire, crate::Error> {
        let bad = |_| crate::Error::Invalid(format!("VXLAN: vni {:?} is no number", parameter(mechanism, "vni")));
        let tunnel = VxlanParameters {
            vni: parameter(mechanism, "vni").parse().map_err(bad)?,
            local: address(mechanism, own)?,
            remote: address(mechanism, other)?,
            port: parameter(mechanism, "dst_port").parse().unwrap_or(PORT),
        };
        Ok(Wire::Vxlan { end, underlay: self.node.clone(), tunnel })
    }

    /// Largest packet that a tunnel carries without fragments: the MTU of the underlay interface without the headers around it.
    async fn tunnel_mtu(&self, local: IpAddr) -> Result<Option<u32>, crate::Error> {
        let netlink = self.node.netlink().await?;
        let Some(own) = netlink.addresses(None).await?.into_iter().find(|a| a.net.addr() == local) else {
            return Ok(None);
        };
        let overhead = if local.is_ipv6() { OVERHEAD_V6 } else { OVERHEAD_V4 };
        Ok(netlink.link_by_index(own.index).await?.map(|l| l.mtu.saturating_sub(overhead)))
    }

    async fn known(&self, end: &End, index: u32) -> Result<Known, crate::Error> {
        let nsid = self.node.netlink().await?.nsid_of(&end.netns).await?;
        Ok(Known { netns: end.netns.id(), nsid, name: end.name.clone(), index, alias: end.alias.text.clone() })
    }

    async fn delete(&self, interface: &Known) -> Result<(), crate::Error> {
        let netlink = self.node.netlink().await?;
        let removed = netlink.link_delete_in(interface.nsid, interface.index, &interface.alias).await;
        crate::error::ignore_missing(removed)?;
        aliases::removed(interface.netns, &interface.alias);
        Ok(())
    }

    /// Deletes interfaces of a connection that are somewhere else than they should be now.
    async fn remove(&self, known: &[Known]) -> Result<(), crate::Error> {
        let mut result = Ok(());
        for interface in known {
            result = result.and(self.delete(interface).await);
        }
        result
    }

    /// Deletes the interfaces of a closed connection, and what earlier ones have left. What fails is kept for the next time.
    async fn dismiss(&self, known: Vec<Known>) -> Result<(), crate::Error> {
        let left = std::mem::take(&mut *self.left());
        let mut result = Ok(());
        for (interface, own) in known.into_iter().map(|k| (k, true)).chain(left.into_iter().map(|k| (k, false))) {
            if let Err(error) = self.delete(&interface).await {
                tracing::warn!(interface = interface.name, netns = %interface.netns, %error, "not deleted, to be tried again");
                self.left().push(interface);
                result = result.and(if own { Err(error) } else { Ok(()) });
            }
        }
        result
    }

    fn left(&self) -> MutexGuard<'_, Vec<Known>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the wire; returns what exists then and, for a tunnel, its MTU.
    async fn establish(&self, wire: &Wire, before: &[Known]) -> Result<(Vec<Known>, Option<u32>), crate::Error> {
        let stays = |k: &&Known| wire_ends(wire).iter().any(|e| e.netns.id() == k.netns && e.alias.is(&k.alias));
        let moved: Vec<_> = before.iter().filter(|k| !stays(k)).cloned().collect();
        self.remove(&moved).await?;
        let made = wire::ensure(wire).await?;
        let indexes = [Some(made.first), made.second];
        let mut known = Vec::new();
        for (end, index) in wire_ends(wire).into_iter().zip(indexes.into_iter().flatten()) {
            let same = |k: &&Known| {
                (k.netns, k.index, &k.name) == (end.netns.id(), index, &end.name) && end.alias.is(&k.alias)
            };
            known.push(match before.iter().find(same) {
                Some(before) => before.clone(),
                None => self.known(end, index).await?,
            });
        }
        if made.created || !moved.is_empty() {
            let end = |k: &Known| format!("{} in {}", k.name, k.netns);
            let ends: Vec<_> = known.iter().map(end).collect();
            tracing::info!(alias = known.first().map_or("", |k| k.alias.as_str()), ?ends, "wire made");
        }
        let mtu = match wire {
            Wire::Veth { .. } => None,
            Wire::Vxlan { tunnel, .. } => self.tunnel_mtu(tunnel.local).await?,
        };
        Ok((known, mtu))
    }
}

fn wire_ends(wire: &Wire) -> Vec<&End> {
    match wire {
        Wire::Veth { client, endpoint } => vec![client, endpoint],
        Wire::Vxlan { end, .. } => vec![end],
    }
}

/// Caps the MTU that both ends will be given.
fn cap_mtu(connection: &mut Connection, limit: Option<u32>) {
    let Some(limit) = limit else { return };
    let context = connection.context.get_or_insert_default();
    if context.mtu == 0 || context.mtu > limit {
        context.mtu = limit;
    }
}

#[async_trait::async_trait]
impl Element for WireClient {
    fn name(&self) -> &'static str {
        CLIENT
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let (postponed, id) = (call.ctx.postpone(), call.id().to_owned());
        let metadata = call.ctx.metadata(CLIENT, &id)?.clone();
        let inward = call.ctx.extension::<Inward>().and_then(|i| i.0.clone()).unwrap_or_default();
        let before = metadata.get(&self.key);
        let names = names(&call.connection()).anew(before.is_none());
        let name = match &before {
            Some(_) => None,
            None => self.found(&inward, &names).await,
        };
        let before = before.unwrap_or_default();
        self.offer(&inward, name, &mut call.message.mechanism_preferences);
        let open = call.ctx.extension::<Open>().unwrap_or_default();
        let mut connection = next.request(call).await?;
        let result = match self.wire(&inward, &connection, &names) {
            Ok(Some(wire)) => {
                wire_ends(&wire).iter().for_each(|end| open.hold(&end.netns));
                self.establish(&wire, &before).await
            }
            Ok(None) => self.remove(&before).await.map(|()| (Vec::new(), None)),
            Err(error) => Err(error),
        };
        match result {
            Ok((known, mtu)) => {
                metadata.insert(&self.key, known);
                cap_mtu(&mut connection, mtu);
                Ok(connection)
            }
            Err(cause) => {
                let error = failed(CLIENT, id, "link cannot be made", cause);
                if !before.is_empty() {
                    return Err(error);
                }
                Err(unwind(&next, connection, &postponed, error).await)
            }
        }
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let known = call.ctx.metadata(CLIENT, call.id())?.remove(&self.key).unwrap_or_default();
        let id = call.id().to_owned();
        let forgotten = known.is_empty();
        let mut result = self.dismiss(known).await;
        if forgotten {
            // Made by a forwarder that is gone: the mechanisms say where to look.
            let names = names(&call.message);
            let inward = call.ctx.extension::<Inward>().and_then(|i| i.0.clone());
            let places = [
                (inward.clone(), names.client().text),
                (inward, names.former()),
                (call.message.mechanism.clone(), names.endpoint().text),
            ];
            for (mechanism, alias) in places {
                let kernel = mechanism.filter(|m| m.r#type == KERNEL);
                if let Some(Ok(netns)) = kernel.as_ref().map(netns_of) {
                    result = result.and(wire::remove_by_alias(&netns, &alias).await.map(|_| ()));
                }
            }
        }
        next.close(call).await?;
        result.map_err(|cause| failed(CLIENT, id, "link cannot be removed", cause))
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
