//! The live view: who serves how much, what BGP and BFD say, until Ctrl-C.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::bird;
use crate::status::Observer;
use crate::traffic::continuous::Continuous;
use crate::traffic::sniffer::Sniffer;

/// Redraws every second on a terminal, prints every ten seconds elsewhere; returns when `stop` is given.
pub fn run(observer: &Observer, traffic: &Continuous, sniffer: &Sniffer, footer: &str, stop: &CancellationToken) {
    let terminal = std::io::stdout().is_terminal();
    let period = Duration::from_secs(if terminal { 1 } else { 10 });
    let mut before = traffic.answered();
    let mut at = Instant::now();
    while !stop.is_cancelled() {
        let due = at + period;
        while Instant::now() < due && !stop.is_cancelled() {
            std::thread::sleep(Duration::from_millis(50));
        }
        let now = traffic.answered();
        let seconds = at.elapsed().as_secs_f64();
        at = Instant::now();
        let frame = draw(observer, traffic, sniffer, &rates(&before, &now, seconds), footer);
        before = now;
        let start = if terminal { "\x1b[H\x1b[2J" } else { "" };
        print!("{start}{frame}");
        let _ = std::io::stdout().flush();
    }
}

/// Answers per second by host name.
fn rates(before: &BTreeMap<String, u64>, now: &BTreeMap<String, u64>, seconds: f64) -> BTreeMap<String, f64> {
    let rate = |host: &String, count: &u64| {
        (count - before.get(host).copied().unwrap_or(0).min(*count)) as f64 / seconds.max(0.001)
    };
    now.iter().map(|(host, count)| (host.clone(), rate(host, count))).collect()
}

fn draw(
    observer: &Observer,
    traffic: &Continuous,
    sniffer: &Sniffer,
    rates: &BTreeMap<String, f64>,
    footer: &str,
) -> String {
    let trench = &observer.trench;
    let mut text = format!("{}: VIPs {} and {}\n\n", trench.name(), trench.vip4, trench.vip6);
    let most = rates.values().copied().fold(1.0, f64::max);
    for (host, rate) in rates {
        let bar = "#".repeat((rate / most * 40.0) as usize);
        let _ = writeln!(text, "  {host:<12} {rate:>8.0}/s  {bar}");
    }
    let (sent, lost) = traffic.totals();
    let _ = writeln!(
        text,
        "\n  UDP packets sent {sent}, lost {lost}; frames with a VIP on the primary network: {}",
        sniffer.leaks().0
    );
    let socket = observer.gateway_socket();
    match (bird::sessions(&socket), bird::bfd(&socket)) {
        (Ok(sessions), Ok(bfd)) => {
            let names: Vec<String> =
                sessions.iter().map(|session| format!("{} {}", session.name, session.info)).collect();
            let _ = writeln!(text, "  gateway BGP: {}", names.join(" | "));
            let names: Vec<String> =
                bfd.iter().map(|(address, up)| format!("{address} {}", if *up { "Up" } else { "Down" })).collect();
            let _ = writeln!(text, "  gateway BFD: {}", names.join(" | "));
        }
        (Err(error), _) | (_, Err(error)) => {
            let _ = writeln!(text, "  gateway: {error:#}");
        }
    }
    for exit in observer.cluster.unexpected() {
        let _ = writeln!(text, "  {exit}");
    }
    let _ = writeln!(text, "\n{footer}");
    text
}

#[cfg(test)]
mod tests {
    use super::rates;

    #[test]
    fn rates_are_differences_over_time() {
        let before = [("a".to_owned(), 10)].into();
        let now = [("a".to_owned(), 30), ("b".to_owned(), 5)].into();
        assert_eq!(rates(&before, &now, 2.0), [("a".to_owned(), 10.0), ("b".to_owned(), 2.5)].into());
    }
}
