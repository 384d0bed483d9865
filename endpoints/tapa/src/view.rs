//! What the streams of a conduit have to know of it.

use meridio_proto::{ambassador::v1::stream_status::Status, nsp::v1 as nsp};
use std::collections::BTreeMap;

/// A conduit as its streams see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct View {
    /// The target's addresses; empty while there is no connection.
    pub(crate) ips: Vec<String>,
    /// The addresses of an earlier run's connection that is not established again yet, if its wire works all the same.
    pub(crate) left: Vec<String>,
    /// The interface has every VIP: it accepts traffic.
    pub(crate) ready: bool,
    /// The conduit's streams by name with their limits of targets; `None` until the NSP has told.
    pub(crate) streams: Option<BTreeMap<String, u32>>,
}

/// Whether one stream can be registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// Not yet: the status says why.
    Wait(Status),
    /// With these addresses, limit, and whether traffic is accepted.
    Go(Vec<String>, u32, bool),
}

impl View {
    /// Judges for the stream called `name`.
    pub(crate) fn gate(&self, name: &str) -> Gate {
        if self.ips.is_empty() {
            return Gate::Wait(Status::Unavailable);
        }
        match self.streams.as_ref().map(|streams| streams.get(name)) {
            None => Gate::Wait(Status::Unavailable),
            Some(None) => Gate::Wait(Status::Undefined),
            Some(Some(max)) => Gate::Go(self.ips.clone(), *max, self.ready),
        }
    }

    /// Addresses that work, whatever else is not known yet.
    pub(crate) fn working(&self) -> &[String] {
        if self.ips.is_empty() { &self.left } else { &self.ips }
    }
}

/// Name and limit of each stream in an answer of the NSP.
pub(crate) fn streams(list: &[nsp::Stream]) -> BTreeMap<String, u32> {
    list.iter().map(|stream| (stream.name.clone(), stream.max_targets)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses() {
        let mut view = View::default();
        assert_eq!(view.gate("s"), Gate::Wait(Status::Unavailable));
        view.ips = vec!["10.0.0.1/24".into()];
        assert_eq!(view.gate("s"), Gate::Wait(Status::Unavailable));
        view.streams = Some(streams(&[]));
        assert_eq!(view.gate("s"), Gate::Wait(Status::Undefined));
        view.streams = Some(streams(&[nsp::Stream { name: "s".into(), max_targets: 7, conduit: None }]));
        assert_eq!(view.gate("s"), Gate::Go(view.ips.clone(), 7, false));
        view.ips.clear();
        assert_eq!(view.gate("s"), Gate::Wait(Status::Unavailable));
    }

    #[test]
    fn addresses_of_an_earlier_run_work_until_there_are_others() {
        let mut view = View { left: vec!["10.0.0.1/24".into()], ..View::default() };
        assert_eq!(view.working(), ["10.0.0.1/24"]);
        view.ips = vec!["10.0.0.2/24".into()];
        assert_eq!(view.working(), ["10.0.0.2/24"]);
    }
}
