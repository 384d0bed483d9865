//! Numbered datagrams from many flows at a steady rate, who got how many, and which were answered: every loss shows, either way.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::net::{Net, V4, V6, eventually};

/// Source ports, half of them IPv6.
const FLOWS: usize = 64;

/// Datagrams on their way.
pub(crate) struct Flood {
    stop: Arc<AtomicBool>,
    /// Numbers that have been sent so far.
    sent: Arc<AtomicU64>,
    sender: Option<JoinHandle<(u64, BTreeSet<u64>)>>,
    /// Received by target; target 1 is at 0.
    received: Vec<Arc<AtomicU64>>,
    receivers: Vec<JoinHandle<BTreeSet<u64>>>,
}

/// What became of them.
#[derive(Debug)]
pub(crate) struct Tally {
    pub(crate) sent: u64,
    /// Different numbers that arrived.
    pub(crate) arrived: u64,
    /// Different numbers that came back.
    pub(crate) answered: u64,
    /// By target, with repetitions.
    pub(crate) by_target: Vec<u64>,
}

impl Tally {
    /// Numbers that were lost on their way to a target.
    pub(crate) fn lost(&self) -> u64 {
        self.sent - self.arrived
    }

    /// Numbers that were lost, one way or the other.
    pub(crate) fn unanswered(&self) -> u64 {
        self.sent - self.answered
    }
}

fn receiver(vip: IpAddr, port: u16) -> UdpSocket {
    let socket = UdpSocket::bind((vip, port)).unwrap();
    // Forced, because a busy machine may let a receiver wait longer than the usual limit lasts.
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(16 << 20)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    socket
}

impl Flood {
    /// `per_second` datagrams to a port of the VIPs, from the moment at which every one of `targets` listens, on the second port.
    pub(crate) fn start(net: &Net, targets: u8, (port, target_port): (u16, u16), per_second: u64) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let sent: Arc<AtomicU64> = Arc::default();
        let mut flood =
            Flood { stop: stop.clone(), sent: sent.clone(), sender: None, received: Vec::new(), receivers: Vec::new() };
        for n in 1..=targets {
            let count: Arc<AtomicU64> = Arc::default();
            flood.received.push(count.clone());
            for vip in [IpAddr::V4(V4), IpAddr::V6(V6)] {
                let socket = net.run(&format!("t{n}"), move || receiver(vip, target_port));
                let (stop, count) = (stop.clone(), count.clone());
                flood.receivers.push(std::thread::spawn(move || {
                    let (mut numbers, mut buffer) = (BTreeSet::new(), [0; 64]);
                    // Only an empty buffer after the end is the end.
                    loop {
                        let ended = stop.load(Ordering::SeqCst);
                        match socket.recv_from(&mut buffer) {
                            Ok((8, from)) => {
                                numbers.insert(u64::from_be_bytes(buffer[..8].try_into().unwrap()));
                                count.fetch_add(1, Ordering::SeqCst);
                                socket.send_to(&buffer[..8], from).unwrap();
                            }
                            Ok(_) => {}
                            Err(_) if ended => return numbers,
                            Err(_) => {}
                        }
                    }
                }));
            }
        }
        let so_far = sent;
        flood.sender = Some(net.within("c", move || send(&stop, &so_far, port, per_second)));
        flood
    }

    /// Received so far by a target (1...).
    pub(crate) fn received(&self, target: usize) -> u64 {
        self.received[target - 1].load(Ordering::SeqCst)
    }

    /// The number after the last one that was sent.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::SeqCst)
    }

    /// Waits until targets have received `more` datagrams since now, all together.
    pub(crate) fn flows(&self, more: u64) {
        let all = || self.received.iter().map(|r| r.load(Ordering::SeqCst)).sum::<u64>();
        let before = all();
        assert!(eventually(Duration::from_secs(20), || all() >= before + more), "{before}, then {}", all());
    }

    /// Ends it.
    pub(crate) fn finish(self) -> Tally {
        self.stop.store(true, Ordering::SeqCst);
        let (sent, answers) = self.sender.unwrap().join().unwrap();
        let mut numbers = BTreeSet::new();
        for receiver in self.receivers {
            numbers.extend(receiver.join().unwrap());
        }
        let by_target = self.received.iter().map(|r| r.load(Ordering::SeqCst)).collect();
        Tally { sent, arrived: numbers.len() as u64, answered: answers.len() as u64, by_target }
    }
}

/// Sends; how many, and the numbers that came back.
fn send(stop: &AtomicBool, so_far: &AtomicU64, port: u16, per_second: u64) -> (u64, BTreeSet<u64>) {
    let sockets: Vec<UdpSocket> = (0..FLOWS)
        .map(|n| {
            let (any, vip): (&str, IpAddr) = if n % 2 == 0 { ("0.0.0.0:0", V4.into()) } else { ("[::]:0", V6.into()) };
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(SocketAddr::new(vip, port)).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        })
        .collect();
    let (start, mut sent, mut answers) = (Instant::now(), 0u64, BTreeSet::new());
    let listen = |answers: &mut BTreeSet<u64>| {
        let mut buffer = [0; 8];
        for socket in &sockets {
            while socket.recv(&mut buffer).is_ok_and(|length| length == 8) {
                answers.insert(u64::from_be_bytes(buffer));
            }
        }
    };
    while !stop.load(Ordering::SeqCst) {
        let due = (start.elapsed().as_secs_f64() * per_second as f64) as u64;
        // After a pause of this thread not everything at once.
        for _ in 0..due.saturating_sub(sent).min(50) {
            // An ICMP error about an earlier datagram is told on the next call, which has then sent nothing.
            let socket = &sockets[sent as usize % FLOWS];
            if socket.send(&sent.to_be_bytes()).is_err() {
                socket.send(&sent.to_be_bytes()).unwrap();
            }
            sent += 1;
            so_far.store(sent, Ordering::SeqCst);
        }
        listen(&mut answers);
        std::thread::sleep(Duration::from_millis(1));
    }
    // What is on its way has time to arrive before the receivers look at the end.
    std::thread::sleep(Duration::from_millis(300));
    // On a busy machine an answer may take longer.
    eventually(Duration::from_secs(5), || {
        listen(&mut answers);
        answers.len() as u64 >= sent
    });
    (sent, answers)
}
