//! One module per element.

pub mod authorize;
pub mod begin;
pub mod clientinfo;
pub mod connect;
pub mod descriptors;
pub mod dial;
pub mod expire;
pub mod heal;
pub mod localbypass;
pub mod memory;
pub mod refresh;
pub mod remember;
pub mod retry;
pub mod stamp;
pub mod updatepath;
