use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio_util::sync::CancellationToken;

use super::*;

const NAME: &str = "target-x";

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(10), future).await.expect("in time")
}

#[tokio::test]
async fn tcp_says_its_name_and_echoes_a_megabyte() {
    let listener = tcp::bind(0).unwrap();
    let port = listener.local_addr().unwrap().port();
    let stop = CancellationToken::new();
    let server = tokio::spawn(tcp::serve(listener, NAME.into(), stop.clone()));
    for address in [SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SocketAddr::from((Ipv6Addr::LOCALHOST, port))] {
        let stream = within(TcpStream::connect(address)).await.unwrap();
        let (mut input, mut output) = stream.into_split();
        let sent: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        let writer = tokio::spawn({
            let sent = sent.clone();
            async move { output.write_all(&sent).await.map(|()| output) }
        });
        let mut got = vec![0; NAME.len() + 1 + sent.len()];
        within(input.read_exact(&mut got)).await.unwrap();
        let (name, echo) = got.split_at(NAME.len() + 1);
        assert_eq!(name, format!("{NAME}\n").as_bytes());
        assert!(echo == sent);
        writer.await.unwrap().unwrap();
    }
    stop.cancel();
    within(server).await.unwrap();
}

#[tokio::test]
async fn udp_answers_from_the_address_that_was_asked() {
    let sockets = udp::bind(0).unwrap();
    let [port4, port6] = sockets.each_ref().map(|socket| socket.local_addr().unwrap().port());
    let stop = CancellationToken::new();
    let server = tokio::spawn(udp::serve(sockets, NAME.into(), stop.clone()));
    // 127.0.0.7 is a local address that no reply would come from by itself.
    let asked =
        [SocketAddr::from((Ipv4Addr::new(127, 0, 0, 7), port4)), SocketAddr::from((Ipv6Addr::LOCALHOST, port6))];
    for address in asked {
        let any = if address.is_ipv4() { "127.0.0.1:0" } else { "[::1]:0" };
        let socket = UdpSocket::bind(any).await.unwrap();
        for payload in ["", "ping", &"x".repeat(1400)] {
            socket.send_to(payload.as_bytes(), address).await.unwrap();
            let mut buffer = vec![0; 2000];
            let (length, from) = within(socket.recv_from(&mut buffer)).await.unwrap();
            assert_eq!(from, address);
            assert_eq!(&buffer[..length], format!("{NAME} {payload}").as_bytes());
        }
    }
    stop.cancel();
    within(server).await.unwrap();
}
