//! Namespaces of a test: client, load balancer, targets; and sockets that send and see whole frames in them.
#![allow(unsafe_code)] // SAFETY: packet sockets; each call states why its pointers are valid.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use meridio_maglev::{Target, Targets};

pub(crate) const V4: Ipv4Addr = Ipv4Addr::new(20, 0, 0, 1);
pub(crate) const V6: Ipv6Addr = Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1);
/// The client's addresses.
pub(crate) const CLIENT4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub(crate) const CLIENT6: Ipv6Addr = Ipv6Addr::new(0xfd0a, 0, 0, 0, 0, 0, 0, 1);

pub(crate) fn ip(args: &str) {
    let out = Command::new("ip").args(args.split_whitespace()).output().unwrap();
    assert!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Namespaces of one test, removed at the end: `c` is the client, `l` the load balancer, `t1`... are targets.
pub(crate) struct Net {
    id: String,
    pods: Vec<String>,
    pub(crate) stop: Arc<AtomicBool>,
}

impl Net {
    pub(crate) fn name(&self, pod: &str) -> String {
        format!("mdt-{}-{pod}", self.id)
    }

    pub(crate) fn new(targets: u8) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{:x}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let pods: Vec<String> =
            ["c".to_owned(), "l".to_owned()].into_iter().chain((1..=targets).map(|n| format!("t{n}"))).collect();
        let net = Net { id, pods, stop: Arc::default() };
        for pod in &net.pods {
            ip(&format!("netns add {}", net.name(pod)));
            ip(&format!("-n {} link set lo up", net.name(pod)));
            for key in [
                "net.ipv6.conf.all.accept_dad=0",
                "net.ipv6.conf.default.accept_dad=0",
                "net.ipv4.ip_forward=1",
                "net.ipv6.conf.all.forwarding=1",
                "net.ipv4.conf.all.rp_filter=0",
                "net.ipv4.conf.default.rp_filter=0",
                "net.ipv4.fwmark_reflect=1",
                "net.ipv6.fwmark_reflect=1",
                "net.ipv4.ping_group_range=0 2147483647",
            ] {
                let (key, value) = key.split_once('=').unwrap();
                let path = format!("/proc/sys/{}", key.replace('.', "/"));
                net.within(pod, move || std::fs::write(path, value).unwrap()).join().unwrap();
            }
        }
        net.wire("c", "ext", 1, "10.0.0", "fd0a");
        let c = net.name("c");
        ip(&format!("-n {c} route add {V4}/32 via 10.0.0.2"));
        ip(&format!("-n {c} -6 route add {V6}/128 via fd0a::2"));
        for n in 1..=targets {
            net.wire(&format!("t{n}"), &format!("nsm{n}"), 2, &format!("172.16.{n}"), &format!("fd00:{n}"));
            let t = net.name(&format!("t{n}"));
            ip(&format!("-n {t} addr add {V4}/32 dev lo"));
            ip(&format!("-n {t} addr add {V6}/128 dev lo nodad"));
            ip(&format!("-n {t} route add default via 172.16.{n}.1"));
            ip(&format!("-n {t} -6 route add default via fd00:{n}::1"));
        }
        net
    }

    /// Pod and load balancer share a cable; the pod has host part 2 (client: 1).
    fn wire(&self, pod: &str, device: &str, host: u8, v4: &str, v6: &str) {
        let (l, p) = (self.name("l"), self.name(pod));
        ip(&format!("link add {device} netns {l} type veth peer name eth0 netns {p}"));
        let other = if host == 1 { 2 } else { 1 };
        for (ns, dev, n) in [(&l, device, other), (&p, "eth0", host)] {
            ip(&format!("-n {ns} addr add {v4}.{n}/24 dev {dev}"));
            ip(&format!("-n {ns} addr add {v6}::{n}/64 dev {dev} nodad"));
            ip(&format!("-n {ns} link set {dev} up"));
        }
    }

    /// Runs in a pod's namespace, on a thread of its own.
    pub(crate) fn within<T: Send + 'static>(
        &self,
        pod: &str,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let path = format!("/run/netns/{}", self.name(pod));
        std::thread::spawn(move || {
            let file = std::fs::File::open(path).unwrap();
            nix::sched::setns(file.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            f()
        })
    }

    /// The same, waited for.
    pub(crate) fn run<T: Send + 'static>(&self, pod: &str, f: impl FnOnce() -> T + Send + 'static) -> T {
        self.within(pod, f).join().unwrap()
    }

    fn link(&self, pod: &str, device: &str) -> String {
        let out = Command::new("ip").args(["-n", &self.name(pod), "-o", "link", "show", device]).output().unwrap();
        String::from_utf8(out.stdout).unwrap()
    }

    /// Name of the interface of a pod with an index.
    pub(crate) fn device(&self, pod: &str, index: u32) -> String {
        let out = Command::new("ip").args(["-n", &self.name(pod), "-o", "link"]).output().unwrap();
        let links = String::from_utf8(out.stdout).unwrap();
        let line = links.lines().find(|line| line.starts_with(&format!("{index}:"))).unwrap();
        line.split([':', '@']).nth(1).unwrap().trim().to_owned()
    }

    /// Index of an interface of the load balancer.
    pub(crate) fn index(&self, device: &str) -> u32 {
        self.link("l", device).split(':').next().unwrap().trim().parse().unwrap()
    }

    /// Link address of an interface.
    pub(crate) fn mac(&self, pod: &str, device: &str) -> [u8; 6] {
        let line = self.link(pod, device);
        let text = line.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
        let bytes: Vec<u8> = text.split(':').map(|b| u8::from_str_radix(b, 16).unwrap()).collect();
        bytes.try_into().unwrap()
    }

    /// A target as the engine knows it.
    pub(crate) fn target(&self, n: u32) -> Target {
        let index = self.index(&format!("nsm{n}"));
        let v4 = Ipv4Addr::new(172, 16, n as u8, 2);
        let v6 = Ipv6Addr::new(0xfd00, n as u16, 0, 0, 0, 0, 0, 2);
        Target { v4: Some((v4, index)), v6: Some((v6, index)), mtu: 0, direct: true }
    }

    /// Targets of stream `s`.
    pub(crate) fn targets(&self, which: &[u32]) -> BTreeMap<String, Targets> {
        BTreeMap::from([("s".to_owned(), which.iter().map(|n| (*n, self.target(*n))).collect())])
    }

    /// What the load balancer's process sets up around the engine for packets that take the slow path.
    pub(crate) fn slow_path(&self, marks: &[(u32, u32)]) {
        let l = self.name("l");
        for family in ["-4", "-6"] {
            // Errors that this machine makes go to the clients, not after the packet that they are about.
            ip(&format!("-n {l} {family} rule add pref 199 iif lo lookup main"));
        }
        for (mark, n) in marks {
            let table = mark & 0xffff;
            for (family, via) in [("-4", format!("172.16.{n}.2")), ("-6", format!("fd00:{n}::2"))] {
                ip(&format!("-n {l} {family} rule add pref 200 fwmark {mark:#x} lookup {table}"));
                ip(&format!("-n {l} {family} route add default via {via} dev nsm{n} table {table}"));
            }
        }
    }

    /// Opens a socket that sends and sees whole frames of an interface.
    pub(crate) fn tap(&self, pod: &str, device: &str) -> Tap {
        let device = device.to_owned();
        let stop = self.stop.clone();
        let seen: Arc<Mutex<Vec<Vec<u8>>>> = Arc::default();
        let into = seen.clone();
        let socket = self.run(pod, move || packet_socket(&device));
        let reader = socket.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut buffer = vec![0u8; 70_000];
            while !stop.load(Ordering::Relaxed) {
                if let Some(frame) = receive(&reader, &mut buffer) {
                    into.lock().unwrap().push(frame);
                }
            }
        });
        Tap { socket, seen }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for pod in &self.pods {
            let _ = Command::new("ip").args(["netns", "del", &self.name(pod)]).status();
        }
    }
}

