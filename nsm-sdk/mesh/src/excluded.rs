//! The list of prefixes that no endpoint of the node may hand out, from NSM's file.

use nsm_chain::elements::excludedprefixes::{ExcludedPrefixes, parse};
use std::{path::PathBuf, time::Duration};
use tokio::sync::watch;

/// Where NSM keeps the list.
pub const DEFAULT_FILE: &str = "/var/lib/networkservicemesh/config/excluded_prefixes.yaml";
/// A change of the file takes effect after this time at the latest.
const INTERVAL: Duration = Duration::from_secs(5);

/// The element over `file`, which is read again every 5 s; no file means no prefixes. The reading ends with the element.
pub fn from_file(file: PathBuf) -> ExcludedPrefixes {
    let read = |file: &PathBuf| std::fs::read_to_string(file).map(|text| parse(&text)).unwrap_or_default();
    let (sender, receiver) = watch::channel(read(&file));
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => return,
                () = tokio::time::sleep(INTERVAL) => {}
            }
            let new = read(&file);
            sender.send_if_modified(|old| {
                let changed = *old != new;
                *old = new;
                changed
            });
        }
    });
    ExcludedPrefixes::new(receiver)
}
