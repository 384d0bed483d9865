//! Maglev with fixed identities.
//!
//! The base table is the textbook's (Eisenbud et al., NSDI '16, section 3.4) over *all* identifiers 1..=max-targets,
//! ready or not, with permutations derived from a fixed hash of the identifier: it never changes for a stream. A row
//! whose identifier has no ready target walks a fixed probe sequence over the base table to the first ready one, and
//! after [`PROBES`] steps takes the highest random weight among the ready ones.
//!
//! So the table follows from the set of ready identifiers alone, whatever happened before: load balancers agree
//! without talking. A target that leaves moves its own rows and no others; one that joins takes rows to itself and moves none
//! between others. Textbook Maglev disturbs a few more (0.5 % at 65,537 rows).

use std::sync::{Mutex, PoisonError};

use meridio_decision::hash::{first, pair, pair_with};
use meridio_decision::layout::CHUNK_ROWS;

/// Steps of the probe sequence, the first being the row itself.
pub const PROBES: usize = 16;
/// Rows that a thread takes at once.
const PART: usize = 2_048;
/// Threads that help with a table at most.
const MOST_HELPERS: usize = 3;
/// Depth of a row that was decided by weight.
const BY_WEIGHT: u8 = PROBES as u8;
/// Depth of a row when nobody is ready.
const NOBODY: u8 = u8::MAX;

/// Rows for a stream: a prime with at least 100 rows per target; `None` outside 1..=10000.
pub const fn rows_for(max_targets: u32) -> Option<u32> {
    match max_targets {
        1..=600 => Some(65_537),
        601..=1_300 => Some(131_071),
        1_301..=10_000 => Some(1_048_573),
        _ => None,
    }
}

/// Chunks of the row map that one copy of a table of `rows` takes.
pub const fn chunks_for(rows: u32) -> u32 {
    rows.div_ceil(CHUNK_ROWS as u32)
}

/// The table of one stream with what it takes to change it quickly.
#[derive(Clone, Debug)]
pub struct Table {
    max_targets: u32,
    base: Vec<u16>,
    rows: Vec<u16>,
    depth: Vec<u8>,
    offsets: [u32; PROBES],
    ready: Vec<u16>,
    /// [`first`] of each.
    firsts: Vec<u64>,
    is_ready: Vec<bool>,
    /// Rows of each identifier in the base table, one list behind the other.
    places: Vec<u32>,
    starts: Vec<u32>,
}

impl Table {
    /// A table in which nobody is ready; `None` when `max_targets` is not in 1..=10000.
    pub fn new(max_targets: u32) -> Option<Self> {
        let m = rows_for(max_targets)?;
        let base = base(max_targets, m);
        let mut offsets = [0; PROBES];
        for (k, offset) in offsets.iter_mut().enumerate().skip(1) {
            *offset = (pair(0x0070_726f_6265, k as u64) % m as u64) as u32;
        }
        let mut starts = vec![0u32; max_targets as usize + 2];
        for id in &base {
            starts[*id as usize + 1] += 1;
        }
        for i in 1..starts.len() {
            starts[i] += starts[i - 1];
        }
        let mut next = starts.clone();
        let mut places = vec![0u32; m as usize];
        for (row, id) in base.iter().enumerate() {
            let slot = &mut next[*id as usize];
            places[*slot as usize] = row as u32;
            *slot += 1;
        }
        Some(Table {
            max_targets,
            rows: vec![0; m as usize],
            depth: vec![NOBODY; m as usize],
            base,
            offsets,
            ready: Vec::new(),
            firsts: Vec::new(),
            is_ready: vec![false; max_targets as usize + 1],
            places,
            starts,
        })
    }

    /// Identifier in each row; 0: nobody is ready.
    pub fn rows(&self) -> &[u16] {
        &self.rows
    }

    /// The identifier that a row belongs to when everybody is ready; `None`: no such row.
    pub fn owner(&self, row: u32) -> Option<u32> {
        self.base.get(row as usize).map(|id| *id as u32)
    }

    /// Ready identifiers, ascending.
    pub fn ready(&self) -> &[u16] {
        &self.ready
    }

