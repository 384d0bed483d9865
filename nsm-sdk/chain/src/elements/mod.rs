//! One module per element.

pub mod authorize;
pub mod begin;
pub mod clientconn;
pub mod clienturl;
pub mod connect;
pub mod dial;
pub mod heal;
pub mod metadata;
pub mod monitor;
pub mod null;
pub mod refresh;
pub mod retry;
pub mod timeout;
pub mod trimpath;
pub mod updatepath;
pub mod updatetoken;
