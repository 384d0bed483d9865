//! The list of prefixes that no endpoint of the node may hand out, from NSM's file.

use nsm_chain::elements::excludedprefixes::{ExcludedPrefixes, parse};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::sync::watch;

/// Where NSM keeps the list.
pub const DEFAULT_FILE: &str = "/var/lib/networkservicemesh/config/excluded_prefixes.yaml";
/// A change of the file takes effect after this time at the latest.
const INTERVAL: Duration = Duration::from_secs(5);

/// What the file says, or why that cannot be known. Without a file it says nothing.
fn text(file: &Path) -> Result<String, String> {
    match std::fs::read_to_string(file) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(String::new()),
        result => result.map_err(|cause| cause.to_string()),
    }
}

/// The prefixes of a text; none if they are not to be found, with a warning: addresses that are in use elsewhere may be handed out.
fn prefixes(file: &Path, text: &Result<String, String>) -> Vec<String> {
    let parsed = text.as_ref().map_err(String::clone).and_then(|text| parse(text).map_err(|error| error.to_string()));
    parsed.unwrap_or_else(|cause| {
        tracing::warn!(file = %file.display(), cause, "no prefixes are excluded");
        Vec::new()
    })
}

/// The element over `file`, which is read again every 5 s; no file means no prefixes. The reading ends with the element.
pub fn from_file(file: PathBuf) -> ExcludedPrefixes {
    let mut known = text(&file);
    let (sender, receiver) = watch::channel(prefixes(&file, &known));
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => return,
                () = tokio::time::sleep(INTERVAL) => {}
            }
            // What has been warned of is not warned of every 5 s.
            let new = text(&file);
            if new != known {
                sender.send_replace(prefixes(&file, &new));
                known = new;
            }
        }
    });
    ExcludedPrefixes::new(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_chain::{Chain, Connection, Context, NetworkServiceRequest, RequestCall};
    use std::sync::{Arc, Mutex};

    /// Collects what is logged.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    // Conformance 97. One test for both: a second one, in a thread that logs nowhere, could switch the warnings off for this one.
    #[tokio::test(start_paused = true)]
    async fn the_file_is_read_again() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let _logging = tracing::subscriber::set_default(subscriber);
        let warnings = || String::from_utf8(log.0.lock().unwrap().clone()).unwrap().matches("WARN").count();

        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("excluded_prefixes.yaml");
        let chain = Chain::builder().element(from_file(file.clone())).build();
        let excluded = async || {
            tokio::time::sleep(5 * INTERVAL).await;
            let connection = Connection { id: "c".into(), ..Default::default() };
            let request = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
            let connection = chain.request(RequestCall::new(request, Context::new())).await.unwrap();
            connection.context.unwrap().ip_context.unwrap().excluded_prefixes
        };
        assert!(excluded().await.is_empty(), "no file, no prefixes");
        let mut expected = 0;
        for (content, prefixes, warns) in [
            (&b"prefixes:\n- 10.0.0.0/8\n- fd00::/8\n"[..], &["10.0.0.0/8", "fd00::/8"][..], 0),
            (b"prefixes:\n- 172.16.0.0/12\n", &["172.16.0.0/12"], 0),
            (b"garbage: [", &[], 1),
            (b"prefixes: [192.168.0.0/16]", &["192.168.0.0/16"], 0),
            (b"prefixes:\xff", &[], 1),
            (b"", &[], 0),
            (b"prefixes:\n- ten\n- 10.0.0.0/8\n", &["10.0.0.0/8"], 1),
        ] {
            std::fs::write(&file, content).unwrap();
            let what = String::from_utf8_lossy(content);
            expected += warns;
            assert_eq!(
                (excluded().await, warnings()),
                (prefixes.iter().map(|p| (*p).to_owned()).collect(), expected),
                "{what}"
            );
        }
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert_eq!((excluded().await, warnings()), (Vec::new(), expected + 1), "a folder");
    }
}
