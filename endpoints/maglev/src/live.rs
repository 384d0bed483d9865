//! A load balancer that runs, looked at from another process by its pinned maps, of which it writes none.

use std::io;
use std::path::{Path, PathBuf};

use meridio_decision::layout::*;
use meridio_decision::{Reason, target_index};

use crate::engine::{MARK_MASK, failed};
use crate::error::Error;
use crate::flat;
use crate::kernel::{check_bpffs, cpus, versioned};
use crate::maps::Maps;
use crate::sys::{RawMap, untext};

/// The pinned maps of a running load balancer.
#[derive(Debug)]
pub struct Live {
    pub(crate) directory: PathBuf,
    pub(crate) maps: Maps,
    hits: flat::Hits,
    cpus: usize,
}

/// Counters of one flow or target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hits {
    /// Stream name.
    pub stream: String,
    /// Flow name, or the target's identifier as text.
    pub name: String,
    /// Targets: identifier plus offset, as in the firewall mark.
    pub mark: u32,
    /// Targets: next hops and interfaces.
    pub target: TargetEntry,
    /// Flows: matched packets, dropped ones too. Targets: forwarded packets.
    pub counter: Counter,
    /// Flows: those of the matched packets that were dropped.
    pub dropped: Counter,
}

/// Counters of one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamHits {
    /// Stream name.
    pub stream: String,
    /// Forwarded to any of its targets, ready now or not.
    pub forwarded: Counter,
    /// Dropped, by reason; reasons that did not happen are left out.
    pub dropped: Vec<(Reason, Counter)>,
}

/// Everything that is counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Of each flow, by priority.
    pub flows: Vec<Hits>,
    /// Of each stream.
    pub streams: Vec<StreamHits>,
    /// Of each ready target.
    pub targets: Vec<Hits>,
    /// Of the load balancer, by reason.
    pub reasons: Vec<(Reason, Counter)>,
    /// Packets whose trace event was lost for want of room.
    pub trace_lost: u64,
}

