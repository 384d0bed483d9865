//! What can go wrong in the frontend.

use std::path::PathBuf;

/// Faults of the frontend, each with its object.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The BIRD program cannot be run.
    #[error("BIRD {binary:?} cannot be started: {cause}; install bird2 or set NFE_BIRD_BINARY")]
    NoBird {
        /// The program that was tried.
        binary: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// The control socket could not be reached or broke.
    #[error("BIRD's control socket {socket:?}: {cause}")]
    Control {
        /// Path of the socket.
        socket: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// BIRD said something the protocol does not know.
    #[error("BIRD's control socket {socket:?}: {text}")]
    Protocol {
        /// Path of the socket.
        socket: PathBuf,
        /// What was wrong.
        text: String,
    },
    /// BIRD refused a command.
    #[error("BIRD refused {command:?}: {text}")]
    Refused {
        /// The command.
        command: String,
        /// BIRD's words.
        text: String,
    },
    /// A configuration BIRD does not take; the last good one goes on.
    #[error("BIRD refused the new configuration, the last one stays: {0}")]
    Configuration(String),
    /// A file could not be written or read.
    #[error("file {path:?}: {cause}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// The kernel refused a netlink request.
    #[error("netlink: {object}: {cause}")]
    Netlink {
        /// What was to be changed or read.
        object: String,
        /// Why not.
        cause: rtnetlink::Error,
    },
    /// The netlink socket could not be opened.
    #[error("netlink socket: {0}")]
    NetlinkSocket(std::io::Error),
}
