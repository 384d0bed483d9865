//! The frontend's own objects in the kernel: rules of VIPs, the drop route, the copy of the last-known default.
//!
//! `plan` is pure; `netlink` reads and writes; `sysctl` sees to the settings they need.

pub mod netlink;
pub mod plan;
pub mod sysctl;
