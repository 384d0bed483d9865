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
    /// The interface has had every VIP.
    pub(crate) ready: bool,
    /// NSM has lost the connection, and the wire does not work either.
    pub(crate) dead: bool,
    /// The conduit's streams by name with their limits of targets; `None` until the NSP has told.
    pub(crate) streams: Option<BTreeMap<String, u32>>,
}

/// Whether the interface accepts traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Traffic {
    /// It has not had every VIP yet.
    NotYet,
    /// It does; a change of VIPs does not take this back.
    Accepted,
    /// The wire is dead.
    Lost,
}

impl Traffic {
    /// What a stream is shown as while it is registered DISABLED.
    pub(crate) fn shown(self) -> Status {
        match self {
            Self::Lost => Status::Unavailable,
            Self::NotYet | Self::Accepted => Status::Pending,
        }
    }
}

/// Whether one stream can be registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Gate {
    /// Not yet: the status says why.
    Wait(Status),
    /// With these addresses and this limit.
    Go(Vec<String>, u32, Traffic),
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
            Some(Some(max)) => Gate::Go(self.ips.clone(), *max, self.traffic()),
        }
    }

    fn traffic(&self) -> Traffic {
        match (self.dead, self.ready) {
            (true, _) => Traffic::Lost,
            (false, true) => Traffic::Accepted,
            (false, false) => Traffic::NotYet,
        }
    }

    /// Addresses that work, whatever else is not known yet; empty if there are none.
    pub(crate) fn working(&self) -> &[String] {
        match self.dead {
            true => &[],
            false if self.ips.is_empty() => &self.left,
            false => &self.ips,
        }
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
        assert_eq!(view.gate("s"), Gate::Go(view.ips.clone(), 7, Traffic::NotYet));
        view.ready = true;
        assert_eq!(view.gate("s"), Gate::Go(view.ips.clone(), 7, Traffic::Accepted));
        view.dead = true;
        assert_eq!(view.gate("s"), Gate::Go(view.ips.clone(), 7, Traffic::Lost));
        view.ips.clear();
        assert_eq!(view.gate("s"), Gate::Wait(Status::Unavailable));
    }

    #[test]
    fn addresses_of_an_earlier_run_work_until_there_are_others() {
        let mut view = View { left: vec!["10.0.0.1/24".into()], ..View::default() };
        assert_eq!(view.working(), ["10.0.0.1/24"]);
        view.ips = vec!["10.0.0.2/24".into()];
        assert_eq!(view.working(), ["10.0.0.2/24"]);
        view.dead = true;
        assert!(view.working().is_empty());
    }
}
