//! Takes the `clsact` queueing discipline off an interface when nobody uses it any more. The loader library adds it but cannot
//! remove it, and others (a network plugin, say) may have attached their programs to it as well.
#![allow(unsafe_code)] // SAFETY: one netlink socket; each call states why its pointers are valid.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const HEADER: usize = 16;
/// `struct tcmsg`: family and padding, interface, handle, parent, info.
const TCMSG: usize = 20;
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const INGRESS: u32 = 0xffff_fff2;
const EGRESS: u32 = 0xffff_fff3;

/// Removes `clsact` from an interface of this network namespace unless filters are attached to it. No interface, no
/// `clsact`: nothing to do.
pub(crate) fn remove_unused(interface: &str) -> io::Result<()> {
    let name = std::ffi::CString::new(interface)?;
    // SAFETY: a NUL-terminated name.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 {
        return Ok(());
    }
    let socket = open()?;
    for parent in [INGRESS, EGRESS] {
        if has_filters(&socket, index, parent)? {
            return Ok(());
        }
    }
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_ACK;
    let answers = ask(&socket, libc::RTM_DELQDISC, flags, index, CLSACT_HANDLE, CLSACT)?;
    match answers.first() {
        Some(Answer::Error(0)) => Ok(()),
        // None there, or another one in its place.
        Some(Answer::Error(code)) if [libc::ENOENT, libc::EINVAL].contains(code) => Ok(()),
        Some(Answer::Error(code)) => Err(io::Error::from_raw_os_error(*code)),
        _ => Err(io::Error::other("no answer to the removal of clsact")),
    }
}

fn has_filters(socket: &OwnedFd, index: u32, parent: u32) -> io::Result<bool> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    let answers = ask(socket, libc::RTM_GETTFILTER, flags, index, 0, parent)?;
    Ok(answers.contains(&Answer::Message(libc::RTM_NEWTFILTER)))
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// Type of a message.
    Message(u16),
    /// Error number; 0: done as asked.
    Error(i32),
}

fn open() -> io::Result<OwnedFd> {
    // SAFETY: plain arguments; the descriptor is new and nobody else's.
    unsafe {
        let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Sends a request and reads until its end.
fn ask(socket: &OwnedFd, kind: u16, flags: i32, index: u32, handle: u32, parent: u32) -> io::Result<Vec<Answer>> {
    let mut request = Vec::with_capacity(HEADER + TCMSG);
    request.extend(((HEADER + TCMSG) as u32).to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((flags as u16).to_ne_bytes());
    request.extend([0; 8]);
    for word in [0, index, handle, parent, 0] {
        request.extend(word.to_ne_bytes());
    }
    // SAFETY: a live buffer of the length given.
    let sent = unsafe { libc::send(socket.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answers = Vec::new();
    let mut buffer = vec![0u8; 65_536];
    loop {
        // SAFETY: a live buffer of the length given.
        let got = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        if got <= 0 {
            return Err(io::Error::last_os_error());
        }
        if read(&buffer[..got as usize], &mut answers) {
            return Ok(answers);
        }
    }
}

/// Reads the messages of one datagram; `true`: the last one was among them.
fn read(mut bytes: &[u8], answers: &mut Vec<Answer>) -> bool {
    while let (Some(length), Some(kind)) = (bytes.first_chunk::<4>(), bytes.get(4..6)) {
        let length = u32::from_ne_bytes(*length) as usize;
        let kind = u16::from_ne_bytes([kind[0], kind[1]]);
        let code = bytes.get(HEADER..HEADER + 4).and_then(|c| c.try_into().ok()).map(i32::from_ne_bytes);
        match i32::from(kind) {
            libc::NLMSG_DONE => return true,
            libc::NLMSG_ERROR => {
                answers.push(Answer::Error(-code.unwrap_or(0)));
                return true;
            }
            _ => answers.push(Answer::Message(kind)),
        }
        let next = length.max(HEADER).next_multiple_of(4);
        bytes = bytes.get(next..).unwrap_or(&[]);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_to_their_end() {
        let message = |kind: u16, rest: &[u8]| {
            let mut b = ((HEADER + rest.len()) as u32).to_ne_bytes().to_vec();
            b.extend(kind.to_ne_bytes());
            b.extend([0; 10]);
            b.extend(rest);
            b
        };
        let filter = message(libc::RTM_NEWTFILTER, &[0; 20]);
        let done = message(libc::NLMSG_DONE as u16, &[0; 4]);
        let mut answers = Vec::new();
        assert!(!read(&filter, &mut answers), "more to come");
        assert!(read(&[filter.clone(), done].concat(), &mut answers));
        assert_eq!(answers, [Answer::Message(libc::RTM_NEWTFILTER), Answer::Message(libc::RTM_NEWTFILTER)]);
        let mut answers = Vec::new();
        assert!(read(&message(libc::NLMSG_ERROR as u16, &(-2i32).to_ne_bytes()), &mut answers));
        assert_eq!(answers, [Answer::Error(2)]);
        assert!(!read(&[1, 2, 3], &mut Vec::new()) && !read(&[0; 16], &mut Vec::new()), "nonsense ends");
    }

    #[test]
    fn an_interface_that_is_not_there_has_none() {
        remove_unused("mdt-no-such").unwrap();
    }
}
