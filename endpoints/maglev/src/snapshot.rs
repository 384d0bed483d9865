//! The tables of a running load balancer as an [`Image`]: the same decision code gives the live answer.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};

use meridio_decision::layout::*;
use meridio_decision::target_index;

use crate::classifier::Classifier;
use crate::engine::failed;
use crate::error::Error;
use crate::image::{CHUNKS_PER_STREAM, Image};
use crate::live::Live;
use crate::sys;
use crate::table::chunks_for;

/// How often a table that changes while it is read is read again.
const ATTEMPTS: u32 = 10;

impl Image {
    /// Reads the tables that packets go by at this moment.
    ///
    /// # Errors
    /// A map cannot be read, there is no configuration yet, or it changes faster than it can be read.
    pub fn of(live: &Live) -> Result<Image, Error> {
        for _ in 0..ATTEMPTS {
            let before = (live.config()?, live.stream_entries()?);
            if before.0.version != LAYOUT_VERSION {
                return Err(Error::config("load balancer", "has no configuration yet"));
            }
            let image = read(live, &before.0, &before.1)?;
            if (live.config()?, live.stream_entries()?) == before {
                return Ok(image);
            }
        }
        Err(Error::config("load balancer", format!("its tables changed {ATTEMPTS} times while they were read")))
    }
}

fn read(live: &Live, config: &Config, entries: &[(u32, StreamEntry)]) -> Result<Image, Error> {
    let mut image = Image {
        classifier: classifier(live, config)?,
        streams: Vec::new(),
        stream_names: Vec::new(),
        rows: Vec::new(),
        targets: HashMap::new(),
        fragments: RefCell::new(fragments(live)?),
        clock: Cell::new(sys::monotonic()),
        holds: config.hold != 0,
        unused: ByteList::default(),
        unused_stream: StreamEntry::default(),
    };
    for (slot, entry) in entries {
        let slot = *slot as usize;
        // Slots are not always used without gaps.
        image.streams.resize(slot + 1, StreamEntry::default());
        image.stream_names.resize(slot + 1, String::new());
        image.rows.resize(slot + 1, Vec::new());
        let copy = (entry.active & 1) as usize;
        let mut rows = Vec::new();
        for chunk in 0..chunks_for(entry.rows) {
            rows.extend(live.maps.rows.chunk(entry.chunk[copy] + chunk).map_err(failed(&live.maps.rows))?);
        }
        for (identifier, target) in live.ready(entry)? {
            image.targets.insert(target_index(entry.target_base, identifier, 0), target);
        }
        image.rows[slot] = rows;
        image.stream_names[slot] = live.stream_name(slot as u32)?;
        image.streams[slot] = StreamEntry {
            active: 0,
            ready: [entry.ready[copy], 0],
            chunk: [slot as u32 * CHUNKS_PER_STREAM, 0],
            ..*entry
        };
    }
    Ok(image)
}

fn classifier(live: &Live, config: &Config) -> Result<Classifier, Error> {
    let generation = config.generation();
    let mut c = Classifier {
        flags: config.flags[generation as usize],
        vips: prefixes(&live.maps.vips, generation)?,
        sources: prefixes(&live.maps.sources, generation)?,
        dports: live.maps.ports.ports(generation * 2).map_err(failed(&live.maps.ports))?,
        sports: live.maps.ports.ports(generation * 2 + 1).map_err(failed(&live.maps.ports))?,
        vectors: BTreeMap::new(),
        flows: Vec::new(),
        byte_lists: Vec::new(),
        names: Vec::new(),
        nats: BTreeMap::new(),
    };
    for index in 0..VECTORS {
        c.vectors.insert(index, live.read(&live.maps.vectors, generation * VECTORS + index, Vector::default())?);
    }
    for index in 0..live.flow_count(generation)? {
        let flow = live.read(&live.maps.flows, generation * MAX_FLOWS as u32 + index, FlowEntry::default())?;
        c.names.push(live.flow_name(flow.counter)?);
        c.flows.push(flow);
    }
    for index in 0..MAX_BYTE_LISTS as u32 {
        let place = generation * MAX_BYTE_LISTS as u32 + index;
        c.byte_lists.push(live.read(&live.maps.byte_lists, place, ByteList::default())?);
    }
    for key in live.maps.nats.keys(NatKey::default()).map_err(failed(&live.maps.nats))? {
        if key.generation == generation
            && let Some(port) = live.maps.nats.get(&key, 0u32).map_err(failed(&live.maps.nats))?
        {
            c.nats.insert(NatKey { generation: 0, ..key }, port as u16);
        }
    }
    Ok(c)
}

fn prefixes(map: &sys::RawMap, generation: u32) -> Result<BTreeMap<PrefixKey, u32>, Error> {
    let mut found = BTreeMap::new();
    for key in map.keys(PrefixKey::default()).map_err(failed(map))? {
        if key.space & 1 == generation
            && let Some(class) = map.get(&key, 0u32).map_err(failed(map))?
        {
            found.insert(PrefixKey { space: key.space & !1, ..key }, class);
        }
    }
    Ok(found)
}

fn fragments(live: &Live) -> Result<HashMap<FragmentKey, FragmentValue>, Error> {
    let map = &live.maps.fragments;
    let mut found = HashMap::new();
    for key in map.keys(FragmentKey::default()).map_err(failed(map))? {
        if let Some(value) = map.get(&key, FragmentValue::default()).map_err(failed(map))? {
            found.insert(key, value);
        }
    }
    Ok(found)
}
