//! Which objects a watch asked for. The request is a pattern: an empty name on either side matches any name.
//!
//! For configuration a pattern without its parent matches nothing; for targets it matches everything.

use meridio_proto::nsp::v1::{Attractor, Conduit, Flow, Gateway, Stream, Target, Trench, Vip, target};

fn name(pattern: &str, item: &str) -> bool {
    pattern.is_empty() || item.is_empty() || pattern == item
}

/// Whether a parent matches; both have to be there.
fn parent<T>(pattern: Option<&T>, item: Option<&T>, matches: fn(&T, &T) -> bool) -> bool {
    pattern.zip(item).is_some_and(|(pattern, item)| matches(pattern, item))
}

pub(crate) fn trench(pattern: &Trench, item: &Trench) -> bool {
    name(&pattern.name, &item.name)
}

pub(crate) fn conduit(pattern: &Conduit, item: &Conduit) -> bool {
    name(&pattern.name, &item.name) && parent(pattern.trench.as_ref(), item.trench.as_ref(), trench)
}

pub(crate) fn stream(pattern: &Stream, item: &Stream) -> bool {
    name(&pattern.name, &item.name) && parent(pattern.conduit.as_ref(), item.conduit.as_ref(), conduit)
}

pub(crate) fn flow(pattern: &Flow, item: &Flow) -> bool {
    name(&pattern.name, &item.name) && parent(pattern.stream.as_ref(), item.stream.as_ref(), stream)
}

pub(crate) fn vip(pattern: &Vip, item: &Vip) -> bool {
    name(&pattern.name, &item.name) && parent(pattern.trench.as_ref(), item.trench.as_ref(), trench)
}

pub(crate) fn attractor(pattern: &Attractor, item: &Attractor) -> bool {
    name(&pattern.name, &item.name) && parent(pattern.trench.as_ref(), item.trench.as_ref(), trench)
}

pub(crate) fn gateway(pattern: &Gateway, item: &Gateway) -> bool {
    name(&pattern.name, &item.name) && parent(pattern.trench.as_ref(), item.trench.as_ref(), trench)
}

pub(crate) fn target(pattern: &Target, item: &Target) -> bool {
    (pattern.status() == target::Status::Any || pattern.status == item.status)
        && pattern.r#type == item.r#type
        && pattern.stream.as_ref().is_none_or(|wanted| {
            let found = Names::of(item.stream.as_ref());
            let wanted = Names::of(Some(wanted));
            name(wanted.stream, found.stream)
                && name(wanted.conduit, found.conduit)
                && name(wanted.trench, found.trench)
        })
}

/// The names of a stream and of all above it; what is missing is empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Names<'a> {
    pub(crate) stream: &'a str,
    pub(crate) conduit: &'a str,
    pub(crate) trench: &'a str,
}

impl<'a> Names<'a> {
    pub(crate) fn of(stream: Option<&'a Stream>) -> Self {
        let conduit = stream.and_then(|s| s.conduit.as_ref());
        let trench = conduit.and_then(|c| c.trench.as_ref());
        Self {
            stream: stream.map_or("", |s| &s.name),
            conduit: conduit.map_or("", |c| &c.name),
            trench: trench.map_or("", |t| &t.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream_of(stream: &str, conduit: &str, trench: &str) -> Stream {
        let trench = Some(Trench { name: trench.to_owned() });
        let conduit = Some(Conduit { name: conduit.to_owned(), trench, ..Conduit::default() });
        Stream { name: stream.to_owned(), conduit, max_targets: 100 }
    }

    #[test]
    fn configuration_patterns() {
        let item = stream_of("s", "c", "t");
        for (pattern, expected) in [
            (("", "c", "t"), true),
            (("s", "", ""), true),
            (("x", "c", "t"), false),
            (("s", "x", "t"), false),
            (("s", "c", "x"), false),
        ] {
            assert_eq!(stream(&stream_of(pattern.0, pattern.1, pattern.2), &item), expected, "{pattern:?}");
        }
        assert!(
            !stream(&Stream { name: "s".to_owned(), ..Stream::default() }, &item),
            "a pattern without parent matches nothing"
        );
        assert!(!vip(&Vip::default(), &Vip { trench: Some(Trench::default()), ..Vip::default() }));
    }

    #[test]
    fn target_patterns() {
        let item = Target {
            stream: Some(stream_of("s", "c", "t")),
            status: target::Status::Disabled.into(),
            ..Target::default()
        };
        let pattern = |status: target::Status, stream: Option<Stream>| Target {
            status: status.into(),
            stream,
            ..Target::default()
        };
        use target::Status::{Any, Disabled, Enabled};
        assert!(target(&pattern(Any, None), &item));
        assert!(target(&pattern(Disabled, Some(Stream { name: "s".to_owned(), ..Stream::default() })), &item));
        assert!(!target(&pattern(Enabled, None), &item));
        assert!(!target(&pattern(Any, Some(stream_of("s", "x", "t"))), &item));
        let frontend = Target { r#type: target::Type::Frontend.into(), ..pattern(Any, None) };
        assert!(!target(&frontend, &item));
    }
}
