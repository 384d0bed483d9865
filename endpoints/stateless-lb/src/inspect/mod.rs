//! Looking at a load balancer from outside: `meridio why` and `meridio trace`.

mod capture;
mod place;
mod question;
mod report;
pub mod trace;
pub mod why;

use std::io::Write as _;

/// Prints; `false`: the reader has left.
fn say(text: &str) -> bool {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}
