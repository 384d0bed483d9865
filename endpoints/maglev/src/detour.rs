//! The way round through this process, for what the program cannot place at once: a TAP interface with the same program on
//! its ingress, and a thread at its other end.
//!
//! * Fragments that arrive before the first one of their packet. Only the first one has ports, so the program cannot place a
//!   later one that overtook it, and redirects it here. It is kept until the first one has been seen or [`HOLD`] is
//!   over. Then it goes back through the interface into the program, which now knows its target, or counts it as dropped.
//! * ICMP errors that this machine makes about replies of a VIP, such as one that is too big for the external link. They are
//!   routed here, and go straight back into the program, which finds the target that has sent the reply. (Of a reply whose port is
//!   translated the quote is translated first: see [`crate::quote`].)
//!
//! If somebody deletes the interface the thread ends, and no fragment is sent that way any more until [`Engine::tend`] has made
//! another one.
//!
//! [`Engine::tend`]: crate::Engine::tend
#![allow(unsafe_code)] // SAFETY: poll, whose call states why its pointers are valid.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use meridio_decision::decide::FRAGMENT_LIFETIME;
use meridio_decision::layout::{FragmentKey, FragmentValue};
use meridio_decision::packet::{Kind, network, transport};
use meridio_decision::{Scratch, decide::fragment_key};

use crate::error::Error;
use crate::image::Bytes;
use crate::quote::Known;
use crate::sys::{RawMap, monotonic};
use crate::tap;

/// How long a fragment waits for the first one of its packet.
const HOLD: Duration = Duration::from_millis(200);
/// How often is looked whether the first one has come.
const LOOK: Duration = Duration::from_millis(2);
/// Bytes held at most; what comes on top is not held.
const MAX_BYTES: usize = 4 << 20;
/// Fragments held at most.
const MAX_FRAMES: usize = 2048;
/// Ethernet header.
const L2: usize = 14;
/// Largest frame.
const MAX_FRAME: usize = 65_536 + L2;

/// What is held, by packet.
#[derive(Debug, Default)]
struct Held {
    packets: HashMap<FragmentKey, Packet>,
    frames: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Packet {
    until: Instant,
    frames: Vec<Vec<u8>>,
}

impl Held {
    /// Takes a frame, or gives it back when there is no room.
    fn take(&mut self, key: FragmentKey, frame: Vec<u8>, now: Instant) -> Result<(), Vec<u8>> {
        if self.frames >= MAX_FRAMES || self.bytes + frame.len() > MAX_BYTES {
            return Err(frame);
        }
        self.frames += 1;
        self.bytes += frame.len();
        let packet = self.packets.entry(key).or_insert_with(|| Packet { until: now + HOLD, frames: Vec::new() });
        packet.frames.push(frame);
        Ok(())
    }

    /// Frames, in the order in which they came, of the packets that are known by now or have waited long enough.
    fn due(&mut self, now: Instant, mut known: impl FnMut(&FragmentKey) -> bool) -> Vec<Vec<u8>> {
        let mut due = Vec::new();
        self.packets.retain(|key, packet| {
            let keep = packet.until > now && !known(key);
            if !keep {
                due.append(&mut packet.frames);
            }
            keep
        });
        self.frames -= due.len();
        self.bytes -= due.iter().map(Vec::len).sum::<usize>();
        due
    }

