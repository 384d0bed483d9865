//! The tables in the memory of this process: what `why`, `plan` and tests ask.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::net::Ipv6Addr;

use ipnet::Ipv6Net;
use meridio_decision::layout::*;
use meridio_decision::{Decision, NONE, Packet, Scratch, Tables, decide};

use crate::classifier::{Classifier, compile};
use crate::config::{Config, Targets};
use crate::error::Error;
use crate::table::Table;

/// A packet from its network header on.
pub struct Bytes<'a>(pub &'a [u8]);

impl Packet for Bytes<'_> {
    fn len(&self) -> u32 {
        self.0.len() as u32
    }

    /// Longer than any header can say: what else it may stand for cannot be seen here.
    fn is_super(&self) -> bool {
        self.0.len() > 40 + u16::MAX as usize
    }

    fn read_into<const N: usize>(&self, offset: u32, bytes: &mut [u8; N]) -> bool {
        match self.0.get(offset as usize..).and_then(|rest| rest.first_chunk::<N>()) {
            Some(chunk) => {
                *bytes = *chunk;
                true
            }
            None => false,
        }
    }
}

/// A whole load balancer in memory.
pub struct Image {
    pub(crate) classifier: Classifier,
    pub(crate) streams: Vec<StreamEntry>,
    pub(crate) stream_names: Vec<String>,
    pub(crate) rows: Vec<Vec<u16>>,
    pub(crate) targets: HashMap<u32, TargetEntry>,
    pub(crate) fragments: RefCell<HashMap<FragmentKey, FragmentValue>>,
    pub(crate) clock: Cell<u64>,
    /// Somebody holds fragments that come before their first one.
    pub(crate) holds: bool,
    pub(crate) unused: ByteList,
    pub(crate) unused_stream: StreamEntry,
}

/// Chunk numbers of an image: those of a stream begin at this times its slot.
pub(crate) const CHUNKS_PER_STREAM: u32 = 32;

impl Image {
    /// Compiles a configuration with its targets by stream name.
    ///
    /// # Errors
    /// The first fault of the configuration.
    pub fn new(config: &Config, targets: &BTreeMap<String, Targets>) -> Result<Self, Error> {
        if let Some(fault) = config.faults().into_iter().next() {
            return Err(fault);
        }
        let slot = |name: &str| config.streams.iter().position(|s| s.name == name).map_or(NONE, |n| n as u32);
        let mut next = 0;
        let classifier = compile(config, &slot, &mut |_| {
            next += 1;
            next - 1
        })?;
        let mut image = Image {
            classifier,
            streams: Vec::new(),
            stream_names: config.streams.iter().map(|s| s.name.clone()).collect(),
            rows: Vec::new(),
            targets: HashMap::new(),
            fragments: RefCell::default(),
            clock: Cell::new(0),
            holds: true,
            unused: ByteList::default(),
            unused_stream: StreamEntry::default(),
        };
        let mut base = 0;
        for (n, stream) in config.streams.iter().enumerate() {
            let Some(mut table) = Table::new(stream.max_targets) else { continue };
            let empty = Targets::new();
            let ready = targets.get(&stream.name).unwrap_or(&empty);
            table.set(ready.keys().copied());
            for (identifier, target) in ready {
                let index = meridio_decision::target_index(base, *identifier, 0);
                image.targets.insert(index, crate::engine::target_entry(target, base + identifier));
            }
            image.streams.push(StreamEntry {
                ready: [!table.ready().is_empty() as u32, 0],
                rows: table.rows().len() as u32,
                chunk: [n as u32 * CHUNKS_PER_STREAM, 0],
                target_base: base,
                max_targets: stream.max_targets,
                flags: if stream.sctp_ports_only { stream_flag::SCTP_PORTS_ONLY } else { 0 },
                ..StreamEntry::default()
            });
            image.rows.push(table.rows().to_vec());
            base += stream.max_targets + 1;
        }
        Ok(image)
    }

