//! Writing what packets do not read at the moment: a generation of the classifier, a copy of a table.

use std::collections::BTreeMap;

use meridio_decision::layout::*;

use crate::classifier::Classifier;
use crate::engine::failed;
use crate::error::Error;
use crate::maps::Maps;
use crate::sys::RawMap;

/// Writes a generation of the classifier. `before`: what the generation is known to hold.
pub(crate) fn write_generation(
    k: &Maps,
    generation: u32,
    c: &Classifier,
    before: Option<&Classifier>,
) -> Result<(), Error> {
    write_prefixes(&k.vips, generation, &c.vips)?;
    write_prefixes(&k.sources, generation, &c.sources)?;
    for (n, (map, old)) in
        [(&c.dports, before.map(|b| &b.dports)), (&c.sports, before.map(|b| &b.sports))].into_iter().enumerate()
    {
        if old != Some(map) {
            k.ports.set(&(generation * 2 + n as u32), map.as_ref()).map_err(failed(&k.ports))?;
        }
    }
    for (index, vector) in &c.vectors {
        if before.is_none_or(|b| b.vectors.get(index) != Some(vector)) {
            k.vectors.set(&(generation * VECTORS + index), vector).map_err(failed(&k.vectors))?;
        }
    }
    for (index, flow) in c.flows.iter().enumerate() {
        if before.is_none_or(|b| b.flows.get(index) != Some(flow)) {
            let index = generation * MAX_FLOWS as u32 + index as u32;
            k.flows.set(&index, flow).map_err(failed(&k.flows))?;
        }
    }
    for index in 0..MAX_BYTE_LISTS {
        let list = c.byte_lists.get(index).copied().unwrap_or_default();
        let index = generation * MAX_BYTE_LISTS as u32 + index as u32;
        k.byte_lists.set(&index, &list).map_err(failed(&k.byte_lists))?;
    }
    let stale = k.nats.keys(NatKey::default()).map_err(failed(&k.nats))?;
    for key in stale.iter().filter(|key| key.generation == generation) {
        if !c.nats.contains_key(&NatKey { generation: 0, ..*key }) {
            k.nats.delete(key).map_err(failed(&k.nats))?;
        }
    }
    for (key, port) in &c.nats {
        k.nats.set(&NatKey { generation, ..*key }, &(*port as u32)).map_err(failed(&k.nats))?;
    }
    Ok(())
}

/// Writes a table to the chunks from `first` on.
pub(crate) fn write_rows(map: &RawMap, first: u32, rows: &[u16]) -> Result<(), Error> {
    let mut padded = vec![0u16; CHUNK_ROWS];
    for (n, rows) in rows.chunks(CHUNK_ROWS).enumerate() {
        let chunk: &[u16; CHUNK_ROWS] = match rows.try_into() {
            Ok(whole) => whole,
            Err(_) => {
                padded[..rows.len()].copy_from_slice(rows);
                match padded.as_slice().try_into() {
                    Ok(whole) => whole,
                    Err(_) => continue,
                }
            }
        };
        map.set_slice(first + n as u32, chunk).map_err(failed(map))?;
    }
    Ok(())
}

fn write_prefixes(map: &RawMap, generation: u32, wanted: &BTreeMap<PrefixKey, u32>) -> Result<(), Error> {
    for key in map.keys(PrefixKey::default()).map_err(failed(map))? {
        if key.space & 1 == generation && !wanted.contains_key(&PrefixKey { space: key.space & !1, ..key }) {
            map.delete(&key).map_err(failed(map))?;
        }
    }
    for (key, class) in wanted {
        map.set(&PrefixKey { space: key.space | generation, ..*key }, class).map_err(failed(map))?;
    }
    Ok(())
}
