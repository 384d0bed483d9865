//! Any bytes as a packet: the decision must not panic and must say what the reference model says. The first byte chooses
//! one of a few configurations, its highest bit the IP version.
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
    let Some((first, packet)) = data.split_first() else { return };
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
        if let Err(difference) = pair.agree(packet, first & 0x80 != 0) {
            panic!("{difference}: {packet:02x?}");
        }
    });
});
