//! An element that does nothing.

use crate::Element;

/// Calls next only: a place holder, and the mechanism of type NOOP.
#[derive(Clone, Copy, Debug, Default)]
pub struct Null;

impl Element for Null {
    fn name(&self) -> &'static str {
        "null"
    }
}
