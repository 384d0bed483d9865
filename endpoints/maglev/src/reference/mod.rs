//! The model that is obviously right: one packet, all flows in order, the table row by row. Slow, and written apart from
//! the decision that it checks.

mod after;
mod headers;
mod table;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use headers::{Key, addresses, key};
use ipnet::IpNet;
pub use table::{base_table, row_owner};

use crate::Reason;
use crate::config::{Config, Flow, Protocol, Targets};

/// What should happen to a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Not ours.
    Pass,
    /// Dropped.
    Drop(Reason),
    /// To the target of this flow, stream and identifier, with a translated port.
    Forward {
        /// Flow name.
        flow: String,
        /// Target.
        identifier: u32,
        /// Translated port, 0: none.
        nat_port: u16,
    },
}

fn in_ranges(ranges: &[(u16, u16)], port: Option<u16>) -> bool {
    let any = ranges.is_empty() || ranges.contains(&(0, 65_535));
    any || port.is_some_and(|p| ranges.iter().any(|(low, high)| (*low..=*high).contains(&p)))
}

fn matches(flow: &Flow, k: &Key, b: &[u8]) -> bool {
    let inside = |nets: &[IpNet], a: IpAddr| nets.iter().any(|n| n.contains(&a));
    if !(flow.destinations.is_empty() || inside(&flow.destinations, k.dst)) {
        return false;
    }
    // All of length 0, of whichever IP version: no constraint.
    let any = !flow.sources.iter().any(|net| net.prefix_len() > 0);
    if !(any || inside(&flow.sources, k.src)) {
        return false;
    }
    if k.ping.is_some() {
        return true;
    }
    let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| p.number() == k.protocol);
    if !(flow.protocols.is_empty() || protocol.is_some_and(|p| flow.protocols.contains(&p))) {
        return false;
    }
    in_ranges(&flow.destination_ports, k.ports.map(|p| p.1))
        && in_ranges(&flow.source_ports, k.ports.map(|p| p.0))
        && bytes_match(flow, k, b)
}

fn bytes_match(flow: &Flow, k: &Key, b: &[u8]) -> bool {
    flow.byte_matches.iter().filter(|m| m.protocol.number() == k.protocol).all(|m| {
        let (offset, size) = (m.offset as usize, m.size as usize);
        let turned: Vec<u8>;
        let header: &[u8] = if k.quote {
            if offset + size > 4 {
                return true;
            }
            let (s, d) = k.ports.unwrap_or_default();
            turned = [s.to_be_bytes(), d.to_be_bytes()].concat();
            &turned
        } else {
            &b[k.l4..]
        };
        let Some(bytes) = header.get(offset..offset + size) else { return false };
        let value = bytes.iter().fold(0u32, |v, b| (v << 8) | *b as u32);
        value & m.mask == m.value
    })
}

/// The model.
pub struct Reference {
    config: Config,
    targets: BTreeMap<String, Targets>,
    bases: BTreeMap<u32, Arc<Vec<u16>>>,
    fragments: RefCell<HashMap<Fragment, (String, u32)>>,
}

/// What the fragments of a packet have in common: addresses, identification, protocol if each of them says it.
type Fragment = (IpAddr, IpAddr, u32, Option<u8>);

/// The base table of a stream; made once, because it depends on nothing else.
fn shared_base(max_targets: u32) -> Arc<Vec<u16>> {
    static TABLES: Mutex<BTreeMap<u32, Arc<Vec<u16>>>> = Mutex::new(BTreeMap::new());
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    tables.entry(max_targets).or_insert_with(|| Arc::new(base_table(max_targets))).clone()
}

impl Reference {
    /// A model of a faultless configuration.
    pub fn new(config: Config, targets: BTreeMap<String, Targets>) -> Self {
        let bases = config.streams.iter().map(|s| (s.max_targets, shared_base(s.max_targets))).collect();
        Reference { config, targets, bases, fragments: RefCell::default() }
    }

    /// What should happen to a packet (from its network header on), whose first fragments are remembered.
    pub fn answer(&self, b: &[u8], v6: bool) -> Answer {
        let Some((_, dst)) = addresses(b, v6) else { return Answer::Pass };
        if !self.config.vips.iter().any(|vip| vip.contains(&dst)) {
            return Answer::Pass;
        }
        let k = match key(b, v6) {
            Ok(Some(k)) => k,
            Ok(None) => return Answer::Pass,
            Err(reason) => return Answer::Drop(reason),
        };
        // In IPv6 only the first fragment says the protocol.
        let fragment = (k.src, k.dst, k.id, (!v6).then_some(k.protocol));
        if k.later_fragment {
            return match self.fragments.borrow().get(&fragment) {
                None => Answer::Drop(Reason::FragmentUnknown),
                Some((stream, identifier)) if self.ready(stream).contains(identifier) => {
                    Answer::Forward { flow: String::new(), identifier: *identifier, nat_port: 0 }
                }
                Some(_) => Answer::Drop(Reason::NoTarget),
            };
        }
        let matching = self.config.flows.iter().filter(|flow| matches(flow, &k, b));
        let winner = matching.min_by(|a, b| b.priority.cmp(&a.priority).then(a.name.cmp(&b.name)));
        let Some(flow) = winner else { return Answer::Drop(Reason::NoFlow) };
        let nat_port = self.nat(&k);
        let Some(identifier) = self.target(flow, &k) else { return Answer::Drop(Reason::NoTarget) };
        if nat_port != 0 && k.protocol == 132 && k.first_fragment {
            return Answer::Drop(Reason::Untranslatable);
        }
        if k.first_fragment {
            self.fragments.borrow_mut().insert(fragment, (flow.stream.clone(), identifier));
        }
        Answer::Forward { flow: flow.name.clone(), identifier, nat_port }
    }

    /// Forgets all first fragments.
    pub fn forget_fragments(&self) {
        self.fragments.borrow_mut().clear();
    }

    /// How many first fragments are remembered.
    pub fn remembered(&self) -> usize {
        self.fragments.borrow().len()
    }

    fn ready(&self, stream: &str) -> Vec<u32> {
        self.targets.get(stream).map(|targets| targets.keys().copied().collect()).unwrap_or_default()
    }

    fn target(&self, flow: &Flow, k: &Key) -> Option<u32> {
        let stream = self.config.streams.iter().find(|s| s.name == flow.stream)?;
        let addresses = if stream.sctp_ports_only && k.protocol == 132 { None } else { Some((k.src, k.dst)) };
        let hash = table::hash(addresses, k.protocol, k.ports.unwrap_or((k.ping.unwrap_or(0), 0)));
        let row = table::row(hash, table::rows(stream.max_targets)?);
        row_owner(self.bases.get(&stream.max_targets)?, stream.max_targets, &self.ready(&stream.name), row)
    }

    fn nat(&self, k: &Key) -> u16 {
        let Some((_, dport)) = k.ports else { return 0 };
        let nat = self.config.nats.iter().find(|n| {
            n.protocol.number() == k.protocol && n.port == dport && n.vips.iter().any(|v| v.contains(&k.dst))
        });
        nat.map_or(0, |n| n.target_port)
    }
}
