//! Command lines of tests, read as the program reads them.

use clap::Parser;

/// What a subcommand reads, as a command of its own.
#[derive(Parser)]
struct Cli<Settings: clap::Args> {
    #[command(flatten)]
    settings: Settings,
}

/// Settings of any subcommand from its arguments.
pub(crate) fn parse<Settings: clap::Args>(args: &[&str]) -> Settings {
    Cli::parse_from([&["test"], args].concat()).settings
}

/// Settings of the load balancer.
pub(crate) fn settings(args: &[&str]) -> crate::Settings {
    parse(args)
}
