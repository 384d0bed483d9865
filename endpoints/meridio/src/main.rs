//! The one binary: a subcommand for each component and the user's tools.

fn main() {}
