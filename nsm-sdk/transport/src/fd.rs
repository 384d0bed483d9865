//! File descriptors beside a byte stream.
//!
//! The wire form is that of `github.com/edwarnicke/grpcfd`: for each descriptor one `sendmsg` with exactly one byte of the stream and
//! one `SCM_RIGHTS` descriptor, then the stream goes on. The stream's content does not change. Receivers file descriptors by the
//! (device, inode) of what they refer to, which is how messages name them (`inode://<dev>/<ino>`).

mod stream;
mod transceiver;

pub use stream::FdStream;
pub use transceiver::{FdTransceiver, inode_of, raise_open_files};

#[cfg(test)]
mod tests;
