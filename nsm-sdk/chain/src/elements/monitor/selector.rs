//! Which connections a subscriber, or a watcher of the next hop, cares for.

use crate::{Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, PathSegment, State, path};

/// What an initial state without the connection means: the next hop records what it answers before it does.
pub const UNKNOWN: &str = "the next hop does not know the connection";

/// Whether `selector` covers `connection`: its network services (none = all) and its segments, which have to occur
/// one after the other in the path (none = all; empty name, id or token = any).
pub fn matches(selector: &MonitorScopeSelector, connection: &Connection) -> bool {
    let services = &selector.network_services;
    if !services.is_empty() && !services.contains(&connection.network_service) {
        return false;
    }
    let wanted = &selector.path_segments;
    let have = connection.path.as_ref().map_or(&[][..], |path| &path.path_segments);
    wanted.is_empty() || have.windows(wanted.len()).any(|run| run.iter().zip(wanted).all(|(a, b)| covers(b, a)))
}

fn covers(wanted: &PathSegment, segment: &PathSegment) -> bool {
    let same = |wanted: &str, have: &str| wanted.is_empty() || wanted == have;
    same(&wanted.name, &segment.name) && same(&wanted.id, &segment.id) && same(&wanted.token, &segment.token)
}

/// Selects `connection`, this process's view, at the next hop.
pub fn of(connection: &Connection) -> MonitorScopeSelector {
    let own = path::segment(connection, 0);
    let segment = own.map(|own| PathSegment { name: own.name.clone(), id: own.id.clone(), ..Default::default() });
    MonitorScopeSelector { path_segments: segment.into_iter().collect(), ..Default::default() }
}

/// What an event of the next hop says about `own`, this process's view of a connection: its new view, or `None` if
/// the event is about others. A removal counts as state DOWN.
pub fn translate(own: &Connection, event: &ConnectionEvent) -> Option<Connection> {
    let index = path::index(own);
    let theirs = event.connections.values().find(|theirs| {
        let at = path::index(theirs);
        let ours = theirs.path.as_ref().and_then(|path| path.path_segments.get(index));
        ours.is_some_and(|segment| segment.id == own.id) && (at == index || at == index + 1)
    })?;
    let mut result = own.clone();
    result.path = theirs.path.clone();
    if let Some(path) = &mut result.path {
        path.index = index as u32;
    }
    result.context.clone_from(&theirs.context);
    result.set_state(match event.r#type() {
        ConnectionEventType::Delete => State::Down,
        _ => theirs.state(),
    });
    Some(result)
}
