//! The engine: takes configurations and targets, keeps the kernel's maps in step, and never shows a packet anything
//! half-written. What is in use is not touched: the other generation (classifier) or copy (stream) is written, then one number
//! switches.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use meridio_decision::layout::*;
use meridio_decision::{NONE, target_index};

use crate::classifier::{Classifier, compile};
use crate::config::{Config, Stream, Target, Targets};
use crate::config_entry::ConfigEntry;
use crate::counters::Plan;
use crate::detour::{Detour, Retry};
use crate::error::Error;
use crate::gone;
use crate::grace::Retired;
use crate::kernel::{Kernel, Options, remove_pins};
use crate::owner::Lock;
use crate::quote::Known;
use crate::steps::{Placed, place, within};
use crate::sys::{RawMap, monotonic, text};
use crate::table::Table;
use crate::write::{write_generation, write_rows};

/// Set in every mark, so that one rule can tell packets that this program marked.
pub const MARK_FLAG: u32 = 0x4d00_0000;
/// The part of a mark that is identifier plus offset.
pub const MARK_MASK: u32 = 0x00ff_ffff;

/// How the engine is set up.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Maps and their place.
    pub kernel: Options,
    /// Smallest firewall mark and routing table number of a target (`NSM_IDENTIFIER_OFFSET_START`).
    pub offset_start: u32,
}

/// A stream as it lies in the maps.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) stream: Stream,
    pub(crate) entry: StreamEntry,
    pub(crate) table: Table,
    pub(crate) targets: [BTreeMap<u32, TargetEntry>; 2],
    /// What is known of a copy's targets may be wrong: writing them was interrupted by an error.
    pub(crate) unsure: [bool; 2],
    pub(crate) retired: Retired,
}

/// The load balancer in the kernel.
#[derive(Debug)]
pub struct Engine {
    pub(crate) kernel: Kernel,
    pub(crate) settings: Settings,
    pub(crate) config: Arc<ConfigEntry>,
    pub(crate) slots: BTreeMap<u32, Slot>,
    pub(crate) counters: HashMap<String, u32>,
    pub(crate) generations: [Option<Classifier>; 2],
    retired: Retired,
    /// Slot that the next new stream gets if it is free.
    pub(crate) next_slot: u32,
    adopted: bool,
    detour: Result<Detour, String>,
    retry: Retry,
}

/// The map entry of a target. `mark`: firewall mark of its slow path; 0 is that of an entry without a target.
pub(crate) fn target_entry(target: &Target, mark: u32) -> TargetEntry {
    TargetEntry {
        v4: target.v4.map(|(a, _)| a.octets()).unwrap_or_default(),
        ifindex4: target.v4.map(|(_, i)| i).unwrap_or_default(),
        v6: target.v6.map(|(a, _)| a.octets()).unwrap_or_default(),
        ifindex6: target.v6.map(|(_, i)| i).unwrap_or_default(),
        mark,
        mtu: target.mtu,
        direct: target.direct as u32,
    }
}

pub(crate) fn failed(map: &RawMap) -> impl Fn(std::io::Error) -> Error + use<> {
    let name = map.name;
    move |e| Error::Map { name, reason: e.to_string() }
}

impl Engine {
    /// Loads the programs; adopts the maps of an earlier process when they hold a complete configuration.
    ///
    /// # Errors
    /// No BPF file system, no rights, or a refusal of the kernel.
    pub fn open(settings: Settings) -> Result<Self, Error> {
        let kernel = Kernel::load(&settings.kernel)?;
        let config = Arc::new(ConfigEntry::open(&kernel.maps.config)?);
        let mut engine = Engine {
            adopted: config.get().version == LAYOUT_VERSION,
            kernel,
            settings,
            config,
            slots: BTreeMap::new(),
            counters: HashMap::new(),
            generations: [None, None],
            // An earlier process may have switched a moment ago.
            retired: Retired::Busy,
            next_slot: 0,
            detour: Err("not attached yet".into()),
            retry: Retry::default(),
        };
        // Whoever held fragments before holds them no longer.
        engine.config.change(|config| config.hold = 0)?;
        if engine.adopted {
            engine.adopt()?;
        }
        Ok(engine)
    }

