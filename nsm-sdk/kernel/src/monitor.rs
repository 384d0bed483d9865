//! What changes in a namespace, as it happens.
//!
//! A monitor that falls behind loses messages, and the kernel says so: then [`Event::Resync`] tells the reader to read
//! everything anew. What was there before the monitor is not told: a reader begins by reading it. Indexes are given again to other
//! interfaces; names are not unique over time either.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use tokio::sync::watch;

use crate::netlink::{Link, Neighbour, Route, parse_link, parse_neighbour, parse_route};
use crate::{Error, Netns};

/// Receive buffer of a monitor's socket in bytes.
const BUFFER: u32 = 1 << 20;
/// Pause before a monitor that failed is opened again.
const REOPEN: Duration = Duration::from_millis(200);

/// What to listen to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topic {
    /// Interfaces: made, changed (up, carrier, bridge, name), deleted.
    Links,
    /// Routes of both families, all tables.
    Routes,
    /// Neighbour entries of both families.
    Neighbours,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Messages were lost: read everything anew.
    Resync,
    /// An interface is new or changed.
    Link(Link),
    /// An interface is gone.
    LinkGone(Link),
    /// A route was set. A next hop whose interface went down is announced for IPv6 only: listen to links as well.
    Route(Route),
    /// A route is gone.
    RouteGone(Route),
    /// A neighbour entry is new or changed.
    Neighbour(Neighbour),
    /// A neighbour entry is gone.
    NeighbourGone(Neighbour),
}

type Messages = std::pin::Pin<
    Box<dyn Stream<Item = (NetlinkMessage<RouteNetlinkMessage>, rtnetlink::sys::SocketAddr)> + Send + Sync>,
>;

/// An endless stream of changes of one namespace. It keeps the namespace alive.
pub struct Monitor {
    netns: Netns,
    groups: Vec<MulticastGroup>,
    messages: Option<Messages>,
}

fn groups(topics: &[Topic]) -> Vec<MulticastGroup> {
    let of = |topic: &Topic| match topic {
        Topic::Links => vec![MulticastGroup::Link],
        Topic::Routes => vec![MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route],
        Topic::Neighbours => vec![MulticastGroup::Neigh],
    };
    topics.iter().flat_map(of).collect()
}

fn open_here(groups: &[MulticastGroup]) -> Result<Messages, Error> {
    let (mut connection, _, messages) =
        rtnetlink::new_multicast_connection(groups).map_err(|e| Error::io("open netlink monitor", e))?;
    // A larger buffer loses less; a refused one is no reason to go without.
    let _ = connection.socket_mut().socket_ref_for_buffer().set_rx_buf_sz(BUFFER);
    tokio::spawn(connection);
    Ok(Box::pin(messages))
}

trait BufferOf {
    fn socket_ref_for_buffer(&self) -> &rtnetlink::sys::Socket;
}

impl BufferOf for rtnetlink::sys::TokioSocket {
    fn socket_ref_for_buffer(&self) -> &rtnetlink::sys::Socket {
        rtnetlink::sys::AsyncSocket::socket_ref(self)
    }
}

fn event_of(message: NetlinkMessage<RouteNetlinkMessage>) -> Option<Event> {
    let inner = match message.payload {
        NetlinkPayload::Overrun(_) => return Some(Event::Resync),
        NetlinkPayload::InnerMessage(inner) => inner,
        _ => return None,
    };
    match &inner {
        // A port that leaves its bridge is announced as a deleted link of family BRIDGE: it still exists.
        RouteNetlinkMessage::NewLink(l) | RouteNetlinkMessage::DelLink(l)
            if l.header.interface_family == AddressFamily::Bridge =>
        {
            None
        }
        RouteNetlinkMessage::NewLink(l) => parse_link(l).map(Event::Link),
        RouteNetlinkMessage::DelLink(l) => parse_link(l).map(Event::LinkGone),
        RouteNetlinkMessage::NewRoute(r) => parse_route(r).map(Event::Route),
        RouteNetlinkMessage::DelRoute(r) => parse_route(r).map(Event::RouteGone),
        RouteNetlinkMessage::NewNeighbour(n) => parse_neighbour(n).map(Event::Neighbour),
        RouteNetlinkMessage::DelNeighbour(n) => parse_neighbour(n).map(Event::NeighbourGone),
        _ => None,
    }
}