impl Live {
    /// Opens the maps below the directory that the load balancer was given (`NSM_BPF_DIR`).
    ///
    /// # Errors
    /// The directory is not on a BPF file system, or holds no load balancer of this version.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let absent = || Error::NotLive { directory: directory.to_owned(), version: LAYOUT_VERSION };
        check_bpffs(directory).map_err(|e| match e {
            Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => absent(),
            other => other,
        })?;
        let pins = versioned(directory, LAYOUT_VERSION);
        let map = |name: &'static str| {
            // The kernel shares the memory of a map only with who could write it as well.
            let open = if flat::NAMES.contains(&name) { RawMap::pinned_writable } else { RawMap::pinned };
            open(&pins.join(name), name).map_err(|e| match e.kind() {
                io::ErrorKind::NotFound => absent(),
                _ => Error::Map { name, reason: e.to_string() },
            })
        };
        let maps = Maps::open(map)?;
        Ok(Live { directory: pins.clone(), hits: flat::Hits::open(&maps, false)?, maps, cpus: cpus()? })
    }

    pub(crate) fn read<V: crate::sys::Plain>(&self, map: &RawMap, index: u32, empty: V) -> Result<V, Error> {
        map.get(&index, empty).map(|found| found.unwrap_or(empty)).map_err(failed(map))
    }

    fn sum(&self, map: &RawMap, index: u32) -> Result<Counter, Error> {
        map.sum(index, self.cpus).map_err(failed(map))
    }

    pub(crate) fn config(&self) -> Result<Config, Error> {
        self.read(&self.maps.config, 0, Config::default())
    }

    /// Name of the stream in a slot; empty if there is none.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn stream_name(&self, slot: u32) -> Result<String, Error> {
        Ok(untext(&self.read(&self.maps.stream_names, slot, [0u8; 128])?))
    }

    /// Name of the flow with a counter; empty if there is none.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn flow_name(&self, counter: u32) -> Result<String, Error> {
        Ok(untext(&self.read(&self.maps.flow_names, counter, [0u8; 128])?))
    }

    /// How many flows a generation has.
    pub(crate) fn flow_count(&self, generation: u32) -> Result<u32, Error> {
        // A ping matches every flow as far as the protocol goes.
        let index = generation * VECTORS + PROTO_BASE + class::PING;
        let all = self.read(&self.maps.vectors, index, Vector::default())?;
        Ok(all.words.iter().map(|word| word.count_ones()).sum())
    }

    /// The streams in use, by slot.
    pub(crate) fn stream_entries(&self) -> Result<Vec<(u32, StreamEntry)>, Error> {
        let mut entries = Vec::new();
        for slot in 0..MAX_STREAMS as u32 {
            let entry = self.read(&self.maps.streams, slot, StreamEntry::default())?;
            if entry.rows != 0 {
                entries.push((slot, entry));
            }
        }
        Ok(entries)
    }

    /// The targets of the copy that a stream uses, by identifier.
    pub(crate) fn ready(&self, entry: &StreamEntry) -> Result<Vec<(u32, TargetEntry)>, Error> {
        let mut ready = Vec::new();
        for identifier in 1..=entry.max_targets {
            let index = target_index(entry.target_base, identifier, entry.active & 1);
            let target = self.read(&self.maps.targets, index, TargetEntry::default())?;
            if target.mark != 0 {
                ready.push((identifier, target));
            }
        }
        Ok(ready)
    }

    /// Reads all counters. They only grow, for as long as their flow, stream or the maps live.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn counters(&self) -> Result<Counters, Error> {
        let mut counters = Counters::default();
        let mut names = std::collections::HashMap::new();
        for (slot, entry) in self.stream_entries()? {
            let stream = self.stream_name(slot)?;
            names.insert(slot, stream.clone());
            counters.streams.push(self.stream_hits(slot, &entry, &stream)?);
            for (identifier, target) in self.ready(&entry)? {
                counters.targets.push(Hits {
                    stream: stream.clone(),
                    name: identifier.to_string(),
                    mark: target.mark & MARK_MASK,
                    target,
                    counter: self.hits.targets.sum(entry.target_base + identifier),
                    dropped: Counter::default(),
                });
            }
        }
        let generation = self.config()?.generation();
        for index in 0..self.flow_count(generation)? {
            let place = generation * MAX_FLOWS as u32 + index;
            let flow = self.read(&self.maps.flows, place, FlowEntry::default())?;
            counters.flows.push(Hits {
                stream: names.get(&flow.slot).cloned().unwrap_or_default(),
                name: self.flow_name(flow.counter)?,
                mark: 0,
                target: TargetEntry::default(),
                counter: self.hits.flows.sum(flow.counter),
                dropped: self.sum(&self.maps.flow_drops, flow.counter)?,
            });
        }
        for reason in Reason::ALL.into_iter().skip(1) {
            counters.reasons.push((reason, self.sum(&self.maps.reasons, reason as u32)?));
        }
        counters.trace_lost = self.trace_lost()?;
        Ok(counters)
    }

    /// Until when packets are traced, by [`crate::monotonic`], ns; 0: they are not.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn trace_deadline(&self) -> Result<u64, Error> {
        Ok(self.read(&self.maps.trace, 0, Trace::default())?.until)
    }

    /// Whether packets are traced.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn traced(&self) -> Result<bool, Error> {
        Ok(self.trace_deadline()? > crate::sys::monotonic())
    }

    pub(crate) fn trace_lost(&self) -> Result<u64, Error> {
        Ok(self.sum(&self.maps.reasons, TRACE_LOST)?.packets)
    }

    fn stream_hits(&self, slot: u32, entry: &StreamEntry, stream: &str) -> Result<StreamHits, Error> {
        let mut hits = StreamHits { stream: stream.to_owned(), forwarded: Counter::default(), dropped: Vec::new() };
        for identifier in 1..=entry.max_targets {
            let one = self.hits.targets.sum(entry.target_base + identifier);
            hits.forwarded.packets += one.packets;
            hits.forwarded.bytes += one.bytes;
        }
        for reason in Reason::ALL.into_iter().filter(|reason| reason.drops()) {
            let dropped = self.sum(&self.maps.stream_drops, slot * MAX_REASONS as u32 + reason as u32)?;
            if dropped.packets > 0 {
                hits.dropped.push((reason, dropped));
            }
        }
        Ok(hits)
    }
}