    fn is_empty(&self) -> bool {
        self.packets.is_empty()
    }
}

/// What a frame is here for.
#[derive(Debug, PartialEq, Eq)]
enum Errand {
    /// A later fragment, and what it has in common with the others of its packet.
    Fragment(FragmentKey),
    /// An ICMP error; what it is about is in the memory that it was read into.
    Error,
    /// Chatter of the interface.
    None,
}

fn errand(frame: &[u8], s: &mut Scratch) -> Errand {
    let (Some(ethertype), Some(packet)) = (frame.get(12..14), frame.get(L2..)) else { return Errand::None };
    let packet = Bytes(packet);
    if !network(&packet, u16::from_be_bytes([ethertype[0], ethertype[1]]), 0, &mut s.network)
        || transport(&packet, &s.network, &mut s.quoted, &mut s.transport).is_err()
    {
        return Errand::None;
    }
    if s.transport.kind == Kind::LaterFragment {
        fragment_key(s);
        return Errand::Fragment(s.fragment);
    }
    if s.transport.quote != 0 { Errand::Error } else { Errand::None }
}

/// The TAP interface and the thread behind it. The interface goes with this value, or with the process.
#[derive(Debug)]
pub(crate) struct Detour {
    /// Index of the interface.
    pub(crate) index: u32,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
    /// Why the thread has ended by itself.
    ended: Arc<Mutex<Option<String>>>,
}

impl Detour {
    /// Makes the interface in the network namespace of this thread, has the program attached to it, and lets fragments be sent there.
    /// `map` knows where first fragments went, `known` which ports clients know.
    ///
    /// # Errors
    /// Why there is none. Then no fragments are sent to one.
    pub(crate) fn start(
        map: RawMap,
        known: Known,
        attach: impl FnOnce(&str) -> Result<(), Error>,
    ) -> Result<Self, String> {
        let (tap, interface) = tap::open().map_err(|e| e.to_string())?;
        let (index, mac) = tap::bring_up(&interface).map_err(|e| format!("{interface}: {e}"))?;
        attach(&interface).map_err(|e| e.to_string())?;
        let (stop, stopped) = UnixStream::pair().map_err(|e| e.to_string())?;
        let config = known.config.clone();
        config.change(|config| config.hold = index).map_err(|e| e.to_string())?;
        let ended = Arc::new(Mutex::new(None));
        let (end, shared) = (ended.clone(), config.clone());
        let thread = std::thread::Builder::new().name("detour".into()).spawn(move || {
            let Err(error) = hold(tap, mac, &map, &known, &stopped) else { return };
            tracing::error!(interface, %error, "fragments out of order and local ICMP errors are dropped for now");
            // First the packets, then who may ask.
            if let Err(error) = shared.change(|config| config.hold = 0) {
                tracing::error!(%error, "fragments go on being sent to an interface that is gone");
            }
            *end.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("interface {interface}: {error}"));
        });
        match thread {
            Ok(thread) => Ok(Detour { index, stop: Some(stop), thread: Some(thread), ended }),
            Err(error) => {
                config.change(|config| config.hold = 0).map_err(|e| e.to_string())?;
                Err(error.to_string())
            }
        }
    }

    /// Why nobody is at the other end any more.
    pub(crate) fn fault(&self) -> Option<String> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// When to try again what has failed: after a second, then twice as long each time, a minute at most.
#[derive(Debug, Default)]
pub(crate) struct Retry {
    failures: u32,
    next: Option<Instant>,
}

impl Retry {
    /// Whether it is time.
    pub(crate) fn due(&self, now: Instant) -> bool {
        self.next.is_none_or(|next| now >= next)
    }

