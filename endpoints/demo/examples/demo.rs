//! The demo without the rest of the binary: `cargo run -p meridio-demo --example demo -- --binary target/debug/meridio --once`.

use clap::Parser;
use tokio_util::sync::CancellationToken;

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    settings: meridio_demo::Settings,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let interrupt = stop.clone();
    tokio::spawn(async move {
        let _ = tokio::signal::ctrl_c().await;
        interrupt.cancel();
    });
    meridio_demo::run(Arguments::parse().settings, stop).await
}
