//! Properties of the table: a function of the ready identifiers alone, fair, and quick to change.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

use std::time::Instant;

use meridio_maglev::reference::{base_table, row_owner};
use meridio_maglev::table::Table;
use proptest::prelude::*;

fn shares(table: &Table) -> Vec<(u16, usize)> {
    let mut counts = vec![0usize; 10_001];
    table.rows().iter().for_each(|id| counts[*id as usize] += 1);
    counts.into_iter().enumerate().filter(|(_, n)| *n > 0).map(|(id, n)| (id as u16, n)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the history, the same ready identifiers give the same table; each step moves only rows of who left or
    /// came.
    #[test]
    fn history_free_and_minimal(steps in proptest::collection::vec(proptest::collection::btree_set(1u32..=100, 0..30), 1..6)) {
        let mut table = Table::new(100).unwrap();
        let mut before: (std::collections::BTreeSet<u32>, Vec<u16>) = Default::default();
        for ready in steps {
            table.set(ready.iter().copied());
            let mut fresh = Table::new(100).unwrap();
            fresh.set(ready.iter().copied());
            prop_assert_eq!(table.rows(), fresh.rows());
            if !before.0.is_empty() && !ready.is_empty() {
                for (old, new) in before.1.iter().zip(table.rows()) {
                    let left = !ready.contains(&(*old as u32));
                    let came = !before.0.contains(&(*new as u32));
                    prop_assert!(old == new || left || came, "{old} -> {new}");
                }
            }
            before = (ready, table.rows().to_vec());
        }
    }
}

#[test]
fn one_by_one_is_the_definition() {
    for max_targets in [1, 7, 100, 700] {
        let base = base_table(max_targets);
        let mut table = Table::new(max_targets).unwrap();
        let mut ready: Vec<u32> = Vec::new();
        for id in [1, max_targets, max_targets / 2 + 1, max_targets / 3 + 1] {
            if !ready.contains(&id) {
                ready.push(id);
            }
            table.set(ready.iter().copied());
            for row in (0..table.rows().len()).step_by(97) {
                assert_eq!(Some(table.rows()[row] as u32), row_owner(&base, max_targets, &ready, row as u32));
            }
        }
    }
}

#[test]
fn shares_are_fair() {
    for (max_targets, ready, limit) in
        [(100, 4, 1.03), (100, 2, 1.03), (100, 100, 1.01), (100, 50, 1.1), (1000, 10, 1.05), (1000, 1000, 1.02)]
    {
        let mut worst = 1.0f64;
        for first in [1, 17, 50] {
            let mut table = Table::new(max_targets).unwrap();
            table.set((0..ready).map(|n| (first + n * (max_targets / ready) - 1) % max_targets + 1));
            let shares = shares(&table);
            assert_eq!(shares.len(), ready as usize);
            let max = shares.iter().map(|s| s.1).max().unwrap() as f64;
            worst = worst.max(max * ready as f64 / table.rows().len() as f64);
        }
        println!("{ready} of {max_targets}: max over mean {worst:.4}");
        assert!(worst < limit, "{ready} of {max_targets}: {worst}");
    }
}

/// Prints how long changes take; the limit is generous because tests share their machine.
#[test]
fn changes_are_quick() {
    for (max_targets, all) in [(100u32, 100u32), (1000, 1000), (10_000, 10_000)] {
        let started = Instant::now();
        let mut table = Table::new(max_targets).unwrap();
        let base = started.elapsed();
        let mut time = |ready: Vec<u32>| {
            let started = Instant::now();
            table.set(ready);
            started.elapsed()
        };
        let full = time((1..=all).collect());
        let less = time((2..=all).collect());
        let more = time((1..=all).collect());
        let half = time((1..=all).step_by(2).collect());
        let few = time(vec![1, 2, 3, 4]);
        let one = time(vec![1, 2, 3, 4, 5]);
        println!(
            "{max_targets}: base {base:?}, all {full:?}, one less {less:?}, one more {more:?}, half {half:?}, 4 {few:?}, 5 {one:?}"
        );
        if max_targets <= 1000 {
            assert!(full.max(less).max(more).max(one).as_millis() < 50);
        }
    }
}

#[test]
fn nobody_and_strangers() {
    let mut table = Table::new(10).unwrap();
    assert!(table.rows().iter().all(|id| *id == 0));
    table.set([0, 11, 70_000]);
    assert!(table.ready().is_empty() && table.rows().iter().all(|id| *id == 0));
    table.set([3]);
    assert!(table.rows().iter().all(|id| *id == 3));
    table.set([]);
    assert!(table.rows().iter().all(|id| *id == 0));
    assert!(Table::new(0).is_none() && Table::new(10_001).is_none());
}
