//! One round with the engine: a configuration and its targets, or, where the configuration is refused, the targets of what is
//! in use.

use std::collections::BTreeMap;

use meridio_maglev::{Engine, Error, Targets};

use crate::desired::{Desired, Ready, ready};
use crate::inputs::Inputs;

/// What became of a round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Faults of the configuration, which the same one would have again: what was before forwards on.
    pub(crate) refused: Vec<String>,
    /// What the kernel has not done: to be tried again.
    pub(crate) failed: Vec<String>,
    /// Targets of the streams in use.
    pub(crate) ready: Ready,
}

/// Takes the configuration if it has no fault. Otherwise the streams in use follow their targets all the same.
///
/// `foreign`: another load balancer forwards here, by tables that the engine does not know.
pub(crate) fn apply(engine: &mut Engine, desired: &Desired, inputs: &Inputs, foreign: bool) -> Outcome {
    let mut outcome = Outcome { refused: desired.faults.clone(), ..Outcome::default() };
    // Where nothing forwards yet, what could be read of a faulty configuration is better than nothing.
    let better = !engine.configured() && !foreign && desired.config.faults().is_empty();
    if desired.faults.is_empty() || better {
        match engine.apply(&desired.config, &desired.ready.targets) {
            Ok(()) => {
                outcome.ready = desired.ready.clone();
                return outcome;
            }
            Err(errors) => {
                for error in errors {
                    match error {
                        Error::Config { .. } => outcome.refused.push(error.to_string()),
                        _ => outcome.failed.push(error.to_string()),
                    }
                }
            }
        }
    }
    let limits = engine.limits();
    // The limits of the streams in use count, not those of the configuration that was refused.
    if let Some(ready) = ready(&limits, inputs) {
        outcome.failed.extend(each(limits.keys(), &ready.targets, |stream, ready| engine.set_targets(stream, ready)));
        outcome.ready = ready;
    }
    outcome
}

/// Gives each stream its targets; the errors of some do not keep the others waiting.
fn each<'a>(
    streams: impl Iterator<Item = &'a String>,
    targets: &BTreeMap<String, Targets>,
    mut set: impl FnMut(&str, &Targets) -> Result<(), Error>,
) -> Vec<String> {
    let nobody = Targets::new();
    let set = |stream: &String| set(stream, targets.get(stream).unwrap_or(&nobody)).err();
    streams.filter_map(set).map(|error| error.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_fails_does_not_stop_the_others() {
        let streams = ["a", "b", "c"].map(str::to_owned);
        let some = Targets::from([(1, meridio_maglev::Target::default())]);
        let targets = BTreeMap::from([("a".to_owned(), some.clone()), ("c".to_owned(), some)]);
        let mut seen = Vec::new();
        let failed = each(streams.iter(), &targets, |stream, targets| {
            seen.push((stream.to_owned(), targets.len()));
            match stream {
                "a" => Err(Error::Map { name: "ROWS", reason: "no memory".into() }),
                _ => Ok(()),
            }
        });
        assert_eq!(failed, ["eBPF map ROWS: no memory"]);
        assert_eq!(seen, [("a".to_owned(), 1), ("b".to_owned(), 0), ("c".to_owned(), 1)]);
    }
}
