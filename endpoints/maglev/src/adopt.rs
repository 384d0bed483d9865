//! What an earlier process has left in the maps.

use std::collections::BTreeMap;

use meridio_decision::layout::*;
use meridio_decision::target_index;

use crate::config::Stream;
use crate::engine::{Engine, Slot, failed};
use crate::error::Error;
use crate::grace::Retired;
use crate::sys::untext;
use crate::table::Table;

impl Engine {
    /// Learns streams, targets and counters from the maps.
    pub(crate) fn adopt(&mut self) -> Result<(), Error> {
        for slot in 0..MAX_STREAMS as u32 {
            let streams = &self.kernel.maps.streams;
            let entry = streams.get(&slot, StreamEntry::default()).map_err(failed(streams))?.unwrap_or_default();
            if entry.rows == 0 {
                continue;
            }
            let names = &self.kernel.maps.stream_names;
            let name = names.get(&slot, [0u8; 128]).map_err(failed(names))?.unwrap_or([0; 128]);
            let Some(mut table) = Table::new(entry.max_targets) else { continue };
            let mut targets = [BTreeMap::new(), BTreeMap::new()];
            for identifier in 1..=entry.max_targets {
                for copy in 0..2 {
                    let index = target_index(entry.target_base, identifier, copy);
                    let map = &self.kernel.maps.targets;
                    let found = map.get(&index, TargetEntry::default()).map_err(failed(map))?.unwrap_or_default();
                    if found.mark != 0 {
                        targets[copy as usize].insert(identifier, found);
                    }
                }
            }
            table.set(targets[(entry.active & 1) as usize].keys().copied());
            let stream = Stream {
                name: untext(&name),
                max_targets: entry.max_targets,
                sctp_ports_only: entry.flags & stream_flag::SCTP_PORTS_ONLY != 0,
            };
            let retired = Retired::now(&self.kernel.grace);
            self.slots.insert(slot, Slot { stream, entry, table, targets, unsure: [false; 2], retired });
            self.next_slot = (slot + 1) % MAX_STREAMS as u32;
        }
        let generation = self.config.get().generation();
        for index in 0..2 * MAX_FLOWS as u32 {
            let names = &self.kernel.maps.flow_names;
            let name = untext(&names.get(&index, [0u8; 128]).map_err(failed(names))?.unwrap_or([0; 128]));
            if !name.is_empty() {
                self.counters.insert(name, index);
            }
        }
        tracing::info!(streams = self.slots.len(), generation, "adopted the load balancer's maps");
        Ok(())
    }
}