    /// Makes exactly `ready` ready (identifiers outside 1..=max_targets are left out).
    pub fn set(&mut self, ready: impl IntoIterator<Item = u32>) {
        let mut wanted: Vec<u16> =
            ready.into_iter().filter(|id| (1..=self.max_targets).contains(id)).map(|id| id as u16).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let leaving: Vec<u16> = self.ready.iter().copied().filter(|id| wanted.binary_search(id).is_err()).collect();
        let joining: Vec<u16> = wanted.iter().copied().filter(|id| !self.is_ready[*id as usize]).collect();
        if leaving.is_empty() && joining.is_empty() {
            return;
        }
        for id in &leaving {
            self.is_ready[*id as usize] = false;
        }
        for id in &joining {
            self.is_ready[*id as usize] = true;
        }
        let stayed = self.ready.len() - leaving.len();
        self.ready = wanted;
        self.firsts = self.ready.iter().map(|id| first(*id as u64)).collect();
        if stayed == 0 || (leaving.len() + joining.len()) * PROBES > self.max_targets as usize {
            self.resolve(true);
            return;
        }
        if !leaving.is_empty() {
            // Rows of those who left look again, among all who are ready now.
            self.resolve(false);
        }
        for id in joining {
            self.join(id);
        }
    }

    /// Chooses from scratch: for every row, or for those whose target is not ready.
    fn resolve(&mut self, every: bool) {
        let (mut rows, mut depth) = (std::mem::take(&mut self.rows), std::mem::take(&mut self.depth));
        let this = &*self;
        let parts = Mutex::new(rows.chunks_mut(PART).zip(depth.chunks_mut(PART)).enumerate());
        let work = || {
            // The lock is for taking a part only.
            let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
            while let Some((n, (rows, depth))) = next() {
                for (row, (id, depth)) in (n * PART..).zip(rows.iter_mut().zip(depth)) {
                    if every || !this.is_ready[*id as usize] {
                        (*id, *depth) = this.choice(row);
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..this.helpers() {
                // One that cannot be had leaves more to the others.
                let _ = std::thread::Builder::new().spawn_scoped(scope, work);
            }
            work();
        });
        (self.rows, self.depth) = (rows, depth);
    }

    /// Threads that help: only where most rows go by weight, which takes far longer than all the rest.
    fn helpers(&self) -> usize {
        if self.ready.len() * PROBES > self.max_targets as usize {
            return 0;
        }
        std::thread::available_parallelism().map_or(0, |cpus| cpus.get().min(MOST_HELPERS + 1) - 1)
    }

    /// The choice of a row from scratch, and its depth.
    fn choice(&self, row: usize) -> (u16, u8) {
        let m = self.base.len();
        for (k, offset) in self.offsets.iter().enumerate() {
            let mut at = row + *offset as usize;
            if at >= m {
                at -= m;
            }
            let id = self.base[at];
            if self.is_ready[id as usize] {
                return (id, k as u8);
            }
        }
        // One by one: without a vector multiplication of 64 bits, two at once take longer than one after the other.
        let one = |(first, id): (&u64, &u16)| weight_with(std::hint::black_box(*first), *id, row);
        let weights = self.firsts.iter().zip(&self.ready).map(one);
        let heaviest = weights.max();
        // The identifier is the end of its weight.
        (heaviest.unwrap_or(0) as u16, if heaviest.is_some() { BY_WEIGHT } else { NOBODY })
    }

    /// Gives `id` the rows that prefer it to their present choice.
    fn join(&mut self, id: u16) {
        let m = self.base.len();
        let (from, to) = (self.starts[id as usize] as usize, self.starts[id as usize + 1] as usize);
        for n in from..to {
            let place = self.places[n] as usize;
            for k in 0..PROBES {
                let offset = self.offsets[k] as usize;
                let row = if place >= offset { place - offset } else { place + m - offset };
                if (k as u8) < self.depth[row] {
                    self.rows[row] = id;
                    self.depth[row] = k as u8;
                }
            }
        }
        for row in 0..m {
            if self.depth[row] == BY_WEIGHT && weight(id, row) > weight(self.rows[row], row) {
                self.rows[row] = id;
            }
        }
    }
}

/// Weight of an identifier in a row; the identifier itself breaks ties.
fn weight(id: u16, row: usize) -> u64 {
    weight_with(first(id as u64), id, row)
}

fn weight_with(first: u64, id: u16, row: usize) -> u64 {
    (pair_with(first, row as u64) & !0xffff) | id as u64
}

/// Textbook Maglev over all identifiers.
fn base(max_targets: u32, m: u32) -> Vec<u16> {
    let n = max_targets as usize;
    let mut at: Vec<u32> = (1..=max_targets as u64).map(|id| (pair(1, id) % m as u64) as u32).collect();
    let skip: Vec<u32> = (1..=max_targets as u64).map(|id| (pair(2, id) % (m as u64 - 1)) as u32 + 1).collect();
    let mut table = vec![0u16; m as usize];
    let mut filled = 0;
    loop {
        for i in 0..n {
            while table[at[i] as usize] != 0 {
                at[i] = (at[i] + skip[i]) % m;
            }
            table[at[i] as usize] = i as u16 + 1;
            filled += 1;
            if filled == m {
                return table;
            }
        }
    }
}
