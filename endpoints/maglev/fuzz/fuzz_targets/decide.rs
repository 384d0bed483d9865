//! Any bytes as packets: the decision must not panic and must say what the reference model says. The first byte chooses
//! one of a few configurations, its highest bit the IP version. Up to four packets, each behind a byte with its length in words, so that
//! later fragments can find what a first one has left.
#![no_main]
#![allow(dead_code)] // the tests use more of the shared file
#![allow(clippy::unwrap_used)]

#[path = "../../tests/common/generate.rs"]
mod generate;

use std::sync::OnceLock;

use generate::{Pair, Rng, config};
use libfuzzer_sys::fuzz_target;

const CONFIGURATIONS: u64 = 8;

thread_local! {
    static PAIRS: OnceLock<Vec<Pair>> = const { OnceLock::new() };
}

fuzz_target!(|data: &[u8]| {
    let Some((first, rest)) = data.split_first() else { return };
    PAIRS.with(|pairs| {
        let pairs = pairs.get_or_init(|| {
            let one = |seed| {
                let (config, targets) = config(&mut Rng(seed));
                Pair::new(&config, &targets)
            };
            (0..CONFIGURATIONS).map(one).collect()
        });
        let pair = &pairs[(*first as u64 % CONFIGURATIONS) as usize];
        pair.forget();
        let mut rest = rest;
        for _ in 0..4 {
            let Some((words, behind)) = rest.split_first() else { return };
            let (packet, next) = behind.split_at((4 * *words as usize).min(behind.len()));
            rest = next;
            if let Err(difference) = pair.agree(packet, first & 0x80 != 0) {
                panic!("{difference}: {packet:02x?}");
            }
        }
    });
});