    /// Decides about a packet (from its network header on).
    pub fn decide(&self, packet: &[u8], ethertype: u16) -> Decision {
        self.examine(packet, ethertype).decision
    }

    /// As [`Image::decide`], with everything that was found on the way.
    pub(crate) fn examine(&self, packet: &[u8], ethertype: u16) -> Scratch {
        let mut scratch = Scratch::default();
        decide(&Bytes(packet), self, ethertype, &mut scratch);
        scratch
    }

    /// Name of the flow with an index of a decision.
    pub fn flow_name(&self, index: u32) -> Option<&str> {
        self.classifier.names.get(index as usize).map(String::as_str)
    }

    /// Forgets where first fragments went.
    pub fn forget_fragments(&self) {
        self.fragments.borrow_mut().clear();
    }

    /// Moves the clock that fragments age by, ns.
    pub fn set_clock(&self, now: u64) {
        self.clock.set(now);
    }
}

/// The value of the longest prefix around an address. Tries the lengths that there are, the longest first.
fn longest(map: &BTreeMap<PrefixKey, u32>, key: &PrefixKey) -> Option<u32> {
    let mut bits = PREFIX_KEY_BITS + 128;
    loop {
        let last = PrefixKey { bits, space: u32::MAX, address: [u8::MAX; 16] };
        bits = map.range(..=last).next_back()?.0.bits;
        let length = bits.checked_sub(PREFIX_KEY_BITS)?;
        let net = Ipv6Net::new(Ipv6Addr::from(key.address), length as u8).ok()?.trunc();
        let found = map.get(&PrefixKey { bits, space: key.space, address: net.addr().octets() });
        if found.is_some() {
            return found.copied();
        }
        bits = bits.checked_sub(1)?;
    }
}

impl Tables for Image {
    fn generation(&self) -> (u32, u32) {
        (0, self.classifier.flags)
    }

    fn destination(&self, key: &PrefixKey, _switches: u32) -> Option<u32> {
        longest(&self.classifier.vips, key)
    }

    fn source(&self, key: &PrefixKey, _switches: u32) -> u32 {
        longest(&self.classifier.sources, key).unwrap_or(0)
    }

    fn dport(&self, _generation: u32, port: u16) -> u32 {
        self.classifier.dports.get(port as usize).copied().unwrap_or(0) as u32
    }

    fn sport(&self, _generation: u32, port: u16) -> u32 {
        self.classifier.sports.get(port as usize).copied().unwrap_or(0) as u32
    }

    fn vector(&self, index: u32) -> Option<&Vector> {
        self.classifier.vectors.get(&index)
    }

    fn flow(&self, _generation: u32, index: u32) -> Option<&FlowEntry> {
        self.classifier.flows.get(index as usize)
    }

    fn byte_list(&self, _generation: u32, index: u32) -> Option<&ByteList> {
        Some(self.classifier.byte_lists.get(index as usize).unwrap_or(&self.unused))
    }

    fn stream(&self, slot: u32) -> Option<&StreamEntry> {
        self.streams.get(slot as usize).or((slot < MAX_STREAMS as u32).then_some(&self.unused_stream))
    }

    fn active(&self, stream: &StreamEntry) -> u32 {
        stream.active
    }

    fn row(&self, chunk: u32, index: u32) -> Option<u16> {
        let rows = self.rows.get((chunk / CHUNKS_PER_STREAM) as usize)?;
        rows.get((chunk % CHUNKS_PER_STREAM) as usize * CHUNK_ROWS + index as usize).copied()
    }

    fn target(&self, index: u32) -> Option<&TargetEntry> {
        self.targets.get(&index)
    }

    fn nat(&self, key: &NatKey) -> Option<u16> {
        self.classifier.nats.get(key).copied()
    }

    fn fragment(&self, key: &FragmentKey) -> Option<FragmentValue> {
        self.fragments.borrow().get(key).copied()
    }

    fn remember(&self, key: &FragmentKey, value: &FragmentValue) {
        self.fragments.borrow_mut().insert(*key, *value);
    }

    fn now(&self) -> u64 {
        self.clock.get()
    }
}
