//! Traffic that flows while events happen: UDP flows with fixed 5-tuples at a steady rate, and long-lived TCP connections. Each loss has a time.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::witness::{Arrivals, parse, payload};
use super::{Generator, tcp, udp};

/// UDP flows, half of them to each VIP.
const FLOWS: u32 = 128;

/// Time between two packets of one flow; all flows together: 800 packets a second.
const PERIOD: Duration = Duration::from_millis(160);

/// A UDP packet without an answer for this long is lost.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// TCP connections, half of them to each VIP.
const CONNECTIONS: u32 = 32;

/// Pause between two exchanges on one connection.
const PAUSE: Duration = Duration::from_millis(20);

/// Which way a packet was going when it was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// It did not arrive at a target.
    Ingress,
    /// It arrived, the answer did not.
    Egress,
}

/// A UDP packet that was not answered.
#[derive(Clone, Debug)]
pub struct Loss {
    /// When it was sent.
    pub sent: Instant,
    /// Which flow it belongs to.
    pub flow: u32,
    /// Who answered that flow before.
    pub target: Option<String>,
    /// Where it was lost.
    pub direction: Direction,
}

impl Loss {
    /// Whether its flow goes to the second VIP.
    pub fn is_ipv6(&self) -> bool {
        !self.flow.is_multiple_of(2)
    }
}

/// A TCP connection that broke.
#[derive(Clone, Debug)]
pub struct Break {
    /// When the exchange that failed began.
    pub at: Instant,
    /// Who served it.
    pub target: String,
    /// Who serves the same 5-tuple now; not yet known: nobody.
    pub after: Option<String>,
    /// How it broke.
    pub how: String,
}

/// What the tasks write and events read.
#[derive(Debug)]
struct Shared {
    sent: AtomicU64,
    exchanges: AtomicU64,
    losses: Mutex<Vec<Loss>>,
    breaks: Mutex<Vec<Break>>,
    /// (when the exchange began, how long it took) of TCP exchanges that took over a second.
    stalls: Mutex<Vec<(Instant, Duration)>>,
    answered: Mutex<BTreeMap<String, u64>>,
    arrivals: Arc<Arrivals>,
    stop: CancellationToken,
}

/// The traffic; ends when dropped.
#[derive(Debug)]
pub struct Continuous {
    shared: Arc<Shared>,
}

/// What happened to packets that were sent and exchanges that began in a span of time.
#[derive(Clone, Debug, Default)]
pub struct Window {
    /// UDP packets sent.
    pub sent: u64,
    /// TCP exchanges done.
    pub exchanges: u64,
    /// TCP connections that take part.
    pub connections: u64,
    /// UDP packets lost.
    pub losses: Vec<Loss>,
    /// TCP connections broken.
    pub breaks: Vec<Break>,
    /// Longest TCP exchange over a second.
    pub longest_stall: Duration,
}

/// Begin of a [`Window`].
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// When.
    pub at: Instant,
    sent: u64,
    exchanges: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Continuous {
    /// Starts all flows and connections.
    ///
    /// # Errors
    /// If the generator is shutting down.
    pub fn start(generator: &Generator, vips: [IpAddr; 2], arrivals: Arc<Arrivals>) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared {
            sent: AtomicU64::new(0),
            exchanges: AtomicU64::new(0),
            losses: Mutex::default(),
            breaks: Mutex::default(),
            stalls: Mutex::default(),
            answered: Mutex::default(),
            arrivals,
            stop: CancellationToken::new(),
        });
        let handle = generator.handle()?;
        let [even, odd] = vips;
        let vip = |number: u32| if number.is_multiple_of(2) { even } else { odd };
        for flow in 0..FLOWS {
            handle.spawn(udp_flow(Arc::clone(&shared), vip(flow), flow));
        }
        for connection in 0..CONNECTIONS {
            handle.spawn(tcp_connection(Arc::clone(&shared), vip(connection)));
        }
        Ok(Continuous { shared })
    }

    /// Now, as the begin of a window.
    pub fn mark(&self) -> Mark {
        let shared = &self.shared;
        Mark {
            at: Instant::now(),
            sent: shared.sent.load(Ordering::Relaxed),
            exchanges: shared.exchanges.load(Ordering::Relaxed),
        }
    }

    /// What happened from `from` until now; waits until the fate of the last packet is known.
    pub fn since(&self, from: Mark) -> Window {
        let to = self.mark();
        std::thread::sleep(PATIENCE + PERIOD * 2);
        let inside = |at: Instant| at >= from.at && at < to.at;
        Window {
            sent: to.sent - from.sent,
            exchanges: to.exchanges - from.exchanges,
            connections: u64::from(CONNECTIONS),
            losses: lock(&self.shared.losses).iter().filter(|loss| inside(loss.sent)).cloned().collect(),
            breaks: lock(&self.shared.breaks).iter().filter(|broken| inside(broken.at)).cloned().collect(),
            longest_stall: lock(&self.shared.stalls)
                .iter()
                .filter(|stall| inside(stall.0))
                .map(|stall| stall.1)
                .max()
                .unwrap_or_default(),
        }
    }

    /// When the last UDP packet that was lost so far had been sent.
    pub fn last_loss(&self) -> Option<Instant> {
        lock(&self.shared.losses).iter().map(|loss| loss.sent).max()
    }

    /// Answers so far by host name, UDP and TCP.
    pub fn answered(&self) -> BTreeMap<String, u64> {
        lock(&self.shared.answered).clone()
    }

    /// UDP packets sent and lost so far.
    pub fn totals(&self) -> (u64, u64) {
        (self.shared.sent.load(Ordering::Relaxed), lock(&self.shared.losses).len() as u64)
    }
}

