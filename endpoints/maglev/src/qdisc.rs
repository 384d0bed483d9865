//! The `clsact` queueing discipline of an interface: what is attached to it, and its end when nobody uses it any more. The loader
//! library adds it but cannot remove it, and others (a network plugin, say) may have attached their programs to it as well.
#![allow(unsafe_code)] // SAFETY: one netlink socket; each call states why its pointers are valid.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const HEADER: usize = 16;
/// `struct tcmsg`: family and padding, interface, handle, parent, info.
const TCMSG: usize = 20;
const CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
/// Where filters of packets that come in are.
pub(crate) const INGRESS: u32 = 0xffff_fff2;
/// Where filters of packets that go out are.
pub(crate) const EGRESS: u32 = 0xffff_fff3;
/// Attribute of a filter: what only its kind knows.
const OPTIONS: u16 = 2;
/// Attribute among these of a program: its number.
const PROGRAM_ID: u16 = 11;

/// Index of an interface of this network namespace.
pub(crate) fn index(interface: &str) -> Option<u32> {
    let name = std::ffi::CString::new(interface).ok()?;
    // SAFETY: a NUL-terminated name.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    (index != 0).then_some(index)
}

/// Number of the program that is attached to an interface with a priority and a handle.
pub(crate) fn program(index: u32, parent: u32, priority: u16, handle: u32) -> io::Result<Option<u32>> {
    let found = filters(&open()?, index, parent)?;
    Ok(found.into_iter().find(|f| (f.priority, f.handle) == (priority, handle)).and_then(|f| f.program))
}

/// Removes `clsact` from an interface of this network namespace unless filters are attached to it. No interface, no
/// `clsact`: nothing to do.
pub(crate) fn remove_unused(interface: &str) -> io::Result<()> {
    let Some(index) = index(interface) else { return Ok(()) };
    let socket = open()?;
    for parent in [INGRESS, EGRESS] {
        if !filters(&socket, index, parent)?.is_empty() {
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

/// A filter of any kind.
#[derive(Debug, PartialEq, Eq)]
struct Filter {
    priority: u16,
    handle: u32,
    /// Number of its program, if it has one.
    program: Option<u32>,
}

fn filters(socket: &OwnedFd, index: u32, parent: u32) -> io::Result<Vec<Filter>> {
    let flags = libc::NLM_F_REQUEST | libc::NLM_F_DUMP;
    let answers = ask(socket, libc::RTM_GETTFILTER, flags, index, 0, parent)?;
    let filter = |answer: &Answer| match answer {
        Answer::Message(libc::RTM_NEWTFILTER, body) => filter(body),
        _ => None,
    };
    Ok(answers.iter().filter_map(filter).collect())
}

/// Reads a message about a filter: `struct tcmsg` and attributes.
fn filter(body: &[u8]) -> Option<Filter> {
    let word = |at: usize| body.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let options = attribute(body.get(TCMSG..)?, OPTIONS);
    let program = options.and_then(|options| attribute(options, PROGRAM_ID));
    Some(Filter {
        priority: (word(16)? >> 16) as u16,
        handle: word(8)?,
        program: program.and_then(|id| id.try_into().ok()).map(u32::from_ne_bytes),
    })
}

/// The value of an attribute among others.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    // Whether it holds others is said in the type too.
    const TYPE: u16 = 0x3fff;
    loop {
        let (head, _) = bytes.split_first_chunk::<4>()?;
        let length = u16::from_ne_bytes([head[0], head[1]]) as usize;
        if u16::from_ne_bytes([head[2], head[3]]) & TYPE == wanted {
            return bytes.get(4..length);
        }
        bytes = bytes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// Type of a message, and what follows its header.
    Message(u16, Vec<u8>),
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
            _ => answers.push(Answer::Message(kind, bytes.get(HEADER..length).unwrap_or_default().to_vec())),
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
        let one = || Answer::Message(libc::RTM_NEWTFILTER, vec![0; 20]);
        assert_eq!(answers, [one(), one()]);
        let mut answers = Vec::new();
        assert!(read(&message(libc::NLMSG_ERROR as u16, &(-2i32).to_ne_bytes()), &mut answers));
        assert_eq!(answers, [Answer::Error(2)]);
        assert!(!read(&[1, 2, 3], &mut Vec::new()) && !read(&[0; 16], &mut Vec::new()), "nonsense ends");
    }

    #[test]
    fn a_filter_is_read_with_its_program() {
        let attribute = |kind: u16, value: &[u8]| {
            let mut b = ((4 + value.len()) as u16).to_ne_bytes().to_vec();
            b.extend(kind.to_ne_bytes());
            b.extend(value);
            b.resize(b.len().next_multiple_of(4), 0);
            b
        };
        let options = [attribute(7, b"name\0"), attribute(PROGRAM_ID, &77u32.to_ne_bytes())].concat();
        let mut body: Vec<u8> = [0, 5, 1, INGRESS, 0x4d_0008].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let plain = Filter { priority: 0x4d, handle: 1, program: None };
        assert_eq!(filter(&body), Some(plain));
        body.extend([attribute(1, b"bpf\0"), attribute(0x8000 | OPTIONS, &options)].concat());
        assert_eq!(filter(&body), Some(Filter { priority: 0x4d, handle: 1, program: Some(77) }));
        for end in 0..body.len() {
            let _ = filter(&body[..end]);
        }
        assert_eq!(filter(&body[..19]), None);
    }

    #[test]
    fn an_interface_that_is_not_there_has_none() {
        remove_unused("mdt-no-such").unwrap();
    }
}
