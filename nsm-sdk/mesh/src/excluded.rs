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

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_chain::{Chain, Connection, Context, NetworkServiceRequest, RequestCall};

    // Conformance 97
    #[tokio::test(start_paused = true)]
    async fn the_file_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("excluded_prefixes.yaml");
        let chain = Chain::builder().element(from_file(file.clone())).build();
        let excluded = async || {
            let connection = Connection { id: "c".into(), ..Default::default() };
            let request = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
            let connection = chain.request(RequestCall::new(request, Context::new())).await.unwrap();
            connection.context.unwrap().ip_context.unwrap().excluded_prefixes
        };
        assert!(excluded().await.is_empty(), "no file, no prefixes");
        for (text, expected) in [
            ("prefixes:\n- 10.0.0.0/8\n- fd00::/8\n", &["10.0.0.0/8", "fd00::/8"][..]),
            ("prefixes:\n- 172.16.0.0/12\n", &["172.16.0.0/12"]),
            ("garbage: [", &[]),
        ] {
            std::fs::write(&file, text).unwrap();
            tokio::time::sleep(2 * INTERVAL).await;
            assert_eq!(excluded().await, expected);
        }
    }
}
