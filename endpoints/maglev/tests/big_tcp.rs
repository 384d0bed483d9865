//! TCP in super-packets of more than 64 KiB, as the kernel's own TCP makes them where an interface allows it (BIG TCP): IPv6 with the
//! jumbo option or a length of 0, IPv4 with a total length of 0.
#![allow(unsafe_code)] // SAFETY: netlink and packet sockets; each call states why its pointers are valid.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::net::{Net, V4, V6};
use common::{BpfFs, dual_stack, flow, start, vips};
use meridio_maglev::{Config, Engine, Nat, Protocol, Reason};

/// Bytes of a super-packet that interfaces are allowed.
const LARGEST: u32 = 131_072;
/// Bytes of one transfer.
const SIZE: usize = 32 << 20;
/// Ethernet, IP and TCP headers are not longer than this.
const HEADERS: u64 = 14 + 48 + 60;

/// Allows super-packets of [`LARGEST`] on an interface of this thread's namespace, `false`: of 64 KiB only. Not by `ip`, which knows
/// the limits of IPv4 only in later versions.
fn allow(device: &str, big: bool) {
    const GSO_MAX_SIZE: u16 = 41;
    const GRO_MAX_SIZE: u16 = 58;
    const GSO_IPV4_MAX_SIZE: u16 = 63;
    const GRO_IPV4_MAX_SIZE: u16 = 64;
    let name = std::ffi::CString::new(device).unwrap();
    // SAFETY: a NUL-terminated name.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let size = if big { LARGEST } else { 65_536 };
    let mut body = [0u8; 16].to_vec();
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    for attribute in [GSO_MAX_SIZE, GRO_MAX_SIZE, GSO_IPV4_MAX_SIZE, GRO_IPV4_MAX_SIZE] {
        body.extend(8u16.to_ne_bytes());
        body.extend(attribute.to_ne_bytes());
        body.extend(size.to_ne_bytes());
    }
    let mut message = (16 + body.len() as u32).to_ne_bytes().to_vec();
    message.extend(libc::RTM_SETLINK.to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    let mut answer = [0u8; 512];
    // SAFETY: plain arguments, a descriptor that is new and nobody else's, live buffers of the lengths given.
    let got = unsafe {
        let socket = OwnedFd::from_raw_fd(libc::socket(
            libc::AF_NETLINK,
            libc::SOCK_RAW | libc::SOCK_CLOEXEC,
            libc::NETLINK_ROUTE,
        ));
        let sent = libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0);
        assert_eq!(sent, message.len() as isize);
        libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0)
    };
    assert!(got >= 20, "{}", std::io::Error::last_os_error());
    assert_eq!(i32::from_ne_bytes(answer[16..20].try_into().unwrap()), 0, "super-packets of {size} on {device}");
}

/// The largest frame that has come in through an interface.
struct Largest(Arc<AtomicUsize>, Arc<AtomicBool>);

impl Largest {
    fn watch(net: &Net, pod: &str, device: &'static str) -> Self {
        let (largest, ended) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (seen, end) = (Arc::clone(&largest), Arc::clone(&ended));
        let socket = net.run(pod, move || common::net::packet_socket(device));
        std::thread::spawn(move || {
            let mut byte = [0u8; 1];
            while !end.load(Ordering::Relaxed) {
                // SAFETY: a live buffer of the length given; the kernel tells the length that the frame has.
                let got = unsafe { libc::recv(socket.as_raw_fd(), byte.as_mut_ptr().cast(), 1, libc::MSG_TRUNC) };
                seen.fetch_max(usize::try_from(got).unwrap_or(0), Ordering::Relaxed);
            }
        });
        Largest(largest, ended)
    }

    /// Begins anew.
    fn take(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

impl Drop for Largest {
    fn drop(&mut self) {
        self.1.store(true, Ordering::Relaxed);
    }
}

/// Byte `at` of a transfer: not the same at the same place of two packets.
fn content(at: usize) -> u8 {
    (at.wrapping_mul(0x9e37_79b1) >> 13) as u8
}

/// Takes transfers and answers each with how many of its bytes were right.
fn serve(net: &Net, port: u16) {
    for vip in [IpAddr::V4(V4), IpAddr::V6(V6)] {
        let stop = net.stop.clone();
        net.within("t1", move || {
            let listener = TcpListener::bind((vip, port)).unwrap();
            listener.set_nonblocking(true).unwrap();
            while !stop.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(2));
                    continue;
                };
                stream.set_nonblocking(false).unwrap();
                let mut bytes = Vec::with_capacity(SIZE);
                let _ = stream.read_to_end(&mut bytes);
                let right = bytes.iter().enumerate().filter(|(at, byte)| **byte == content(*at)).count();
                let _ = stream.write_all(&(right as u64).to_be_bytes());
            }
        });
    }
}

