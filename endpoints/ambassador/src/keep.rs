//! Keeping a stream asked for over restarts of the TAPA.

use std::time::Duration;

use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;

use crate::{Ambassador, Error, StreamName};

/// Pause between two attempts to reach a TAPA that is away.
const RETRY: Duration = Duration::from_millis(100);

impl Ambassador {
    /// Keeps `stream` asked for until `stop`, then gives it up.
    ///
    /// Opens it, watches it, and opens it again whenever the TAPA has forgotten it (a restart without its state).
    /// Errors are retried for as long as `stop` is not given: an application has nothing better to do about them.
    ///
    /// # Errors
    /// The error of the final close.
    pub async fn keep_open(&self, stream: &StreamName, stop: CancellationToken) -> Result<(), Error> {
        let mut said = String::new();
        loop {
            let ended = tokio::select! {
                () = stop.cancelled() => return self.close(stream).await,
                ended = self.open_and_watch(stream) => ended,
            };
            if let Err(error) = ended {
                let text = error.to_string();
                if text != said {
                    tracing::warn!(%error, "the ambassador does not serve {stream}; trying again");
                    said = text;
                }
            }
            tokio::select! {
                () = stop.cancelled() => return self.close(stream).await,
                () = tokio::time::sleep(RETRY) => {}
            }
        }
    }

    /// Opens the stream and returns when the TAPA no longer lists it or cannot be reached.
    async fn open_and_watch(&self, stream: &StreamName) -> Result<(), Error> {
        self.open(stream).await?;
        let mut lists = Box::pin(self.watch(stream).await?);
        while let Some(list) = lists.next().await {
            let list = list?;
            match list.iter().find(|entry| entry.name == *stream) {
                Some(entry) => tracing::info!(state = entry.state.as_str_name(), "{stream}"),
                None => return Ok(()),
            }
        }
        Ok(())
    }
}
