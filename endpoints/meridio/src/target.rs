//! `meridio target`: drives the ambassador socket of a TAPA by hand. Scripts read the text of `watch`.

use std::io::Write as _;

use futures_util::StreamExt as _;
use meridio_ambassador::{Ambassador, StreamName, render};
use tokio_util::sync::CancellationToken;

/// Where the TAPA is and which stream is meant; in `watch` an absent name means any.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Which {
    /// Ambassador socket of the TAPA
    #[arg(long, env = "MERIDIO_SOCKET", default_value = "unix:///ambassador.sock")]
    socket: String,
    /// Trench
    #[arg(short, long, default_value = "")]
    trench: String,
    /// Conduit
    #[arg(short, long, default_value = "")]
    conduit: String,
    /// Stream
    #[arg(short, long, default_value = "")]
    stream: String,
}

/// What to do.
#[derive(clap::Subcommand, Clone, Debug)]
pub(crate) enum Target {
    /// Asks for a stream
    Open(Which),
    /// Gives a stream up
    Close(Which),
    /// Prints the list of streams at once and after every change
    Watch(Which),
}

impl Target {
    /// Does it; `watch` ends with the TAPA or by `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let (Self::Open(which) | Self::Close(which) | Self::Watch(which)) = &self;
        let tapa = Ambassador::new(&which.socket)?;
        let name = StreamName::new(&which.trench, &which.conduit, &which.stream);
        match self {
            Self::Open(_) => tapa.open(&name).await?,
            Self::Close(_) => tapa.close(&name).await?,
            Self::Watch(_) => {
                let mut lists = std::pin::pin!(tapa.watch(&name).await?);
                while let Some(Some(list)) = stop.run_until_cancelled(lists.next()).await {
                    // A reader who has left ends the watch, without a complaint.
                    if write!(std::io::stdout(), "{}", render(&list?)).is_err() {
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}