impl Monitor {
    /// Starts to listen; changes from now on are seen.
    pub async fn open(netns: &Netns, topics: &[Topic]) -> Result<Self, Error> {
        let mut monitor = Monitor { netns: netns.clone(), groups: groups(topics), messages: None };
        monitor.messages = Some(monitor.socket().await?);
        Ok(monitor)
    }

    async fn socket(&self) -> Result<Messages, Error> {
        let groups = self.groups.clone();
        self.netns.run(move || open_here(&groups)).await?
    }

    /// The next change. Never ends: a monitor whose socket fails opens another one and says [`Event::Resync`]. Safe to cancel.
    pub async fn next(&mut self) -> Event {
        loop {
            let Some(messages) = &mut self.messages else {
                match self.socket().await {
                    Ok(messages) => {
                        self.messages = Some(messages);
                        return Event::Resync;
                    }
                    Err(error) => tracing::warn!(netns = ?self.netns, %error, "netlink monitor cannot be opened"),
                }
                tokio::time::sleep(REOPEN).await;
                continue;
            };
            match messages.next().await {
                Some((message, _)) => {
                    if let Some(event) = event_of(message) {
                        return event;
                    }
                }
                None => self.messages = None,
            }
        }
    }
}

/// All interfaces of a namespace by index, kept up to date. The task behind it ends with the last receiver.
pub async fn watch_links(netns: &Netns) -> Result<watch::Receiver<Arc<BTreeMap<u32, Link>>>, Error> {
    let mut monitor = Monitor::open(netns, &[Topic::Links]).await?;
    let mut links = read_links(netns).await?;
    let (tx, rx) = watch::channel(Arc::new(links.clone()));
    let netns = netns.clone();
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                event = monitor.next() => event,
                () = tx.closed() => return,
            };
            match event {
                Event::Link(link) => {
                    links.insert(link.index, link);
                }
                Event::LinkGone(link) => {
                    links.remove(&link.index);
                }
                Event::Resync => match read_links(&netns).await {
                    Ok(all) => links = all,
                    Err(error) => tracing::warn!(?netns, %error, "interfaces cannot be read"),
                },
                _ => continue,
            }
            tx.send_replace(Arc::new(links.clone()));
        }
    });
    Ok(rx)
}

async fn read_links(netns: &Netns) -> Result<BTreeMap<u32, Link>, Error> {
    let links = netns.netlink().await?.links().await?;
    Ok(links.into_iter().map(|l| (l.index, l)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{LinkChange, VethEnd, mac_from_seed};

    async fn until(
        rx: &mut watch::Receiver<Arc<BTreeMap<u32, Link>>>,
        what: &str,
        f: impl Fn(&Link) -> bool,
        want: bool,
    ) {
        let wait = rx.wait_for(|links| links.values().any(&f) == want);
        tokio::time::timeout(Duration::from_secs(5), wait).await.expect(what).unwrap();
    }

    #[tokio::test]
    async fn links_are_followed_through_bridge_carrier_and_deletion() {
        let ns = Netns::anonymous().unwrap();
        let netlink = ns.netlink().await.unwrap();
        let mut rx = watch_links(&ns).await.unwrap();
        let end = |name: &str| VethEnd { netns: ns.clone(), name: name.into(), mac: mac_from_seed(name) };
        netlink.bridge_create("br", mac_from_seed("br")).await.unwrap();
        netlink.veth_create(&end("a"), &end("b"), None).await.unwrap();
        let index = |name: &'static str| async move { netlink.link_by_name(name).await.unwrap().unwrap().index };
        let (a, b, bridge) = (index("a").await, index("b").await, index("br").await);
        netlink
            .link_change(a, &LinkChange { up: Some(true), master: Some(bridge), ..Default::default() })
            .await
            .unwrap();
        netlink.link_up(b).await.unwrap();
        until(&mut rx, "port", |l| l.name == "a" && l.master == Some(bridge) && l.running, true).await;
        netlink.link_change(b, &LinkChange { up: Some(false), ..Default::default() }).await.unwrap();
        until(&mut rx, "carrier", |l| l.name == "a" && !l.running, true).await;
        netlink.link_change(a, &LinkChange { master: Some(0), ..Default::default() }).await.unwrap();
        until(&mut rx, "left the bridge", |l| l.name == "a" && l.master.is_none(), true).await;
        netlink.link_delete(a).await.unwrap();
        until(&mut rx, "deleted", |l| l.name == "a", false).await;
    }
}
