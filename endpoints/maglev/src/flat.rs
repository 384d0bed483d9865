//! Counters that lie flat: those of each CPU in one piece, in memory that this process shares with the program. To read one
//! takes no system call.
#![allow(unsafe_code)] // SAFETY: a mapping of a map's values; each use below states why it stays within.

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use meridio_decision::layout::{Counter, FLOW_COUNTERS, MAX_TARGETS};

use crate::error::Error;
use crate::maps::Maps;
use crate::sys::{RawMap, max_entries};

/// Maps of such counters.
pub(crate) const NAMES: [&str; 2] = ["FLOW_HITS", "TARGET_HITS"];

/// The counters that each packet adds to.
#[derive(Debug)]
pub(crate) struct Hits {
    /// By the index of the flow's counter.
    pub(crate) flows: Flat,
    /// By the index of the target's entry, of both copies together.
    pub(crate) targets: Flat,
}

impl Hits {
    /// Opens both; `write`: they can be set to zero.
    pub(crate) fn open(maps: &Maps, write: bool) -> Result<Self, Error> {
        let open = |map: &RawMap, places| {
            Flat::open(map, places, write).map_err(|e| Error::Map { name: map.name, reason: e.to_string() })
        };
        Ok(Hits { flows: open(&maps.flow_hits, FLOW_COUNTERS)?, targets: open(&maps.target_hits, MAX_TARGETS as u32)? })
    }
}

/// Counters of each CPU.
#[derive(Debug)]
pub(crate) struct Flat {
    values: NonNull<Counter>,
    /// Counters of one CPU.
    places: usize,
    /// Counters of all of them.
    count: usize,
    write: bool,
}

// SAFETY: the memory is shared with the kernel anyway, and is only read and written as whole words.
unsafe impl Send for Flat {}
// SAFETY: as above.
unsafe impl Sync for Flat {}

impl Flat {
    fn open(map: &RawMap, places: u32, write: bool) -> io::Result<Self> {
        let (places, count) = (places as usize, max_entries(&map.fd)? as usize);
        if count == 0 || !count.is_multiple_of(places) {
            return Err(io::Error::other(format!("{count} counters are not {places} for each CPU")));
        }
        let access = if write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a new mapping, of as many values as the map has.
        let memory = unsafe {
            let length = count * size_of::<Counter>();
            libc::mmap(std::ptr::null_mut(), length, access, libc::MAP_SHARED, map.fd.as_raw_fd(), 0)
        };
        if memory == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let values = NonNull::new(memory.cast()).ok_or_else(|| io::Error::other("mapped to nothing"))?;
        Ok(Flat { values, places, count, write })
    }

    /// What all CPUs have counted.
    pub(crate) fn sum(&self, index: u32) -> Counter {
        let mut sum = Counter::default();
        self.each(index, |counter| {
            // SAFETY: the pointer is to a live counter; volatile because the program writes it at any time.
            let (packets, bytes) = unsafe {
                ((&raw const (*counter).packets).read_volatile(), (&raw const (*counter).bytes).read_volatile())
            };
            sum.packets += packets;
            sum.bytes += bytes;
        });
        sum
    }

    /// Sets a counter of all CPUs to zero.
    ///
    /// # Errors
    /// Opened for reading only.
    pub(crate) fn zero(&self, index: u32) -> io::Result<()> {
        if !self.write {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        // SAFETY: the pointer is to a live counter in memory that may be written.
        self.each(index, |counter| unsafe { counter.write_volatile(Counter::default()) });
        Ok(())
    }

    /// The counters of an index, one of each CPU; none for an index beyond.
    fn each(&self, index: u32, mut f: impl FnMut(*mut Counter)) {
        let index = index as usize;
        if index >= self.places {
            return;
        }
        for at in (index..self.count).step_by(self.places) {
            // SAFETY: within the mapping, which has `count` counters.
            f(unsafe { self.values.as_ptr().add(at) });
        }
    }
}

impl Drop for Flat {
    fn drop(&mut self) {
        // SAFETY: the mapping of this value, which nobody uses any more.
        unsafe { libc::munmap(self.values.as_ptr().cast(), self.count * size_of::<Counter>()) };
    }
}
