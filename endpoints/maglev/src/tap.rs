//! The TAP interface of the detour.
#![allow(unsafe_code)] // SAFETY: ioctls of a TAP interface; each call states why its pointers are valid.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;

fn request(name: &[u8]) -> libc::ifreq {
    // SAFETY: plain numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name).take(libc::IFNAMSIZ - 1) {
        *to = *from as libc::c_char;
    }
    request
}

fn ioctl(fd: RawFd, what: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all of the ioctls used here take an ifreq.
    let result = unsafe { libc::ioctl(fd, what as _, request as *mut libc::ifreq) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes an interface in the network namespace of this thread, and tells its name. It goes with the file.
pub(crate) fn open() -> io::Result<(File, String)> {
    use std::os::unix::fs::OpenOptionsExt;
    const DEVICE: &str = "/dev/net/tun";
    let device =
        || File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(DEVICE);
    let file = match device() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            make_device(DEVICE)?;
            device()
        }
        other => other,
    };
    let file = file.map_err(|e| io::Error::new(e.kind(), format!("{DEVICE}: {e}")))?;
    let mut request = request(b"mddetour%d");
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    ioctl(file.as_raw_fd(), libc::TUNSETIFF as libc::c_ulong, &mut request)?;
    let name = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8 as char).collect();
    Ok((file, name))
}

/// Containers often have no such device file, but the right to make one.
fn make_device(path: &str) -> io::Result<()> {
    std::fs::create_dir_all("/dev/net")?;
    let c_path = std::ffi::CString::new(path)?;
    // SAFETY: a NUL-terminated path.
    let result = unsafe { libc::mknod(c_path.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(10, 200)) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(io::Error::new(error.kind(), format!("{path} is missing and cannot be made: {error}")));
    }
    Ok(())
}

/// Type of an interface's link layer (`ARPHRD_*`).
pub(crate) fn link_type(name: &str) -> io::Result<u16> {
    let socket = UnixDatagram::unbound()?;
    let mut request = request(name.as_bytes());
    ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR as libc::c_ulong, &mut request)?;
    // SAFETY: the call has filled in this member.
    Ok(unsafe { request.ifr_ifru.ifru_hwaddr.sa_family })
}

/// Sets the interface up and tells its index and address.
pub(crate) fn bring_up(name: &str) -> io::Result<(u32, [u8; 6])> {
    let socket = UnixDatagram::unbound()?;
    let socket = socket.as_raw_fd();
    // No link-local address, and nothing said about one.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/addr_gen_mode"), "1");
    let mut r = request(name.as_bytes());
    r.ifr_ifru.ifru_mtu = 65_521;
    ioctl(socket, libc::SIOCSIFMTU as libc::c_ulong, &mut r)?;
    ioctl(socket, libc::SIOCGIFHWADDR as libc::c_ulong, &mut r)?;
    // SAFETY: the call has filled in this member.
    let data = unsafe { r.ifr_ifru.ifru_hwaddr.sa_data };
    let mut mac = [0u8; 6];
    for (to, from) in mac.iter_mut().zip(data) {
        *to = from as u8;
    }
    ioctl(socket, libc::SIOCGIFINDEX as libc::c_ulong, &mut r)?;
    // SAFETY: the call has filled in this member.
    let index = unsafe { r.ifr_ifru.ifru_ifindex } as u32;
    ioctl(socket, libc::SIOCGIFFLAGS as libc::c_ulong, &mut r)?;
    // SAFETY: the call has filled in this member.
    let flags = unsafe { r.ifr_ifru.ifru_flags };
    // Whatever is routed here needs no neighbour.
    r.ifr_ifru.ifru_flags = flags | (libc::IFF_UP | libc::IFF_NOARP) as libc::c_short;
    ioctl(socket, libc::SIOCSIFFLAGS as libc::c_ulong, &mut r)?;
    Ok((index, mac))
}
