//! One module per element, in the order of the stock chains.

pub mod begin;
pub mod metadata;
pub mod null;
pub mod timeout;
pub mod trimpath;
pub mod updatepath;
pub mod updatetoken;
