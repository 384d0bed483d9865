//! One module per element, in the order of the stock chains.

pub mod begin;
pub mod metadata;
pub mod null;
pub mod updatepath;