    /// Index of the interface through which this process takes back what the program cannot place at once: fragments
    /// that arrive before their first one, and (if routed there) ICMP errors that this machine makes about replies of VIPs.
    ///
    /// # Errors
    /// Why there is none (any more): these packets are dropped then. [`Engine::tend`] makes another one.
    pub fn detour(&self) -> Result<u32, String> {
        let detour = self.detour.as_ref().map_err(String::clone)?;
        detour.fault().map_or(Ok(detour.index), Err)
    }

    /// Looks after what others may have broken, the interface of [`Engine::detour`]: makes another one in the network namespace of this
    /// thread if it is gone, and tries again later and later if that fails. To be called every few seconds once attached.
    pub fn tend(&mut self) {
        let now = Instant::now();
        if self.detour().is_ok() || !self.retry.due(now) {
            return;
        }
        self.start_detour();
        self.retry.done(self.detour.is_ok(), now);
    }

    fn start_detour(&mut self) {
        if self.detour().is_ok() {
            return;
        }
        let (kernel, config) = (&mut self.kernel, self.config.clone());
        let maps = &kernel.maps;
        let clone = |map: &RawMap| map.try_clone().map_err(|e| e.to_string());
        let all = [&maps.fragments, &maps.vips, &maps.nats].map(clone);
        let [fragments, vips, nats] = all;
        self.detour = fragments.and_then(|fragments| {
            let known = Known { vips: vips?, nats: nats?, config };
            Detour::start(fragments, known, |name| kernel.attach_ingress(name))
        });
        if let Err(error) = &self.detour {
            tracing::warn!(error, "fragments out of order are dropped");
        }
    }

    /// Chunks of the row map: as many as it was made with, by whichever process.
    pub fn chunks(&self) -> u32 {
        self.kernel.chunks
    }

    /// Whether the maps held a complete configuration when this engine was opened.
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// Whether the maps hold a complete configuration now.
    pub fn configured(&self) -> bool {
        self.config.get().version == LAYOUT_VERSION
    }

    /// Attaches the programs to an interface, or replaces what was attached before, without a gap.
    ///
    /// # Errors
    /// The interface does not exist or the kernel refuses.
    pub fn attach(&mut self, interface: &str) -> Result<(), Error> {
        self.kernel.attach(interface)?;
        // Programs of another layout are gone from here now, so are their maps.
        if let Err(error) = remove_pins(&self.settings.kernel.directory, Some(&self.settings.kernel)) {
            tracing::warn!(%error, "maps of another version stay");
        }
        self.start_detour();
        Ok(())
    }

