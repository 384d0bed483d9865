//! The command line: one pass that names every value that cannot be read, not only the first.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Command as Clap, CommandFactory as _, FromArgMatches as _};

use crate::components::Command;

/// Attracts external traffic on secondary networks and spreads it over pods: every component of Meridio in one program.
#[derive(clap::Parser, Debug)]
#[command(name = "meridio", version, propagate_version = true, max_term_width = 120)]
pub(crate) struct Cli {
    /// Threads of the component
    #[arg(long, env = "MERIDIO_WORKERS", default_value = "2", global = true, value_parser = clap::value_parser!(u8).range(1..))]
    pub workers: u8,
    /// What to run
    #[command(subcommand)]
    pub command: Command,
}

/// Why there is nothing to run.
#[derive(Debug)]
pub(crate) enum Exit {
    /// Help, version or a usage error was printed; this is the status to leave with.
    Printed(u8),
    /// Values that cannot be read, one line each.
    Faults(Vec<String>),
}

/// Reads arguments and environment.
pub(crate) fn parse(args: Vec<OsString>) -> Result<Cli, Exit> {
    let mut command = Cli::command();
    let mut faults = Vec::new();
    loop {
        let error = match command.clone().try_get_matches_from(&args) {
            Ok(matches) if faults.is_empty() => match Cli::from_arg_matches(&matches) {
                Ok(cli) => return Ok(cli),
                Err(error) => error,
            },
            Ok(_) => return Err(Exit::Faults(faults)),
            Err(error) => error,
        };
        let Some((fault, long)) = value_fault(&command, &error) else {
            let _ = error.print();
            return Err(Exit::Printed(if error.use_stderr() { super::INVALID_SETTINGS } else { 0 }));
        };
        // Read again with that setting taken as plain text, so that the next fault shows.
        if faults.contains(&fault) {
            return Err(Exit::Faults(faults));
        }
        faults.push(fault);
        command = relax(command, &long);
    }
}

/// The fault's line and the long name of its argument, if it is one of a value.
fn value_fault(command: &Clap, error: &clap::Error) -> Option<(String, String)> {
    if !matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
        return None;
    }
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let argument = text(ContextKind::InvalidArg)?;
    let value = text(ContextKind::InvalidValue)?;
    let long = argument.strip_prefix("--")?.split([' ', '=', '[']).next()?.to_owned();
    let name = env_name(command, &long).unwrap_or(argument);
    let cause =
        std::error::Error::source(error).map_or_else(|| "is not one of its values".to_owned(), ToString::to_string);
    Some((format!("{name}: invalid value {value:?}: {cause}"), long))
}

/// Name of the environment variable of an argument, wherever in the tree of subcommands it is.
fn env_name(command: &Clap, long: &str) -> Option<String> {
    let own = command.get_arguments().find(|arg| arg.get_long() == Some(long));
    let own = own.and_then(|arg| arg.get_env()).map(|name| name.to_string_lossy().into_owned());
    own.or_else(|| command.get_subcommands().find_map(|sub| env_name(sub, long)))
}

/// Takes every argument of this name as plain text.
fn relax(mut command: Clap, long: &str) -> Clap {
    let own: Vec<_> =
        command.get_arguments().filter(|arg| arg.get_long() == Some(long)).map(|arg| arg.get_id().clone()).collect();
    for id in own {
        command = command.mut_arg(id, |arg| arg.value_parser(clap::value_parser!(String)));
    }
    let subcommands: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    subcommands.into_iter().fold(command, |command, name| command.mut_subcommand(name, |sub| relax(sub, long)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(args: &[&str]) -> Result<Cli, Exit> {
        parse(["meridio"].iter().chain(args).map(OsString::from).collect())
    }

    #[test]
    fn the_tree_of_arguments_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_setting_has_an_environment_name_and_help() {
        for sub in Cli::command().get_subcommands().filter(|sub| !sub.has_subcommands()) {
            for arg in sub.get_arguments().filter(|arg| arg.get_long().is_some()) {
                let name = format!("{} --{}", sub.get_name(), arg.get_long().unwrap_or_default());
                if !["help", "version"].contains(&arg.get_id().as_str()) {
                    assert!(arg.get_help().is_some(), "{name} has no help");
                }
            }
        }
    }

    #[cfg(feature = "frontend")]
    #[test]
    fn all_values_that_cannot_be_read_are_named() {
        let faulty = ["frontend", "--local-as=x", "--nsp-entry-timeout=soon", "--workers=0"];
        let Err(Exit::Faults(faults)) = read(&faulty) else { panic!("accepted") };
        assert_eq!(faults.len(), 3, "{faults:#?}");
        for name in ["NFE_LOCAL_AS", "NFE_NSP_ENTRY_TIMEOUT", "MERIDIO_WORKERS"] {
            assert!(faults.iter().any(|fault| fault.starts_with(name)), "{faults:#?}");
        }
    }

    #[test]
    fn unknown_words_are_usage_errors() {
        assert!(matches!(read(&["no-such-component"]), Err(Exit::Printed(super::super::INVALID_SETTINGS))));
    }
}