impl Drop for Continuous {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.shared.arrivals.end();
    }
}

/// One UDP flow: a packet each [`PERIOD`], answers matched by sequence number.
async fn udp_flow(shared: Arc<Shared>, vip: IpAddr, flow: u32) {
    let Ok(socket) = udp::socket(vip, 0, 0) else { return };
    let start = tokio::time::Instant::now() + PERIOD * flow / FLOWS;
    let mut ticks = tokio::time::interval_at(start, PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut pending: VecDeque<(u64, Instant)> = VecDeque::new();
    let mut target: Option<String> = None;
    let mut buffer = [0; 256];
    let mut sequence = 0;
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            _ = ticks.tick() => {
                sequence += 1;
                pending.push_back((sequence, Instant::now()));
                shared.sent.fetch_add(1, Ordering::Relaxed);
                // A packet that cannot be sent gets no answer, and so is lost.
                let _ = udp::send(&socket, &payload(flow, sequence)).await;
            }
            received = socket.recv(&mut buffer) => {
                if let Ok(length) = received
                    && let Some((host, answered)) = answer(buffer.get(..length).unwrap_or_default())
                {
                    pending.retain(|(waiting, _)| *waiting != answered);
                    shared.arrivals.take(flow, answered);
                    *lock(&shared.answered).entry(host.clone()).or_default() += 1;
                    target = Some(host);
                }
            }
        }
        while let Some(&(lost, sent)) = pending.front()
            && sent.elapsed() > PATIENCE
        {
            pending.pop_front();
            let direction = if shared.arrivals.take(flow, lost) { Direction::Egress } else { Direction::Ingress };
            lock(&shared.losses).push(Loss { sent, flow, target: target.clone(), direction });
        }
    }
}

/// Host name and sequence number of an answer.
fn answer(bytes: &[u8]) -> Option<(String, u64)> {
    let space = bytes.iter().position(|&byte| byte == b' ')?;
    let (_, sequence) = parse(bytes.get(space + 1..)?)?;
    Some((std::str::from_utf8(bytes.get(..space)?).ok()?.to_owned(), sequence))
}

/// One TCP connection that exchanges 8 bytes again and again, and is opened again from the same port when it breaks.
async fn tcp_connection(shared: Arc<Shared>, vip: IpAddr) {
    let mut port = 0;
    let mut broken: Option<Break> = None;
    while !shared.stop.is_cancelled() {
        let Ok(mut session) = tcp::open(vip, port, Duration::from_secs(2)).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        port = session.stream.get_ref().local_addr().map_or(port, |address| address.port());
        if let Some(broken) = broken.take() {
            // Known from the moment it broke; now also who took over.
            if let Some(entry) =
                lock(&shared.breaks).iter_mut().find(|entry| entry.at == broken.at && entry.target == broken.target)
            {
                entry.after = Some(session.host.clone());
            }
        }
        let mut number: u64 = 0;
        loop {
            tokio::select! {
                () = shared.stop.cancelled() => return,
                () = tokio::time::sleep(PAUSE) => {}
            }
            number += 1;
            let at = Instant::now();
            let payload = number.to_be_bytes();
            let outcome = tokio::select! {
                () = shared.stop.cancelled() => return,
                outcome = tcp::echo(&mut session, &payload, Duration::from_secs(15)) => outcome,
            };
            let took = at.elapsed();
            match outcome {
                Ok(()) => {
                    shared.exchanges.fetch_add(1, Ordering::Relaxed);
                    *lock(&shared.answered).entry(session.host.clone()).or_default() += 1;
                    if took > Duration::from_secs(1) {
                        lock(&shared.stalls).push((at, took));
                    }
                }
                Err(error) => {
                    let entry = Break { at, target: session.host.clone(), after: None, how: format!("{error:#}") };
                    lock(&shared.breaks).push(entry.clone());
                    broken = Some(entry);
                    break;
                }
            }
        }
    }
}

/// Sends to `vip` from many ports, about one packet each millisecond, until `host` answers; returns when it did, or nothing at `deadline`.
pub async fn first_answer(vip: IpAddr, host: String, deadline: Instant) -> Option<Instant> {
    let (found, mut answer) = tokio::sync::mpsc::channel(1);
    let mut tasks = tokio::task::JoinSet::new();
    for number in 0..128u64 {
        let (found, host) = (found.clone(), host.clone());
        tasks.spawn(async move {
            tokio::time::sleep(Duration::from_millis(number)).await;
            let Ok(socket) = udp::socket(vip, 0, 0) else { return };
            for packet in 0u64.. {
                let payload = format!("open.{number}.{packet}");
                if let Ok((who, _)) = udp::exchange(&socket, payload.as_bytes(), Duration::from_millis(128)).await {
                    if who == host {
                        let _ = found.try_send(Instant::now());
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(127)).await;
                }
            }
        });
    }
    let first = tokio::time::timeout_at(deadline.into(), answer.recv()).await.ok().flatten();
    tasks.abort_all();
    first
}