    /// Whether a load balancer of any version is attached to an interface of this network namespace, by this process or another one.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn attached(interface: &str) -> Result<bool, Error> {
        Kernel::attached(interface)
    }

    /// What is missing of the programs on an interface, in words; nothing: all is as [`Engine::attach`] left it. To be asked every
    /// few seconds: others may take the programs away, and nobody is told.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    pub fn missing(&mut self, interface: &str) -> Result<Vec<&'static str>, Error> {
        self.kernel.missing(interface)
    }

    /// Removes programs and maps: the end of forwarding, on request only.
    ///
    /// # Errors
    /// A process still runs the load balancer, and would go on; or what could not be removed.
    pub fn remove(directory: &std::path::Path, interfaces: &[&str]) -> Result<(), Error> {
        let _lock = Lock::existing(directory)?;
        for interface in interfaces {
            Kernel::detach(interface)?;
            crate::qdisc::remove_unused(interface).map_err(|e| Error::Attach {
                interface: (*interface).to_owned(),
                reason: format!("clsact cannot be removed: {e}"),
            })?;
        }
        remove_pins(directory, None)?;
        gone::unmark(directory)
    }

    /// Ready targets of a stream as packets see them: identifier and next hops.
    pub fn targets(&self, stream: &str) -> Option<Vec<(u32, TargetEntry)>> {
        let slot = self.slots.values().find(|s| s.stream.name == stream)?;
        let copy = &slot.targets[(slot.entry.active & 1) as usize];
        Some(copy.iter().map(|(id, t)| (*id, *t)).collect())
    }

    /// Names of the streams in the maps.
    pub fn streams(&self) -> Vec<String> {
        self.slots.values().map(|s| s.stream.name.clone()).collect()
    }

    /// The streams in the maps, each with the largest identifier that its targets can have.
    pub fn limits(&self) -> BTreeMap<String, u32> {
        let mut limits = BTreeMap::new();
        for slot in self.slots.values() {
            let limit = limits.entry(slot.stream.name.clone()).or_insert(0);
            *limit = slot.stream.max_targets.max(*limit);
        }
        limits
    }

    /// Where the targets of a stream have their marks and tables: identifier offset and largest identifier, twice for one that could not be
    /// changed to another size to the end.
    pub fn places(&self, stream: &str) -> Vec<(u32, u32)> {
        let named = self.slots.values().filter(|slot| slot.stream.name == stream);
        named.map(|slot| (self.settings.offset_start + slot.entry.target_base, slot.stream.max_targets)).collect()
    }

    /// Takes a configuration and the ready targets by stream name. Packets see the targets of a stream, the old or the new ones, whole:
    /// first one stream after the other changes, then VIPs, flows and port translations change at once. Streams of another size that
    /// have no room beside their old tables all together change in turn, each such change as said.
    ///
    /// # Errors
    /// Every fault of the configuration; the previous one goes on forwarding.
    pub fn apply(&mut self, config: &Config, targets: &BTreeMap<String, Targets>) -> Result<(), Vec<Error>> {
        let mut faults = config.faults();
        for stream in &config.streams {
            let identifiers = targets.get(&stream.name).into_iter().flat_map(|t| t.keys());
            faults.extend(outside(stream, identifiers));
        }
        if !faults.is_empty() {
            return Err(faults);
        }
        match place(self.entries(), self.kernel.chunks, self.next_slot, &config.streams) {
            Ok(placed) => self.take(config, targets, placed).map_err(|e| vec![e]),
            Err(error) => {
                let steps = self.steps(config).ok_or_else(|| self.no_room(config, error))?;
                steps.iter().try_for_each(|step| self.apply(step, &within(step, targets)))
            }
        }
    }

    /// Takes a configuration whose streams have their places.
    fn take(&mut self, config: &Config, targets: &BTreeMap<String, Targets>, placed: Vec<Placed>) -> Result<(), Error> {
        // Everything that can be refused is found out before anything is written, but want of memory in the kernel.
        let counters = self.plan_counters(config)?;
        let places: HashMap<&str, u32> = config.streams.iter().zip(&placed).map(|(s, p)| (&*s.name, p.slot)).collect();
        let slot = |name: &str| places.get(name).copied().unwrap_or(NONE);
        let classifier = compile(config, &slot, &mut |name| counters.of(name))?;
        for (stream, place) in config.streams.iter().zip(&placed).filter(|(_, place)| place.fresh) {
            self.create(place.slot, place.entry, stream)?;
        }
        let empty = Targets::new();
        for (stream, place) in config.streams.iter().zip(&placed) {
            self.swap(place.slot, targets.get(&stream.name).unwrap_or(&empty))?;
        }
        self.switch_classifier(classifier, &counters)?;
        let gone: Vec<u32> = self.slots.keys().copied().filter(|n| !placed.iter().any(|p| p.slot == *n)).collect();
        if !gone.is_empty() {
            self.retired.wait(&self.kernel.grace)?;
        }
        gone.into_iter().try_for_each(|number| self.release(number))
    }

    /// Takes the ready targets of one stream.
    ///
    /// # Errors
    /// The stream is unknown or an identifier is outside its range; nothing has changed then.
    pub fn set_targets(&mut self, stream: &str, targets: &Targets) -> Result<(), Error> {
        let named = self.slots.iter().filter(|(_, s)| s.stream.name == stream);
        let numbers: Vec<(u32, u32)> = named.map(|(n, s)| (*n, s.stream.max_targets)).collect();
        match numbers.as_slice() {
            [] => Err(Error::config(format!("stream {stream:?}"), "unknown")),
            [(number, _)] => self.swap(*number, targets),
            // One of another size was written, but flows could not be switched to it: which one packets use does not matter here.
            several => several.iter().try_for_each(|(number, most)| {
                let within = targets.iter().filter(|(id, _)| *id <= most).map(|(id, target)| (*id, *target));
                self.swap(*number, &within.collect())
            }),
        }
    }

    /// Has packets ask for the link addresses of these next hops (interface, address) again. Else what the program has found out
    /// about one is believed for some ticks of the kernel more; to be called when the kernel has learnt another one.
    ///
    /// # Errors
    /// The maps cannot be written.
    pub fn look_again(&mut self, next_hops: &BTreeSet<(u32, IpAddr)>) -> Result<(), Error> {
        let streams = &self.kernel.maps.streams;
        for (number, slot) in &mut self.slots {
            let copy = (slot.entry.active & 1) as usize;
            let v4 = |t: &TargetEntry| next_hops.contains(&(t.ifindex4, t.v4.into()));
            let v6 = |t: &TargetEntry| next_hops.contains(&(t.ifindex6, t.v6.into()));
            if slot.targets[copy].values().any(|target| v4(target) || v6(target)) {
                slot.entry.written[copy] = monotonic();
                streams.set(number, &slot.entry).map_err(failed(streams))?;
            }
        }
        Ok(())
    }

    /// Writes a stream without targets to a free slot.
    fn create(&mut self, number: u32, entry: StreamEntry, stream: &Stream) -> Result<(), Error> {
        let Some(table) = Table::new(stream.max_targets) else { return Ok(()) };
        for identifier in 1..=stream.max_targets {
            let zeroed = self.kernel.hits.targets.zero(entry.target_base + identifier);
            zeroed.map_err(failed(&self.kernel.maps.target_hits))?;
        }
        for reason in 0..MAX_REASONS as u32 {
            let map = &self.kernel.maps.stream_drops;
            map.zero(number * MAX_REASONS as u32 + reason, self.kernel.cpus).map_err(failed(map))?;
        }
        let names = &self.kernel.maps.stream_names;
        names.set(&number, &text(&stream.name)).map_err(failed(names))?;
        let targets = [BTreeMap::new(), BTreeMap::new()];
        let slot = Slot { stream: stream.clone(), entry, table, targets, unsure: [true; 2], retired: Retired::Free };
        self.slots.insert(number, slot);
        self.next_slot = (number + 1) % MAX_STREAMS as u32;
        self.write_entry(number)
    }

    fn write_entry(&self, number: u32) -> Result<(), Error> {
        let Some(slot) = self.slots.get(&number) else { return Ok(()) };
        self.kernel.maps.streams.set(&number, &slot.entry).map_err(failed(&self.kernel.maps.streams))
    }

    /// Writes table and targets of a stream to the copy that is not in use and switches to it.
    fn swap(&mut self, number: u32, ready: &Targets) -> Result<(), Error> {
        let start = self.settings.offset_start;
        let Some(slot) = self.slots.get_mut(&number) else { return Ok(()) };
        if let Some(fault) = outside(&slot.stream, ready.keys()) {
            return Err(fault);
        }
        let base = slot.entry.target_base;
        let wanted: BTreeMap<u32, TargetEntry> =
            ready.iter().map(|(id, t)| (*id, target_entry(t, MARK_FLAG | (start + base + id)))).collect();
        let old = (slot.entry.active & 1) as usize;
        if slot.targets[old] == wanted {
            return Ok(());
        }
        let new = 1 - old;
        slot.retired.wait(&self.kernel.grace)?;
        let map = &self.kernel.maps.targets;
        let unsure = std::mem::replace(&mut slot.unsure[new], true);
        let before = std::mem::take(&mut slot.targets[new]);
        let touched: Vec<u32> = match unsure {
            true => (1..=slot.stream.max_targets).collect(),
            false => before.keys().chain(wanted.keys().filter(|id| !before.contains_key(id))).copied().collect(),
        };
        for id in touched {
            if unsure || before.get(&id) != wanted.get(&id) {
                let entry = wanted.get(&id).copied().unwrap_or_default();
                map.set(&target_index(base, id, new as u32), &entry).map_err(failed(map))?;
            }
        }
        slot.targets[new] = wanted;
        slot.table.set(ready.keys().copied());
        write_rows(&self.kernel.maps.rows, slot.entry.chunk[new], slot.table.rows())?;
        // Two writes: first what describes the copy that nobody reads, then the one byte that packets go by.
        slot.entry.ready[new] = !ready.is_empty() as u32;
        slot.entry.written[new] = monotonic();
        self.kernel.maps.streams.set(&number, &slot.entry).map_err(failed(&self.kernel.maps.streams))?;
        let mut switched = slot.entry;
        switched.active = new as u32;
        switched.swaps = switched.swaps.wrapping_add(1);
        self.kernel.maps.streams.set(&number, &switched).map_err(failed(&self.kernel.maps.streams))?;
        slot.entry = switched;
        slot.unsure[new] = false;
        slot.retired = Retired::now(&self.kernel.grace);
        Ok(())
    }

    fn release(&mut self, number: u32) -> Result<(), Error> {
        let Some(slot) = self.slots.remove(&number) else { return Ok(()) };
        let streams = &self.kernel.maps.streams;
        streams.set(&number, &StreamEntry::default()).map_err(failed(streams))?;
        let names = &self.kernel.maps.stream_names;
        names.set(&number, &[0u8; 128]).map_err(failed(names))?;
        for (copy, targets) in slot.targets.iter().enumerate() {
            for id in targets.keys() {
                let index = target_index(slot.entry.target_base, *id, copy as u32);
                let map = &self.kernel.maps.targets;
                map.set(&index, &TargetEntry::default()).map_err(failed(map))?;
            }
        }
        Ok(())
    }

    /// Writes flows to the generation that is not in use and switches to it.
    fn switch_classifier(&mut self, classifier: Classifier, counters: &Plan) -> Result<(), Error> {
        let new = 1 - self.config.get().generation();
        self.retired.wait(&self.kernel.grace)?;
        self.take_counters(counters)?;
        let before = self.generations[new as usize].take();
        write_generation(&self.kernel.maps, new, &classifier, before.as_ref())?;
        self.config.change(|config| config.flags[new as usize] = classifier.flags)?;
        self.config.change(|config| {
            config.version = LAYOUT_VERSION;
            config.switches = config.switches.wrapping_add(1);
        })?;
        self.retired = Retired::now(&self.kernel.grace);
        self.generations[new as usize] = Some(classifier);
        self.forget_counters()
    }
}

impl Drop for Engine {
    /// Only the way through this process ends; all else forwards on.
    fn drop(&mut self) {
        if self.detour.is_ok()
            && let Err(error) = self.config.change(|config| config.hold = 0)
        {
            tracing::warn!(%error, "fragments out of order");
        }
    }
}

/// The identifier that a stream cannot have.
fn outside<'a>(stream: &Stream, mut identifiers: impl Iterator<Item = &'a u32>) -> Option<Error> {
    let id = identifiers.find(|id| !(1..=stream.max_targets).contains(id))?;
    let reason = format!("identifier {id} is not in 1..{}", stream.max_targets);
    Some(Error::config(format!("stream {:?}", stream.name), reason))
}
