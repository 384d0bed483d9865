//! What tests of this crate share: nodes made of nameless namespaces, and a bulk transfer.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::Netns;
use crate::netlink::{VethEnd, mac_from_seed};

/// Bytes of a bulk transfer: large enough for segmentation offload and several windows.
pub(crate) const TRANSFER: usize = 20 << 20;

/// Two namespaces joined by a veth pair with these addresses.
pub(crate) async fn joined_nodes(a: IpAddr, b: IpAddr) -> (Netns, Netns) {
    let (node_a, node_b) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
    let end = |n: &Netns, seed: &str| VethEnd { netns: n.clone(), name: "eth0".into(), mac: mac_from_seed(seed) };
    node_a.netlink().await.unwrap().veth_create(&end(&node_a, "a"), &end(&node_b, "b"), None).await.unwrap();
    for (node, ip) in [(&node_a, a), (&node_b, b)] {
        let netlink = node.netlink().await.unwrap();
        let index = netlink.link_by_name("eth0").await.unwrap().unwrap().index;
        netlink.link_up(index).await.unwrap();
        let length = if ip.is_ipv6() { 64 } else { 24 };
        netlink.address_replace(index, IpNet::new(ip, length).unwrap()).await.unwrap();
    }
    (node_a, node_b)
}

/// Sends [`TRANSFER`] bytes by TCP; returns how many arrived.
pub(crate) async fn transfer(from: &Netns, to: &Netns, ip: IpAddr) -> usize {
    let address = SocketAddr::new(ip, 7007);
    let listener = to.run(move || std::net::TcpListener::bind(address)).await.unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = TcpListener::from_std(listener).unwrap();
    let timeout = Duration::from_secs(5);
    let connect = move || std::net::TcpStream::connect_timeout(&address, timeout);
    let stream = from.run(connect).await.unwrap().unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut sender = TcpStream::from_std(stream).unwrap();
    let sending = tokio::spawn(async move { sender.write_all(&vec![7; TRANSFER]).await });
    let (mut receiver, _) = listener.accept().await.unwrap();
    let mut buffer = Vec::new();
    tokio::time::timeout(Duration::from_secs(20), receiver.read_to_end(&mut buffer)).await.unwrap().unwrap();
    sending.await.unwrap().unwrap();
    buffer.len()
}
