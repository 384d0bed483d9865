//! What the components logged around a moment.

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result};
use serde_json::Value;

/// Lines of all logs in `directory` from `from` to `to`, oldest first: time, component, message, what it is about.
///
/// # Errors
/// If the directory or a file in it cannot be read.
pub fn of(directory: &Path, from: SystemTime, to: SystemTime) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))? {
        let path = entry.with_context(|| format!("list {}", directory.display()))?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let text = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        // What is no line of a component's log (BIRD's, one that is being written) says nothing about its time.
        let logged = String::from_utf8_lossy(&text);
        let within = logged.lines().filter_map(line).filter(|(at, _)| (from..=to).contains(at));
        lines.extend(within.map(|(at, text)| (at, format!("{} {name}: {text}", clock(at)))));
    }
    lines.sort_by_key(|(at, _)| *at);
    Ok(lines.into_iter().map(|(_, text)| text).collect())
}

fn line(text: &str) -> Option<(SystemTime, String)> {
    let json: Value = serde_json::from_str(text).ok()?;
    let at =
        json["timestamp"].as_str()?.strip_suffix("+00:00").map(|time| humantime::parse_rfc3339(&format!("{time}Z")));
    let about = json.get("extra_data").map(Value::to_string).unwrap_or_default();
    Some((at?.ok()?, format!("{} {about}", json["message"].as_str()?)))
}

/// The time of day.
fn clock(at: SystemTime) -> String {
    let text = humantime::format_rfc3339_millis(at).to_string();
    text.split_once('T').map_or(text.clone(), |(_, time)| time.trim_end_matches('Z').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn lines_of_all_components_in_the_order_of_their_times() {
        let folder = tempfile::tempdir().unwrap();
        let logged = |time: &str, text: &str| {
            format!(
                "{{\"timestamp\":\"2026-01-02T03:04:{time}+00:00\",\"message\":\"{text}\",\"extra_data\":{{\"a\":1}}}}\n"
            )
        };
        let write = |name: &str, lines: &[String]| std::fs::write(folder.path().join(name), lines.concat()).unwrap();
        write("b.log", &[logged("05.000", "early"), logged("06.010", "second"), "half of a li".to_owned()]);
        write("a.log", &[logged("06.020", "third"), logged("06.000", "first"), logged("07.001", "late")]);
        write("bird.log", &["<INFO> something else\n".to_owned()]);
        let from = humantime::parse_rfc3339("2026-01-02T03:04:06Z").unwrap();
        let lines = of(folder.path(), from, from + Duration::from_secs(1)).unwrap();
        let wanted =
            ["03:04:06.000 a: first {\"a\":1}", "03:04:06.010 b: second {\"a\":1}", "03:04:06.020 a: third {\"a\":1}"];
        assert_eq!(lines, wanted);
        assert!(of(&folder.path().join("nowhere"), from, from).is_err());
    }
}
