//! Time to rebuild a stream's table in memory. (What it takes until packets follow is measured by [`crate::change`].)

use std::time::Instant;

use meridio_maglev::table::Table;
use serde_json::json;

use crate::Effort;
use crate::lanes::TARGETS;
use crate::report::{Samples, Section};

pub(crate) fn measure(effort: &Effort) -> Section {
    let mut section = Section::new(
        "Rebuild of a stream's table",
        &["targets", "rows", "change", "median ms", "worst ms", "other targets' rows moved"],
    );
    for targets in TARGETS {
        let mut table = Table::new(targets.max(100)).unwrap();
        let rows = table.rows().len();
        // So few that most rows find none of them on their way, but enough to be worth asking one after the other.
        let few = |skip: usize| (1..=targets).filter(|id| id % 17 == 9).skip(skip);
        let names = [
            "all come",
            "one leaves",
            "one comes back",
            "half leave",
            "1 of 17 stays",
            "one of these leaves",
            "it comes back",
        ];
        let mut figures: [(&str, Samples, f64); 7] = names.map(|name| (name, Samples::default(), 0.0));
        for _ in 0..effort.rounds * 4 {
            table.set([]);
            for (n, (_, samples, moved)) in figures.iter_mut().enumerate() {
                let before = table.clone();
                let started = Instant::now();
                match n {
                    0 | 2 => table.set(1..=targets),
                    1 => table.set(2..=targets),
                    3 => table.set((1..=targets).filter(|id| id % 2 == 0)),
                    5 => table.set(few(1)),
                    _ => table.set(few(0)),
                }
                samples.add(started.elapsed().as_secs_f64() * 1e3);
                *moved = moved.max(strays(&before, &table) as f64 / rows as f64);
            }
        }
        for (name, samples, moved) in &figures {
            let worst = samples.values.iter().copied().fold(0.0, f64::max);
            section.row(
                &[
                    targets.to_string(),
                    rows.to_string(),
                    (*name).to_owned(),
                    format!("{:.2}", samples.median()),
                    format!("{worst:.2}"),
                    format!("{:.2} %", moved * 100.0),
                ],
                json!({"targets": targets, "rows": rows, "change": name, "median_ms": samples.median(), "worst_ms": worst,
                    "moved": moved}),
            );
        }
    }
    section
}

/// Rows that went from one target to another although both are ready before and after.
fn strays(before: &Table, after: &Table) -> usize {
    let stays =
        |id: u16| id != 0 && before.ready().binary_search(&id).is_ok() && after.ready().binary_search(&id).is_ok();
    before.rows().iter().zip(after.rows()).filter(|(a, b)| a != b && stays(**a) && stays(**b)).count()
}
