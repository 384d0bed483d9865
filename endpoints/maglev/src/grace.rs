//! When what packets were led away from may be written again.
//!
//! A packet that is being decided about may still read a copy or a generation that was switched off a moment ago. The kernel
//! runs the program inside an RCU read-side section, so it is done with it after an RCU grace period. An update of a
//! map of maps returns only after one (`maybe_wait_bpf_programs`, Linux 4.18 and later: "programs that could be
//! running use the new map value"). Here such a map of one entry exists for nothing else. No clock is involved.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::error::Error;
use crate::sys::{RawMap, create_map};

const ARRAY: u32 = 2;
const ARRAY_OF_MAPS: u32 = 12;

/// Waits for grace periods of the kernel.
#[derive(Debug)]
pub(crate) struct Grace {
    outer: RawMap,
    inner: RawMap,
}

impl Grace {
    pub(crate) fn new() -> Result<Self, Error> {
        use std::os::fd::AsRawFd;
        let failed = |name: &'static str| move |e: io::Error| Error::Map { name, reason: e.to_string() };
        let inner = create_map("GRACE_INNER", [ARRAY, 4, 4, 1, 0, 0]).map_err(failed("GRACE_INNER"))?;
        let like = inner.fd.as_raw_fd() as u32;
        let outer = create_map("GRACE", [ARRAY_OF_MAPS, 4, 4, 1, 0, like]).map_err(failed("GRACE"))?;
        Ok(Grace { outer, inner })
    }

    /// Returns when every packet that was being decided about at the time of the call has been decided about.
    pub(crate) fn wait(&self) -> io::Result<()> {
        use std::os::fd::AsRawFd;
        self.outer.set(&0u32, &(self.inner.fd.as_raw_fd() as u32))
    }
}

/// Something that packets were led away from. The wait for them goes on in the background, so that who changes things
/// seldom does not wait at all.
#[derive(Debug)]
pub(crate) enum Retired {
    /// Nobody reads it.
    Free,
    /// A thread waits until nobody reads it.
    Waiting(JoinHandle<io::Result<()>>),
    /// Somebody may read it, and nobody waits yet.
    Busy,
}

impl Retired {
    /// Retired now.
    pub(crate) fn now(grace: &Arc<Grace>) -> Self {
        let background = grace.clone();
        match std::thread::Builder::new().name("grace".into()).spawn(move || background.wait()) {
            Ok(thread) => Retired::Waiting(thread),
            Err(_) => Retired::Busy,
        }
    }

    /// Returns when it may be written.
    ///
    /// # Errors
    /// The kernel could not be asked: it must not be written.
    pub(crate) fn wait(&mut self, grace: &Grace) -> Result<(), Error> {
        let done = match std::mem::replace(self, Retired::Busy) {
            Retired::Free => true,
            Retired::Waiting(thread) => matches!(thread.join(), Ok(Ok(()))),
            Retired::Busy => false,
        };
        if !done {
            grace.wait().map_err(|e| Error::Map { name: "GRACE", reason: format!("no grace period: {e}") })?;
        }
        *self = Retired::Free;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_in_background_and_foreground() {
        // Needs the right to make maps, as all tests of this crate that touch the kernel.
        let grace = Arc::new(Grace::new().unwrap());
        for mut retired in [Retired::now(&grace), Retired::Busy, Retired::Free] {
            retired.wait(&grace).unwrap();
            assert!(matches!(retired, Retired::Free));
        }
    }
}
