//! Which slot, chunks and identifiers of the maps a stream gets.

use meridio_decision::layout::{MAX_STREAMS, MAX_TARGETS, StreamEntry, stream_flag};

use crate::config::Stream;
use crate::error::Error;
use crate::table::{chunks_for, rows_for};

/// What is taken, and what of it a new stream can have.
#[derive(Debug)]
pub(crate) struct Room {
    used: Vec<(u32, StreamEntry)>,
    chunks: u32,
    next: u32,
}

impl Room {
    /// `used`: streams by slot; `chunks`: of the row map; `next`: slot to look at first.
    pub(crate) fn new(used: Vec<(u32, StreamEntry)>, chunks: u32, next: u32) -> Self {
        Room { used, chunks, next }
    }

    /// Takes a place for a stream: the slot, and the entry without targets.
    ///
    /// Slots are handed out in turn rather than the lowest first, so that fragments that are still on their way to a stream
    /// which is gone do not meet another one in its slot.
    ///
    /// # Errors
    /// What is full, by the stream's name.
    pub(crate) fn take(&mut self, stream: &Stream) -> Result<(u32, StreamEntry), Error> {
        let object = format!("stream {:?}", stream.name);
        let Some(rows) = rows_for(stream.max_targets) else {
            return Err(Error::config(&object, "max-targets is not in 1..10000"));
        };
        let slots = MAX_STREAMS as u32;
        let free = |n: &u32| !self.used.iter().any(|(used, _)| used == n);
        let number = (0..slots).map(|n| (self.next + n) % slots).find(free);
        let number = number.ok_or_else(|| Error::config(&object, format!("more than {MAX_STREAMS} streams")))?;
        let size = chunks_for(rows);
        let used = self.used.iter().flat_map(|(_, e)| e.chunk.map(|c| (c, chunks_for(e.rows)))).collect();
        let chunks = first_fit(used, 2 * size, self.chunks).ok_or_else(|| {
            let reason = format!("its table takes {} chunks of rows, of {} not enough are free", 2 * size, self.chunks);
            Error::config(&object, reason)
        })?;
        let used = self.used.iter().map(|(_, e)| (e.target_base, e.max_targets)).collect();
        let target_base = first_fit(used, stream.max_targets, MAX_TARGETS as u32 - 1)
            .ok_or_else(|| Error::config(&object, format!("more than {MAX_TARGETS} targets in all streams")))?;
        let entry = StreamEntry {
            rows,
            chunk: [chunks, chunks + size],
            target_base,
            max_targets: stream.max_targets,
            flags: if stream.sctp_ports_only { stream_flag::SCTP_PORTS_ONLY } else { 0 },
            ..StreamEntry::default()
        };
        self.used.push((number, entry));
        self.next = (number + 1) % slots;
        Ok((number, entry))
    }
}

/// First place for `size` consecutive numbers below `limit` between what is used (start, size).
fn first_fit(mut used: Vec<(u32, u32)>, size: u32, limit: u32) -> Option<u32> {
    used.sort_unstable();
    let mut at = 0;
    for (start, length) in used {
        if start >= at + size {
            break;
        }
        at = at.max(start + length);
    }
    (at + size <= limit).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_first_fit() {
        let mut used = vec![];
        let take = |used: &mut Vec<(u32, u32)>, size| {
            let at = first_fit(used.clone(), size, 10_000).unwrap();
            used.push((at, size));
            at
        };
        assert_eq!(take(&mut used, 200), 0);
        assert_eq!(take(&mut used, 100), 200);
        assert_eq!(take(&mut used, 1), 300);
        assert_eq!(take(&mut used, 1), 301);
        used.retain(|u| u.0 != 200);
        assert_eq!(take(&mut used, 50), 200);
        assert_eq!(take(&mut used, 55), 302);
        assert_eq!(take(&mut used, 50), 250);
    }

    #[test]
    fn what_is_full_is_named() {
        let stream = |max_targets| Stream { name: "s".into(), max_targets, sctp_ports_only: false };
        let mut room = Room::new(vec![], 4, 255);
        assert_eq!(room.take(&stream(100)).unwrap().0, 255);
        assert_eq!(room.take(&stream(100)).unwrap().0, 0, "round the end");
        let full = room.take(&stream(100)).unwrap_err().to_string();
        assert!(full.contains("stream \"s\"") && full.contains("2 chunks"), "{full}");
        let mut room = Room::new(vec![], u32::MAX, 0);
        for n in 0..3 {
            assert_eq!(room.take(&stream(10_000)).unwrap().1.target_base, n * 10_000);
        }
        assert!(room.take(&stream(10_000)).unwrap_err().to_string().contains("targets in all streams"));
        let mut room = Room::new(vec![], u32::MAX, 0);
        (0..MAX_STREAMS).for_each(|_| _ = room.take(&stream(1)).unwrap());
        assert!(room.take(&stream(1)).unwrap_err().to_string().contains("256 streams"));
        assert!(room.take(&stream(0)).is_err());
    }
}
