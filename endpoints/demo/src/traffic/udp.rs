//! UDP: many source ports, a few packets from each.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::{Tally, Traffic, UDP_PORT};

/// A socket connected to the VIP from `port` (0: any), its packets carrying `mark` (0: none).
///
/// # Errors
/// If the port is taken or there is no route.
pub fn socket(vip: IpAddr, port: u16, mark: u32) -> Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(SocketAddr::new(vip, 0)), Type::DGRAM, Some(Protocol::UDP))
        .context("socket")?;
    if mark != 0 {
        socket.set_mark(mark).context("set the mark")?;
    }
    let any: IpAddr = if vip.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
    socket.bind(&SocketAddr::new(any, port).into()).context("bind")?;
    socket.connect(&SocketAddr::new(vip, UDP_PORT).into()).context("connect")?;
    socket.set_nonblocking(true).context("make it non-blocking")?;
    UdpSocket::from_std(socket.into()).context("register the socket")
}

/// Host name of an answer `<host> <payload>`, if the payload is the one given.
pub fn host_of<'a>(answer: &'a [u8], payload: &[u8]) -> Option<&'a str> {
    let space = answer.iter().position(|&byte| byte == b' ')?;
    let (host, rest) = answer.split_at(space);
    (rest.get(1..)? == payload).then(|| std::str::from_utf8(host).ok()).flatten()
}

/// Sends, again and again while the gateway itself has no route: its BIRD replaces a multipath route by delete and add.
///
/// # Errors
/// If there is still none after 100 ms, or another error.
pub async fn send(socket: &UdpSocket, payload: &[u8]) -> std::io::Result<()> {
    let mut tries = 0;
    loop {
        match socket.send(payload).await {
            Ok(_) => return Ok(()),
            Err(error)
                if tries < 100
                    && matches!(
                        error.kind(),
                        std::io::ErrorKind::NetworkUnreachable | std::io::ErrorKind::HostUnreachable
                    ) =>
            {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            // An ICMP error for an earlier packet is reported here; this packet has not been sent yet.
            Err(error) if tries < 100 && error.kind() == std::io::ErrorKind::ConnectionRefused => tries += 1,
            Err(error) => return Err(error),
        }
    }
}

/// One packet and its answer: who, and after how many microseconds.
///
/// # Errors
/// If no right answer comes within `patience`.
pub async fn exchange(socket: &UdpSocket, payload: &[u8], patience: Duration) -> Result<(String, u128)> {
    let start = Instant::now();
    send(socket, payload).await.context("send")?;
    let mut buffer = [0; 2048];
    let work = async {
        loop {
            let length = match socket.recv(&mut buffer).await {
                Ok(length) => length,
                Err(error) => bail!("receive: {error}"),
            };
            if let Some(host) = buffer.get(..length).and_then(|answer| host_of(answer, payload)) {
                return Ok(host.to_owned());
            }
        }
    };
    let host = timeout(patience, work).await.with_context(|| format!("no answer within {patience:?}"))??;
    Ok((host, start.elapsed().as_micros()))
}

/// `ports` source ports with `each` packets one after the other, `parallel` ports at a time.
pub async fn packets(vip: IpAddr, ports: u64, each: u64, parallel: usize, targets: usize) -> Traffic {
    let next = Arc::new(AtomicU64::new(0));
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..parallel {
        let next = Arc::clone(&next);
        workers.spawn(async move {
            let mut tally = Tally::default();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= ports {
                    return tally;
                }
                one_port(vip, number, each, &mut tally).await;
            }
        });
    }
    let mut total = Tally::default();
    while let Some(done) = workers.join_next().await {
        match done {
            Ok(tally) => total.merge(tally),
            Err(error) => total.failure(error.to_string()),
        }
    }
    total.finish(vip, "udp", ports * each, targets)
}

async fn one_port(vip: IpAddr, number: u64, each: u64, tally: &mut Tally) {
    let socket = match socket(vip, 0, 0) {
        Ok(socket) => socket,
        Err(error) => return (0..each).for_each(|_| tally.failure(format!("{error:#}"))),
    };
    let mut first: Option<String> = None;
    let mut split = false;
    for packet in 0..each {
        match exchange(&socket, format!("{number}.{packet}").as_bytes(), Duration::from_secs(2)).await {
            Ok((host, micros)) => {
                split |= first.as_ref().is_some_and(|first| *first != host);
                first.get_or_insert_with(|| host.clone());
                tally.success(host, micros);
            }
            Err(error) => tally.failure(format!("{error:#}")),
        }
    }
    tally.split_flows += u64::from(split);
}

#[cfg(test)]
mod tests {
    use super::host_of;

    #[test]
    fn an_answer_names_its_host_and_repeats_the_payload() {
        assert_eq!(host_of(b"target-1 7.3", b"7.3"), Some("target-1"));
        assert_eq!(host_of(b"target-1 7.2", b"7.3"), None);
        assert_eq!(host_of(b"target-1", b""), None);
        assert_eq!(host_of(b"h a b", b"a b"), Some("h"));
    }
}
