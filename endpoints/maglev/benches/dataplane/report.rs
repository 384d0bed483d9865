//! Medians, ratios, tables and the JSON file.

use std::process::Command;
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::{Effort, ROUNDS};

/// The middle of a list, of the two middle ones the mean; 0 of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |n: usize| sorted.get(n).copied().unwrap_or_default();
    (at(sorted.len().saturating_sub(1) / 2) + at(sorted.len() / 2)) / 2.0
}

/// The value that a share of the list is not above; 0 of none.
pub(crate) fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
}

/// One figure over the rounds, and its ratio to the reference of the same round.
#[derive(Default)]
pub(crate) struct Samples {
    pub(crate) values: Vec<f64>,
    pub(crate) ratios: Vec<f64>,
}

impl Samples {
    pub(crate) fn add(&mut self, value: f64) {
        self.values.push(value);
    }

    /// Relates the last value, if there is a new one.
    pub(crate) fn relate(&mut self, reference: f64) {
        if self.ratios.len() < self.values.len()
            && let Some(last) = self.values.last()
        {
            self.ratios.push(last / reference);
        }
    }

    /// A value whose ratio is known.
    pub(crate) fn pair(&mut self, value: f64, ratio: f64) {
        self.values.push(value);
        self.ratios.push(ratio);
    }

    /// This is the reference: the spread around its own median.
    pub(crate) fn relate_to_itself(&mut self) {
        let middle = self.median();
        self.ratios = self.values.iter().map(|value| value / middle).collect();
    }

    pub(crate) fn median(&self) -> f64 {
        median(&self.values)
    }

    /// Median of the ratios.
    pub(crate) fn ratio(&self) -> f64 {
        median(&self.ratios)
    }

    /// Smallest and largest ratio.
    pub(crate) fn range(&self) -> String {
        format!("{:.2}-{:.2}", quantile(&self.ratios, 0.0), quantile(&self.ratios, 1.0))
    }
}

/// A table.
pub(crate) struct Section {
    title: String,
    head: Vec<String>,
    rows: Vec<Vec<String>>,
    values: Vec<Value>,
    notes: Vec<String>,
}

impl Section {
    pub(crate) fn new(title: &str, head: &[&str]) -> Self {
        let head = head.iter().map(|h| (*h).to_owned()).collect();
        Section { title: title.to_owned(), head, rows: Vec::new(), values: Vec::new(), notes: Vec::new() }
    }

    pub(crate) fn row(&mut self, cells: &[String], value: Value) {
        self.rows.push(cells.to_vec());
        self.values.push(value);
    }

    pub(crate) fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    fn print(&self) {
        println!("\n{}\n", self.title);
        let lines: Vec<&Vec<String>> = std::iter::once(&self.head).chain(&self.rows).collect();
        let widths: Vec<usize> = (0..self.head.len())
            .map(|column| lines.iter().filter_map(|line| line.get(column)).map(String::len).max().unwrap_or(0))
            .collect();
        for (n, line) in lines.iter().enumerate() {
            let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            println!("| {} |", cells.join(" | "));
            if n == 0 {
                let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
                println!("|-{}-|", rule.join("-|-"));
            }
        }
        for note in &self.notes {
            println!("  {note}");
        }
    }
}

/// Everything that was measured.
pub(crate) struct Report {
    sections: Map<String, Value>,
    quick: bool,
    rounds: usize,
}

impl Report {
    pub(crate) fn new(effort: &Effort) -> Self {
        Report { sections: Map::new(), quick: effort.quick, rounds: effort.rounds }
    }

    /// Prints a section and keeps it for the file.
    pub(crate) fn add(&mut self, name: &str, section: Section) {
        section.print();
        self.sections.insert(name.to_owned(), json!({"rows": section.values, "notes": section.notes}));
    }

    /// Writes the file.
    pub(crate) fn write(self, took: Duration) {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/bench");
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("dataplane.json");
        let aims = crate::aims::aims(&self.sections);
        let enough = !self.quick && self.rounds >= ROUNDS;
        println!("\nAims{}\n", if enough { "" } else { ", of a run that is too short to say" });
        for aim in &aims {
            println!("{} {}", if aim.holds { "met   " } else { "MISSED" }, aim.text);
        }
        let aims: Vec<Value> = aims.iter().map(|aim| json!({"aim": aim.text, "holds": aim.holds})).collect();
        let all = json!({
            "section": "dataplane",
            "quick": self.quick,
            "rounds": self.rounds,
            "seconds": took.as_secs_f64().round(),
            "machine": machine(),
            "parts": self.sections,
            "aims": aims,
        });
        std::fs::write(&path, serde_json::to_string_pretty(&all).unwrap() + "\n").unwrap();
        println!("\n{:.0} s; written to target/bench/dataplane.json", took.as_secs_f64());
    }
}

fn first_line(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let text = out.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().to_owned()
}

/// What the figures depend on.
fn machine() -> Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let field = |file: &str, name: &str| {
        let line = read(file).lines().find(|line| line.starts_with(name)).map(str::to_owned);
        line.and_then(|l| l.split_once(':').map(|(_, value)| value.trim().to_owned())).unwrap_or_default()
    };
    json!({
        "cpu": field("/proc/cpuinfo", "model name"),
        "cpus": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "memory": field("/proc/meminfo", "MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "bpf_jit": read("/proc/sys/net/core/bpf_jit_enable"),
        "spectre_v2": read("/sys/devices/system/cpu/vulnerabilities/spectre_v2"),
        "load": read("/proc/loadavg"),
        "rustc": first_line("rustc", &["--version"]),
        "iproute2": first_line("ip", &["-V"]),
        "commit": first_line("git", &["rev-parse", "HEAD"]),
        "version": env!("CARGO_PKG_VERSION"),
    })
}
