//! Places for the streams of a configuration, all at once or, where old and new tables do not fit beside each other, in steps.

use std::collections::BTreeMap;

use meridio_decision::layout::StreamEntry;

use crate::config::{Config, Stream, Targets};
use crate::engine::Engine;
use crate::error::Error;
use crate::place::Room;
use crate::table::{chunks_for, rows_for};

/// A stream in the maps: its slot, its entry, and its name and shape.
pub(crate) type Entries = Vec<(u32, StreamEntry, Stream)>;

/// Where a stream lies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placed {
    pub(crate) slot: u32,
    pub(crate) entry: StreamEntry,
    /// It is not there yet.
    pub(crate) fresh: bool,
}

/// Finds a place for each of the streams beside everything that is there.
pub(crate) fn place(there: Entries, chunks: u32, next: u32, streams: &[Stream]) -> Result<Vec<Placed>, Error> {
    let mut room = Room::new(there.iter().map(|(slot, entry, _)| (*slot, *entry)).collect(), chunks, next);
    let one = |stream: &Stream| match there.iter().find(|(_, _, s)| s == stream) {
        Some((slot, entry, _)) => Ok(Placed { slot: *slot, entry: *entry, fresh: false }),
        None => room.take(stream).map(|(slot, entry)| Placed { slot, entry, fresh: true }),
    };
    streams.iter().map(one).collect()
}

/// Targets as far as the streams of a step can have them.
pub(crate) fn within(step: &Config, targets: &BTreeMap<String, Targets>) -> BTreeMap<String, Targets> {
    let of = |stream: &Stream| {
        let all = targets.get(&stream.name).into_iter().flatten();
        all.filter(|(id, _)| **id <= stream.max_targets).map(|(id, target)| (*id, *target)).collect()
    };
    step.streams.iter().map(|stream| (stream.name.clone(), of(stream))).collect()
}

/// The configurations on the way from the streams that are `there`: each changes one stream more, those that become smallest
/// first. `None`: one stream at a time does not fit either.
fn steps(mut there: Entries, chunks: u32, config: &Config) -> Option<Vec<Config>> {
    let old = |stream: &Stream| there.iter().map(|(_, _, s)| s).find(|s| s.name == stream.name && *s != stream);
    let mut changed: Vec<(usize, Stream)> =
        config.streams.iter().enumerate().filter_map(|(n, stream)| Some((n, old(stream)?.clone()))).collect();
    if changed.is_empty() {
        return None;
    }
    changed.sort_by_key(|(n, _)| config.streams[*n].max_targets);
    let mut step = config.clone();
    for (n, old) in &changed {
        step.streams[*n] = old.clone();
    }
    let mut steps = vec![step.clone()];
    for (n, _) in changed {
        step.streams[n] = config.streams[n].clone();
        steps.push(step.clone());
    }
    for step in &steps {
        let placed = place(there, chunks, 0, &step.streams).ok()?;
        there = step.streams.iter().zip(placed).map(|(stream, p)| (p.slot, p.entry, stream.clone())).collect();
    }
    Some(steps)
}

impl Engine {
    pub(crate) fn entries(&self) -> Entries {
        self.slots.iter().map(|(slot, s)| (*slot, s.entry, s.stream.clone())).collect()
    }

    /// See [`steps`].
    pub(crate) fn steps(&self, config: &Config) -> Option<Vec<Config>> {
        steps(self.entries(), self.kernel.chunks, config)
    }

    /// What is full, and what to do about it.
    pub(crate) fn no_room(&self, config: &Config, error: Error) -> Vec<Error> {
        let rows = config.streams.iter().filter_map(|stream| rows_for(stream.max_targets));
        let (needed, chunks): (u32, u32) = (rows.map(|rows| 2 * chunks_for(rows)).sum(), self.kernel.chunks);
        let what = if needed > chunks {
            format!(
                "need {needed} chunks of rows, there are {chunks}: lower max-targets (up to 600: 2 chunks, up to 1300: 4, above: 32), or \
                 have the maps made anew with more chunks (NSM_TABLE_CHUNKS, after stateless-lb --remove)"
            )
        } else {
            "fit, but not beside those that are in use: remove or change some streams first, then the others".to_owned()
        };
        vec![error, Error::config("streams", what)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(name: &str, max_targets: u32) -> Stream {
        Stream { name: name.into(), max_targets, sctp_ports_only: false }
    }

    fn entries(streams: &[Stream], chunks: u32) -> Entries {
        let placed = place(vec![], chunks, 0, streams).unwrap();
        placed.into_iter().zip(streams).map(|(p, stream)| (p.slot, p.entry, stream.clone())).collect()
    }

    #[test]
    fn streams_that_change_together_change_in_turn_where_they_have_to() {
        let before = [stream("a", 8_000), stream("b", 8_000), stream("c", 8_000)];
        let there = entries(&before, 128);
        let config =
            Config { streams: vec![stream("a", 7_000), stream("b", 100), stream("c", 8_000)], ..Config::default() };
        assert!(place(there.clone(), 130, 0, &config.streams).is_ok(), "there is room for both");
        assert!(place(there.clone(), 120, 0, &config.streams).is_err());
        let sizes = |steps: Vec<Config>| -> Vec<Vec<u32>> {
            steps.into_iter().map(|step| step.streams.iter().map(|s| s.max_targets).collect()).collect()
        };
        let found = sizes(steps(entries(&before, 98), 98, &config).unwrap());
        assert_eq!(found, [[8_000, 8_000, 8_000], [8_000, 100, 8_000], [7_000, 100, 8_000]], "the smallest first");
        let config = Config { streams: vec![stream("a", 7_000), stream("b", 7_000)], ..Config::default() };
        // What is gone makes room for the first of those that change.
        assert_eq!(sizes(steps(entries(&before, 96), 96, &config).unwrap())[1], [7_000, 8_000]);
        assert!(steps(entries(&before[..2], 64), 64, &config).is_none(), "no room for any");
        let config = Config { streams: [&before[..], &[stream("d", 8_000)]].concat(), ..Config::default() };
        assert!(steps(there, 120, &config).is_none(), "a stream that is new has no old table to wait for");
    }
}
