//! The conformance table speaks about every case, and every test that it names exists.
#![allow(clippy::unwrap_used, reason = "a test states what it expects by unwrapping it")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

const TABLE: &str = include_str!("../conformance/README.md");

/// Cases of the SDK's suite and traps on the wire that have to be spoken about.
const CASES: u32 = 121;
const TRAPS: u32 = 37;

/// One row of a table: `| number | what | state | tests or reason |`.
#[derive(Debug, PartialEq)]
struct Row<'a> {
    section: &'a str,
    number: &'a str,
    state: &'a str,
    last: &'a str,
}

impl Row<'_> {
    /// `path.rs::function`, as it stands between backticks.
    fn tests(&self) -> impl Iterator<Item = (&str, &str)> {
        self.last.split('`').skip(1).step_by(2).filter_map(|code| code.split_once(".rs::"))
    }

    /// What is said beside the tests.
    fn reason(&self) -> String {
        let prose: String = self.last.split('`').step_by(2).collect();
        prose.trim_matches(|c: char| c.is_whitespace() || c.is_ascii_punctuation()).to_owned()
    }

    fn fault(&self) -> Option<String> {
        let (tests, reason) = (self.tests().count(), self.reason());
        let fault = match self.state {
            "covered" if tests == 0 => "is covered by no test",
            "covered" if !says_what_is_not_applicable(&reason) => "is covered, or what is missing has a reason",
            "partly" if tests == 0 || reason.is_empty() => "has to name its tests and say what is missing",
            "not applicable" | "open" if reason.is_empty() => "has to say why",
            "covered" | "partly" | "not applicable" | "open" => return None,
            _ => "has a state that is none",
        };
        Some(format!("{} {}: {fault}", self.section, self.number))
    }
}

/// What is covered has nothing beside its tests but what is not applicable, and why: `not applicable: what, because`.
fn says_what_is_not_applicable(prose: &str) -> bool {
    prose.is_empty() || prose.strip_prefix("not applicable: ").is_some_and(|what| what.split_whitespace().count() > 3)
}

fn rows(table: &str) -> Vec<Row<'_>> {
    let mut section = "";
    let mut rows = Vec::new();
    for line in table.lines() {
        if let Some(title) = line.strip_prefix("## ") {
            section = title;
        }
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        if let ([number, _, state, last], true) = (&cells[..], line.starts_with("| "))
            && !matches!(*number, "#" | "")
        {
            rows.push(Row { section, number, state, last });
        }
    }
    rows
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// A file named in the table: paths are relative to `nsm-sdk/` or, failing that, to the repository.
fn source(path: &str) -> Option<String> {
    ["nsm-sdk", "."].iter().find_map(|base| fs::read_to_string(root().join(base).join(format!("{path}.rs"))).ok())
}

/// Whether `text` has a function of that name under a test attribute.
fn has_test(text: &str, name: &str) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let defines = |line: &str| {
        let after = line.trim_start_matches("async ").strip_prefix("fn ").and_then(|rest| rest.strip_prefix(name));
        after.is_some_and(|rest| rest.starts_with('('))
    };
    let attribute = |line: &str| line.starts_with("#[") && line.contains("test");
    let above =
        |at: usize| lines[..at].iter().rev().take_while(|line| line.starts_with("#[") || line.starts_with("//"));
    lines.iter().enumerate().any(|(at, line)| defines(line) && above(at).any(|line| attribute(line)))
}

fn numbers(rows: &[Row<'_>], section: &str) -> BTreeMap<String, usize> {
    let mut count = BTreeMap::new();
    for row in rows.iter().filter(|row| row.section == section) {
        *count.entry(row.number.to_owned()).or_default() += 1;
    }
    count
}

#[test]
fn every_case_is_spoken_about_once() {
    let rows = rows(TABLE);
    for (section, last) in [("Cases", CASES), ("Traps on the wire", TRAPS)] {
        let found = numbers(&rows, section);
        let expected = (1..=last).map(|number| (number.to_string(), 1)).collect();
        assert_eq!(found, expected, "{section}");
    }
    for section in ["Bad input", "Early proofs"] {
        assert!(!numbers(&rows, section).is_empty(), "{section}");
    }
    let faults: Vec<_> = rows.iter().filter_map(Row::fault).collect();
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn every_test_that_is_named_exists() {
    let mut missing = Vec::new();
    for row in &rows(TABLE) {
        for (path, name) in row.tests() {
            if !source(path).is_some_and(|text| has_test(&text, name)) {
                missing.push(format!("{} {}: {path}.rs::{name}", row.section, row.number));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

#[test]
fn what_is_wrong_in_a_table_is_found() {
    let rows =
        rows("## S\n| # | case | state | tests |\n|---|---|---|---|\n| 1 | a | covered | `x/y.rs::z`, `a.rs::b` |\n");
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].tests().collect::<Vec<_>>(), [("x/y", "z"), ("a", "b")]);
    assert_eq!(rows[0].fault(), None);
    let fault = |state, last| Row { section: "S", number: "1", state, last }.fault().is_some();
    assert!(
        fault("covered", "`a.rs::b`; b is not needed")
            && !fault("covered", "`a.rs::b`; not applicable: c, which nobody has")
    );
    assert!(fault("covered", "no test") && fault("partly", "`a.rs::b`, ") && fault("open", "") && fault("done", "x"));
    assert!(!fault("partly", "`a.rs::b`; without c") && !fault("not applicable", "because"));
    let text =
        "#[test]\nfn a() {}\nfn b() {}\n    /// Words.\n    #[tokio::test(x)]\n    async fn c() {}\nfn ab() {}\n";
    assert!(has_test(text, "a") && has_test(text, "c"));
    assert!(!has_test(text, "b") && !has_test(text, "ab") && !has_test(text, "d"));
}
