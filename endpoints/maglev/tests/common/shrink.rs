//! From a case that fails to the smallest one that fails: take things away as long as it does.

use std::collections::BTreeMap;
use std::fmt;

use meridio_maglev::{Config, Targets};

/// A configuration and a packet.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) config: Config,
    pub(crate) targets: BTreeMap<String, Targets>,
    /// What came before and is remembered: first fragments.
    pub(crate) before: Vec<(Vec<u8>, bool)>,
    pub(crate) packet: Vec<u8>,
    pub(crate) v6: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ready: Vec<_> = self.targets.iter().map(|(s, t)| (s, t.keys().collect::<Vec<_>>())).collect();
        for (packet, _) in &self.before {
            writeln!(f, "before: {packet:02x?}")?;
        }
        write!(f, "{} {:02x?}\nready {ready:?}\n{:#?}", if self.v6 { "IPv6" } else { "IPv4" }, self.packet, self.config)
    }
}

/// Attempts at most: each may cost a kernel configuration.
const ATTEMPTS: usize = 4_000;

/// The list without a part: without everything, halves, quarters, ... single items.
fn without_parts<T: Clone>(list: &[T]) -> Vec<Vec<T>> {
    let mut out = Vec::new();
    let mut size = list.len();
    while size > 0 {
        for from in (0..list.len()).step_by(size) {
            let to = (from + size).min(list.len());
            out.push([&list[..from], &list[to..]].concat());
        }
        size /= 2;
    }
    out
}

/// Everything that is one step smaller.
fn smaller(case: &Case) -> Vec<Case> {
    let mut out = Vec::new();
    let mut with = |change: &dyn Fn(&mut Case)| {
        let mut new = case.clone();
        change(&mut new);
        out.push(new);
    };
    for before in without_parts(&case.before) {
        with(&|c| c.before = before.clone());
    }
    for flows in without_parts(&case.config.flows) {
        with(&|c| c.config.flows = flows.clone());
    }
    for nats in without_parts(&case.config.nats) {
        with(&|c| c.config.nats = nats.clone());
    }
    for streams in without_parts(&case.config.streams) {
        with(&|c| {
            c.config.streams = streams.clone();
            c.targets.retain(|name, _| streams.iter().any(|s| s.name == *name));
        });
    }
    for vips in without_parts(&case.config.vips) {
        with(&|c| c.config.vips = vips.clone());
    }
    for (name, targets) in &case.targets {
        let ids: Vec<u32> = targets.keys().copied().collect();
        for ids in without_parts(&ids) {
            with(&|c| c.targets.get_mut(name).unwrap().retain(|id, _| ids.contains(id)));
        }
    }
    for (n, flow) in case.config.flows.iter().enumerate() {
        macro_rules! lists {
            ($($field:ident),*) => { $(
                for list in without_parts(&flow.$field) {
                    with(&|c| c.config.flows[n].$field = list.clone());
                }
            )* };
        }
        lists!(destinations, sources, protocols, destination_ports, source_ports, byte_matches);
        if flow.priority != 0 {
            with(&|c| c.config.flows[n].priority = 0);
        }
    }
    let length = case.packet.len();
    for keep in [length / 2, length * 3 / 4, length.saturating_sub(1)] {
        if keep < length {
            with(&|c| c.packet.truncate(keep));
        }
    }
    for (n, byte) in case.packet.iter().enumerate() {
        if *byte != 0 {
            with(&|c| c.packet[n] = 0);
        }
    }
    out
}

/// The smallest case that `fails` and that shrinking step by step comes to.
pub(crate) fn shrink(mut case: Case, fails: &mut dyn FnMut(&Case) -> bool) -> Case {
    let mut attempts = 0;
    'smaller: loop {
        for candidate in smaller(&case) {
            attempts += 1;
            if attempts > ATTEMPTS {
                return case;
            }
            if candidate.config.faults().is_empty() && fails(&candidate) {
                case = candidate;
                continue 'smaller;
            }
        }
        return case;
    }
}