/// A packet socket, and the frames that have come in through it.
pub(crate) struct Tap {
    socket: OwnedFd,
    seen: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Tap {
    pub(crate) fn send(&self, frame: &[u8]) {
        // SAFETY: a live buffer of the length given.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
    }

    /// Packets, from the network header on, of the frames seen so far that satisfy a condition.
    pub(crate) fn matching(&self, condition: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        let seen = self.seen.lock().unwrap();
        seen.iter().filter_map(|frame| frame.get(14..)).filter(|packet| condition(packet)).map(<[u8]>::to_vec).collect()
    }

    /// The numbers that frames for a link address end with, of those seen so far.
    pub(crate) fn numbers_to(&self, address: [u8; 6]) -> Vec<u64> {
        let seen = self.seen.lock().unwrap();
        let ours = seen.iter().filter(|frame| frame.starts_with(&address));
        ours.filter_map(|frame| frame.last_chunk().map(|number| u64::from_be_bytes(*number))).collect()
    }

    pub(crate) fn forget(&self) {
        self.seen.lock().unwrap().clear();
    }
}

pub(crate) fn packet_socket(device: &str) -> OwnedFd {
    // SAFETY: plain arguments; the descriptor is new and nobody else's.
    let socket = unsafe {
        let fd =
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, (libc::ETH_P_ALL as u16).to_be() as i32);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        OwnedFd::from_raw_fd(fd)
    };
    let name = std::ffi::CString::new(device).unwrap();
    // SAFETY: plain numbers, for which zero is a value; a NUL-terminated name.
    let (mut address, index) =
        unsafe { (std::mem::zeroed::<libc::sockaddr_ll>(), libc::if_nametoindex(name.as_ptr())) };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = index as i32;
    let length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: a live address of the length given.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    assert_eq!(bound, 0, "{device}: {}", std::io::Error::last_os_error());
    let timeout = libc::timeval { tv_sec: 0, tv_usec: 50_000 };
    let length = size_of::<libc::timeval>() as u32;
    // SAFETY: a live value of the length given.
    let set = unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const timeout).cast(), length)
    };
    assert_eq!(set, 0);
    socket
}

/// The next frame that comes in (not one that goes out), or nothing for a while.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Option<Vec<u8>> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut length = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: live buffers of the lengths given.
    let got = unsafe {
        libc::recvfrom(
            socket.as_raw_fd(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            0,
            (&raw mut from).cast(),
            &raw mut length,
        )
    };
    (got > 0 && from.sll_pkttype != libc::PACKET_OUTGOING).then(|| buffer[..got as usize].to_vec())
}

/// Waits until something is true.
pub(crate) fn eventually(within: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + within;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
