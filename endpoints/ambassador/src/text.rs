//! The text form of a list of streams, as `meridio target watch` prints it.

use crate::StreamStatus;

/// Renders a list: the line `New stream list:`, then `<STATUS> - <stream> - <conduit> - <trench>` for each stream.
///
/// Scripts parse this text, so it does not change.
pub fn render(streams: &[StreamStatus]) -> String {
    let mut text = String::from("New stream list:\n");
    for StreamStatus { name, state } in streams {
        let line = format!("{} - {} - {} - {}\n", state.as_str_name(), name.stream, name.conduit, name.trench);
        text.push_str(&line);
    }
    text
}