    /// Takes note of an attempt.
    pub(crate) fn done(&mut self, well: bool, now: Instant) {
        let seconds = (1u64 << self.failures.min(6)).min(60);
        // Also after a success: what breaks at once is not made anew in a tight loop.
        self.next = Some(now + Duration::from_secs(seconds));
        self.failures = if well { 0 } else { self.failures.saturating_add(1) };
    }
}

impl Drop for Detour {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn hold(mut tap: File, mac: [u8; 6], map: &RawMap, ports: &Known, stop: &UnixStream) -> io::Result<()> {
    let (mut held, mut s) = (Held::default(), Scratch::default());
    let mut buffer = vec![0u8; MAX_FRAME];
    let known = |key: &FragmentKey| {
        let first = map.get(key, FragmentValue::default()).ok().flatten();
        first.is_some_and(|first| monotonic().saturating_sub(first.seen) < FRAGMENT_LIFETIME)
    };
    // A frame that cannot be written is lost, as it would have been on any queue.
    let send = |tap: &mut File, frame: Vec<u8>| _ = tap.write(&frame);
    loop {
        let timeout = if held.is_empty() { -1 } else { LOOK.as_millis() as i32 };
        if wait(tap.as_raw_fd(), stop.as_raw_fd(), timeout)? {
            // Decided about, and counted, before the interface goes.
            held.due(Instant::now() + HOLD, known).into_iter().for_each(|frame| send(&mut tap, frame));
            return Ok(());
        }
        // A bounded round, so that a flood does not starve what is held.
        for _ in 0..64 {
            let length = match tap.read(&mut buffer) {
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            };
            let mut frame = buffer[..length].to_vec();
            let errand = errand(&frame, &mut s);
            if errand == Errand::None {
                continue;
            }
            // Addressed to this end, so that it comes back as a packet for this machine.
            frame[..6].copy_from_slice(&mac);
            let back = match errand {
                Errand::Fragment(key) => held.take(key, frame, Instant::now()).err(),
                _ => {
                    let put = frame.get_mut(L2..).map(|packet| ports.put(packet, &s));
                    if let Some(Err(error)) = put {
                        tracing::debug!(%error, "a local ICMP error goes on with the port of the target");
                    }
                    Some(frame)
                }
            };
            if let Some(frame) = back {
                send(&mut tap, frame);
            }
        }
        for frame in held.due(Instant::now(), known) {
            send(&mut tap, frame);
        }
    }
}

/// Waits for a frame, the end (`true`), or the time-out in ms.
fn wait(tap: RawFd, stop: RawFd, timeout: i32) -> io::Result<bool> {
    let one = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = [one(tap), one(stop)];
    // SAFETY: two live pollfds.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), 2, timeout) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(error) };
    }
    Ok(fds[1].revents != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_of(id: u32) -> FragmentKey {
        FragmentKey { id, ..FragmentKey::default() }
    }

    #[test]
    fn held_until_known_or_over() {
        let (mut held, now) = (Held::default(), Instant::now());
        for (id, byte) in [(1, 1), (2, 2), (1, 3)] {
            held.take(key_of(id), vec![byte; 100], now).unwrap();
        }
        assert!(held.due(now + HOLD / 2, |_| false).is_empty());
        assert_eq!(held.due(now + HOLD / 2, |k| k.id == 1), [vec![1; 100], vec![3; 100]], "in order");
        assert_eq!((held.frames, held.bytes), (1, 100));
        assert_eq!(held.due(now + HOLD, |_| false), [vec![2; 100]]);
        assert!(held.is_empty() && held.bytes == 0);
    }

    #[test]
    fn tried_again_later_and_later() {
        let (mut retry, start) = (Retry::default(), Instant::now());
        assert!(retry.due(start));
        let mut now = start;
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            retry.done(false, now);
            assert!(!retry.due(now + Duration::from_millis(seconds * 1000 - 1)), "{seconds} s");
            now += Duration::from_secs(seconds);
            assert!(retry.due(now), "{seconds} s");
        }
        retry.done(true, now);
        retry.done(false, now);
        assert!(!retry.due(now) && retry.due(now + Duration::from_secs(1)));
    }

    #[test]
    fn chatter_is_told_from_errands() {
        let errand = |frame: &[u8]| errand(frame, &mut Scratch::default());
        assert_eq!(errand(&[]), Errand::None);
        let frame = |packet: &[u8]| [&[0; 12][..], &[8, 0], packet].concat();
        let mut later = vec![0x45, 0, 0, 28, 0, 9, 0, 5, 64, 17, 0, 0, 10, 0, 0, 1, 20, 0, 0, 1];
        later.extend([0; 8]);
        assert!(matches!(errand(&frame(&later)), Errand::Fragment(key) if key.id == 9 && key.protocol == 17));
        let mut whole = later.clone();
        whole[7] = 0;
        whole.splice(20.., [0, 1, 0, 2, 0, 8, 0, 0]);
        assert_eq!(errand(&frame(&whole)), Errand::None);
        let mut error = vec![0x45, 0, 0, 56, 0, 9, 0, 0, 64, 1, 0, 0, 10, 0, 0, 9, 10, 0, 0, 1, 3, 4, 0, 0, 0, 0, 5, 0];
        error.extend(&whole);
        assert_eq!(errand(&frame(&error)), Errand::Error);
    }

    #[test]
    fn memory_is_bounded() {
        let (mut held, now) = (Held::default(), Instant::now());
        let taken = (0..10_000).filter(|n| held.take(key_of(n % 7), vec![0; 60], now).is_ok()).count();
        assert_eq!(taken, MAX_FRAMES);
        let mut held = Held::default();
        let taken = (0..10_000).filter(|n| held.take(key_of(*n), vec![0; 60_000], now).is_ok()).count();
        assert_eq!(taken, MAX_BYTES / 60_000);
        assert_eq!(held.due(now + HOLD, |_| false).len(), taken);
        assert_eq!((held.frames, held.bytes), (0, 0));
    }
}
