//! BIRD: its configuration, its control socket, its process.

pub mod control;
pub mod process;
pub mod render;
pub mod reply;
pub mod status;
