//! Which counter each flow has. Counters keep their place over changes of the classifier, by the flow's name.

use std::collections::{HashMap, HashSet};

use meridio_decision::layout::*;

use crate::config::Config;
use crate::engine::{Engine, failed};
use crate::error::Error;
use crate::sys::text;

/// The counters of a configuration.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    places: HashMap<String, u32>,
    /// Those that have none yet.
    fresh: Vec<String>,
    /// Flows whose counters are taken for them.
    gone: Vec<String>,
}

impl Plan {
    /// The counter of a flow of the configuration.
    pub(crate) fn of(&self, name: &str) -> u32 {
        self.places.get(name).copied().unwrap_or(0)
    }

    /// Finds places for `names`, of which some have one in `counters`. `live`: flows whose counters packets may use.
    fn new<'a>(
        names: impl Iterator<Item = &'a String>,
        counters: &HashMap<String, u32>,
        live: impl FnOnce() -> Result<HashSet<u32>, Error>,
    ) -> Result<Self, Error> {
        let mut plan = Plan::default();
        for name in names {
            match counters.get(name) {
                Some(place) => _ = plan.places.insert(name.clone(), *place),
                None => plan.fresh.push(name.clone()),
            }
        }
        let used: HashSet<u32> = counters.values().copied().collect();
        let mut free: Vec<u32> = (0..FLOW_COUNTERS).rev().filter(|place| !used.contains(place)).collect();
        if free.len() < plan.fresh.len() {
            // Flows of the generation that is about to be written over, and that nothing needs any more.
            let live = live()?;
            for (name, place) in counters {
                if !live.contains(place) && !plan.places.contains_key(name) {
                    plan.gone.push(name.clone());
                    free.push(*place);
                }
            }
        }
        for name in &plan.fresh {
            let none = || Error::config(format!("flow {name:?}"), format!("all {FLOW_COUNTERS} counters are taken"));
            plan.places.insert(name.clone(), free.pop().ok_or_else(none)?);
        }
        Ok(plan)
    }
}

impl Engine {
    /// Finds a counter for each flow; nothing is written.
    pub(crate) fn plan_counters(&self, config: &Config) -> Result<Plan, Error> {
        Plan::new(config.flows.iter().map(|f| &f.name), &self.counters, || self.live_counters())
    }

    /// Counters of the flows that packets are matched with, as the maps say: an earlier process may have written them.
    fn live_counters(&self) -> Result<HashSet<u32>, Error> {
        let generation = self.config.get().generation();
        if let Some(classifier) = &self.generations[generation as usize] {
            return Ok(classifier.flows.iter().map(|flow| flow.counter).collect());
        }
        let (vectors, flows) = (&self.kernel.maps.vectors, &self.kernel.maps.flows);
        // A ping matches every flow as far as the protocol goes.
        let all = generation * VECTORS + PROTO_BASE + class::PING;
        let all = vectors.get(&all, Vector::default()).map_err(failed(vectors))?.unwrap_or_default();
        let count: u32 = all.words.iter().map(|word| word.count_ones()).sum();
        let mut live = HashSet::new();
        for index in 0..count {
            let index = generation * MAX_FLOWS as u32 + index;
            let flow = flows.get(&index, FlowEntry::default()).map_err(failed(flows))?.unwrap_or_default();
            live.insert(flow.counter);
        }
        Ok(live)
    }

    /// Names and clears the counters of new flows. No packet may use the generation that is not active any more.
    pub(crate) fn take_counters(&mut self, plan: &Plan) -> Result<(), Error> {
        for name in &plan.gone {
            self.counters.remove(name);
        }
        for name in &plan.fresh {
            let index = plan.of(name);
            let (names, drops) = (&self.kernel.maps.flow_names, &self.kernel.maps.flow_drops);
            self.kernel.hits.flows.zero(index).map_err(failed(&self.kernel.maps.flow_hits))?;
            drops.zero(index, self.kernel.cpus).map_err(failed(drops))?;
            names.set(&index, &text(name)).map_err(failed(names))?;
            self.counters.insert(name.clone(), index);
        }
        Ok(())
    }

    /// Frees the counters of flows that are in neither generation.
    pub(crate) fn forget_counters(&mut self) -> Result<(), Error> {
        let used: HashSet<&String> = self.generations.iter().flatten().flat_map(|g| &g.names).collect();
        let gone: Vec<String> = self.counters.keys().filter(|name| !used.contains(name)).cloned().collect();
        for name in gone {
            if let Some(index) = self.counters.remove(&name) {
                let map = &self.kernel.maps.flow_names;
                map.set(&index, &[0u8; 128]).map_err(failed(map))?;
            }
        }
        Ok(())
    }
}
