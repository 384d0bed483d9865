//! What a peer prints: one JSON object a line.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::Value;

/// The events of one peer, read from its log from a position on.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    position: usize,
}

impl Log {
    /// The whole log of `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), position: 0 }
    }

    fn lines(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.path).unwrap_or_default();
        // The last line may be half written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Forgets what was printed so far.
    pub fn skip(&mut self) {
        self.position = self.lines().len();
    }

    /// How often the event was printed, from the start.
    pub fn count(&self, event: &str) -> usize {
        self.lines().iter().filter(|line| line["event"] == event).count()
    }

    /// Waits for the next event of that name; events before it are passed over.
    ///
    /// # Errors
    /// If it is not printed in time; the message carries the last lines.
    pub async fn wait(&mut self, event: &str, patience: Duration) -> Result<Value> {
        let began = Instant::now();
        loop {
            let lines = self.lines();
            if let Some(found) = lines.iter().skip(self.position).position(|line| line["event"] == event) {
                self.position += found + 1;
                return Ok(lines[self.position - 1].clone());
            }
            if began.elapsed() > patience {
                let last: Vec<String> = lines.iter().rev().take(5).rev().map(Value::to_string).collect();
                bail!(
                    "{}: no {event:?} within {patience:?}; its last lines:\n{}",
                    self.path.display(),
                    last.join("\n")
                );
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}
