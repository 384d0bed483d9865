//! TCP: many short connections, and bulk transfers to each target.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::{TCP_PORT, Tally, Traffic};

/// A connection whose host name line has been read.
#[derive(Debug)]
pub struct Session {
    /// Who answered.
    pub host: String,
    /// The connection behind the line.
    pub stream: BufReader<TcpStream>,
}

/// Connects (from `port`, or any) and reads the line that the application greets with.
///
/// # Errors
/// If that fails or takes longer than `patience`.
pub async fn open(vip: IpAddr, port: u16, patience: Duration) -> Result<Session> {
    let work = async {
        let socket = if vip.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.context("socket")?;
        if port != 0 {
            socket.set_reuseaddr(true).context("reuse address")?;
            let any: IpAddr = if vip.is_ipv4() { [0, 0, 0, 0].into() } else { [0u16; 8].into() };
            socket.bind(SocketAddr::new(any, port)).context("bind")?;
        }
        let stream = socket.connect(SocketAddr::new(vip, TCP_PORT)).await.context("connect")?;
        // A reset instead of TIME_WAIT: tens of thousands of ports are used in a minute.
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).context("linger")?;
        stream.set_nodelay(true).context("nodelay")?;
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        let read = stream.read_line(&mut line).await.context("read the host name")?;
        if read == 0 || !line.ends_with('\n') {
            bail!("closed before the host name");
        }
        Ok(Session { host: line.trim().to_owned(), stream })
    };
    timeout(patience, work).await.with_context(|| format!("no host name within {patience:?}"))?
}

/// Sends `payload` and reads it back.
///
/// # Errors
/// If the echo does not come within `patience` or differs.
pub async fn echo(session: &mut Session, payload: &[u8], patience: Duration) -> Result<()> {
    let mut answer = vec![0; payload.len()];
    let work = async {
        session.stream.write_all(payload).await.context("write")?;
        session.stream.read_exact(&mut answer).await.context("read the echo")?;
        if answer != payload {
            bail!("the echo from {} differs", session.host);
        }
        Ok(())
    };
    timeout(patience, work).await.with_context(|| format!("no echo within {patience:?}"))?
}

async fn one(vip: IpAddr, number: u64) -> Result<(String, u128)> {
    let start = Instant::now();
    let mut session = open(vip, 0, Duration::from_secs(5)).await?;
    echo(&mut session, &number.to_be_bytes(), Duration::from_secs(5)).await?;
    Ok((session.host, start.elapsed().as_micros()))
}

/// `count` connections, `parallel` at a time: greeting, 8 bytes, echo, close.
pub async fn connections(vip: IpAddr, count: u64, parallel: usize, targets: usize) -> Traffic {
    let next = Arc::new(AtomicU64::new(0));
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..parallel {
        let next = Arc::clone(&next);
        workers.spawn(async move {
            let mut tally = Tally::default();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return tally;
                }
                match one(vip, number).await {
                    Ok((host, micros)) => tally.success(host, micros),
                    Err(error) => tally.failure(format!("{error:#}")),
                }
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
    total.finish(vip, "tcp", count, targets)
}

/// Transfers `bytes` to each target and back at full speed. Source ports are tried until each of `targets` was met.
/// Returns megabit per second (one direction) by target.
///
/// # Errors
/// If a target is not met within 400 connections, or a transfer stalls or is falsified.
pub async fn bulk(vip: IpAddr, bytes: usize, targets: usize) -> Result<BTreeMap<String, u32>> {
    let mut speeds = BTreeMap::new();
    for _ in 0..400 {
        let session = open(vip, 0, Duration::from_secs(5)).await?;
        if !speeds.contains_key(&session.host) {
            let host = session.host.clone();
            let speed =
                transfer(session, bytes).await.with_context(|| format!("{bytes} bytes to {host} by way of {vip}"))?;
            speeds.insert(host, speed);
        }
        if speeds.len() == targets {
            return Ok(speeds);
        }
    }
    bail!("400 connections to {vip} met only {} of {targets} targets", speeds.len())
}

async fn transfer(session: Session, bytes: usize) -> Result<u32> {
    let start = Instant::now();
    let (mut reader, mut writer) = tokio::io::split(session.stream);
    let pattern = |index: usize| (index % 251) as u8;
    let send = async {
        let data: Vec<u8> = (0..bytes).map(pattern).collect();
        writer.write_all(&data).await.context("write")
    };
    let receive = async {
        let mut buffer = vec![0; 64 * 1024];
        let mut at = 0;
        while at < bytes {
            let count = reader.read(&mut buffer).await.context("read")?;
            if count == 0 {
                bail!("closed after {at} bytes");
            }
            if buffer.iter().take(count).enumerate().any(|(offset, &byte)| byte != pattern(at + offset)) {
                bail!("falsified near byte {at}");
            }
            at += count;
        }
        Ok(())
    };
    let both = async { tokio::try_join!(send, receive) };
    timeout(Duration::from_secs(20), both).await.context("stalled: not through after 20 s")??;
    let micros = start.elapsed().as_micros().max(1);
    Ok(u32::try_from(bytes as u128 * 8 / micros).unwrap_or(u32::MAX))
}