/// Transfers; bytes that arrived right, and segments that were sent, by the client's TCP itself.
fn transfer(vip: IpAddr, port: u16) -> (u64, u64) {
    let bytes: Vec<u8> = (0..SIZE).map(content).collect();
    let mut stream = TcpStream::connect_timeout(&SocketAddr::new(vip, port), Duration::from_secs(5)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.write_all(&bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    // Where `tcpi_segs_out` is in `struct tcp_info`.
    const SEGMENTS: usize = 136;
    let mut info = [0u8; 256];
    let mut length = info.len() as libc::socklen_t;
    // SAFETY: a live buffer of the length given.
    let result = unsafe {
        let value = info.as_mut_ptr().cast();
        libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, value, &raw mut length)
    };
    assert_eq!(result, 0);
    let segments = u32::from_ne_bytes(info[SEGMENTS..SEGMENTS + 4].try_into().unwrap());
    (u64::from_be_bytes(answer.try_into().unwrap()), segments.into())
}

/// Packets and bytes of the flow, and of the target.
fn counted(engine: &Engine) -> [(u64, u64); 2] {
    let (flows, targets) = (engine.flow_hits().unwrap(), engine.target_hits().unwrap());
    [flows[0].counter, targets[0].counter].map(|c| (c.packets, c.bytes))
}

#[test]
fn super_packets_beyond_64_kib_arrive_whole_and_are_counted_by_their_segments() {
    let fs = BpfFs::new();
    let net = Net::new(1);
    serve(&net, 4000);
    serve(&net, 5000);
    for (pod, devices) in [("c", &["eth0"][..]), ("l", &["ext", "nsm1"]), ("t1", &["eth0"])] {
        net.run(pod, move || devices.iter().for_each(|device| allow(device, true)));
    }
    let config = Config {
        nats: vec![Nat { vips: vips(), protocol: Protocol::Tcp, port: 80, target_port: 5000 }],
        ..dual_stack(vec![flow("f", &[Protocol::Tcp], &[4000, 80])])
    };
    let engine = start(&net, fs.settings(), config, net.targets(&[1]));
    let (into, out) = (Largest::watch(&net, "l", "ext"), Largest::watch(&net, "t1", "eth0"));
    // Straight into the target's link, and, port 80, with the port translated.
    for (vip, port) in [(V4.into(), 4000), (V6.into(), 4000), (V4.into(), 80), (IpAddr::from(V6), 80)] {
        let before = counted(&engine);
        for watched in [&into, &out] {
            watched.take();
        }
        let (right, segments) = net.run("c", move || transfer(vip, port));
        let largest = [into.take(), out.take()];
        assert_eq!(right, SIZE as u64, "{vip} port {port}");
        for (what, before, after) in
            [("flow", before[0], counted(&engine)[0]), ("target", before[1], counted(&engine)[1])]
        {
            let (packets, bytes) = (after.0 - before.0, after.1 - before.1);
            println!("{vip} port {port}, {what}: {packets} packets, {bytes} bytes; largest frames {largest:?}");
            assert_eq!(packets, segments, "{vip} port {port}, {what}: as many as the client has sent");
            assert!(bytes > SIZE as u64, "{bytes}");
            // Headers count once for each super-packet, so there are far fewer than segments.
            assert!(bytes < SIZE as u64 + packets * HEADERS / 4, "{bytes} bytes of {packets} packets");
        }
        let (least, most) = (65_536 + 1, LARGEST as usize + 64);
        assert!(largest.iter().all(|size| (least..=most).contains(size)), "{vip} port {port}: {largest:?}");
    }
    let reasons = engine.reasons().unwrap();
    for (reason, counter) in &reasons {
        assert!(*reason == Reason::Redirected || counter.packets == 0, "{reason:?}: {counter:?}");
    }
    // A link to the target that takes no more than 64 KiB at once.
    net.run("l", || allow("nsm1", false));
    net.run("t1", || allow("eth0", false));
    for vip in [IpAddr::V4(V4), IpAddr::V6(V6)] {
        let (right, _) = net.run("c", move || transfer(vip, 4000));
        assert_eq!(right, SIZE as u64, "{vip}");
    }
}
