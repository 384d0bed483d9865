//! The UDP side: an answer comes from the very address that was asked, which a wildcard socket has to be told
//! (IP_PKTINFO; RFC 3542 for IPv6).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

/// The largest datagram that is answered, in bytes of UDP payload.
const LARGEST: usize = 65_507;
/// Receive buffer asked for, in bytes: bursts from a load generator should not be lost here.
const RECEIVE_BUFFER: usize = 4 << 20;

/// One socket per family, so that each has its own kind of packet information.
pub(crate) fn bind(port: u16) -> io::Result<[UdpSocket; 2]> {
    let v4 = socket(Domain::IPV4, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)))?;
    setsockopt(&v4, sockopt::Ipv4PacketInfo, &true)?;
    let v6 = socket(Domain::IPV6, SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
    setsockopt(&v6, sockopt::Ipv6RecvPacketInfo, &true)?;
    Ok([UdpSocket::from_std(v4.into())?, UdpSocket::from_std(v6.into())?])
}

fn socket(domain: Domain, address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
    if domain == Domain::IPV6 {
        socket.set_only_v6(true)?;
    }
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Answers datagrams until `stop`.
pub(crate) async fn serve(sockets: [UdpSocket; 2], name: String, stop: CancellationToken) {
    let prefix = format!("{name} ");
    let [v4, v6] = sockets;
    tokio::join!(answer_all(v4, &prefix, &stop), answer_all(v6, &prefix, &stop));
}

async fn answer_all(socket: UdpSocket, prefix: &str, stop: &CancellationToken) {
    let mut buffer = vec![0; LARGEST];
    loop {
        let received = tokio::select! {
            () = stop.cancelled() => return,
            received = socket.async_io(Interest::READABLE, || receive(&socket, &mut buffer)) => received,
        };
        // Errors here are ICMP answers to earlier datagrams, or a full queue: the next datagram is what matters.
        if let Ok(datagram) = received {
            let payload = buffer.get(..datagram.length.min(LARGEST - prefix.len())).unwrap_or_default();
            if let Err(error) = answer(&socket, prefix, payload, &datagram) {
                tracing::debug!(%error, "datagram not answered");
            }
        }
    }
}

/// A received datagram: who sent it, to which of our addresses, how many bytes.
struct Datagram {
    length: usize,
    peer: SockaddrStorage,
    local: Local,
}

enum Local {
    V4(nix::libc::in_pktinfo),
    V6(nix::libc::in6_pktinfo),
}

fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Datagram> {
    let mut space = nix::cmsg_space!(nix::libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let message = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT)?;
    let local = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(Local::V4(info)),
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(Local::V6(info)),
        _ => None,
    });
    match (message.address, local) {
        (Some(peer), Some(local)) => Ok(Datagram { length: message.bytes, peer, local }),
        _ => Err(io::Error::other("datagram without packet information")),
    }
}

/// Sends `prefix` and `payload` back, from the address the datagram came to and by whatever route that address has.
fn answer(socket: &UdpSocket, prefix: &str, payload: &[u8], datagram: &Datagram) -> io::Result<()> {
    let parts = [IoSlice::new(prefix.as_bytes()), IoSlice::new(payload)];
    let send = |control: &[ControlMessage<'_>]| {
        sendmsg(socket.as_raw_fd(), &parts, control, MsgFlags::MSG_DONTWAIT, Some(&datagram.peer))
    };
    match datagram.local {
        Local::V4(info) => {
            // The address that was asked, not the interface's primary one; the routing rules choose the interface.
            let info = nix::libc::in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: info.ipi_addr, ..info };
            send(&[ControlMessage::Ipv4PacketInfo(&info)])?
        }
        Local::V6(info) => {
            let info = nix::libc::in6_pktinfo { ipi6_ifindex: 0, ..info };
            send(&[ControlMessage::Ipv6PacketInfo(&info)])?
        }
    };
    Ok(())
}
