//! The maps by name: the loader has them from the object, other processes from their pins.

use crate::sys::RawMap;

macro_rules! maps {
    ($($field:ident $name:literal,)*) => {
        /// All pinned maps but the trace's ring buffer, which is read in another way.
        #[derive(Debug)]
        pub(crate) struct Maps { $(pub(crate) $field: RawMap,)* }

        impl Maps {
            /// Gets each map by its name in the object.
            pub(crate) fn open<E>(map: impl Fn(&'static str) -> Result<RawMap, E>) -> Result<Self, E> {
                Ok(Maps { $($field: map($name)?,)* })
            }
        }
    };
}

maps! {
    config "CONFIG",
    vips "VIPS",
    sources "SOURCES",
    ports "PORTS",
    vectors "VECTORS_MAP",
    flows "FLOWS",
    byte_lists "BYTE_LISTS",
    streams "STREAMS",
    rows "ROWS",
    targets "TARGETS",
    nats "NATS",
    fragments "FRAGMENTS",
    flow_hits "FLOW_HITS",
    flow_drops "FLOW_DROPS",
    target_hits "TARGET_HITS",
    stream_drops "STREAM_DROPS",
    reasons "REASONS",
    trace "TRACE",
    last "LAST",
    stream_names "STREAM_NAMES",
    flow_names "FLOW_NAMES",
}
