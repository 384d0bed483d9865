//! One module per element.

pub mod authorize;
pub mod begin;
pub mod clientconn;
pub mod clientinfo;
pub mod clienturl;
pub mod connect;
pub mod dial;
pub mod filtermechanisms;
pub mod heal;
pub mod kernel_mechanism;
pub mod mechanisms;
pub mod mechanismtranslation;
pub mod metadata;
pub mod monitor;
pub mod mtu;
pub mod null;
pub mod recvfd;
pub mod refresh;
pub mod retry;
pub mod sendfd;
pub mod switchcase;
pub mod timeout;
pub mod trimpath;
pub mod updatepath;
pub mod updatetoken;
