//! What happens inside the guest. The machine is switched off at the end, however it went.
#![allow(unsafe_code)] // SAFETY: two system calls without a wrapper here: load a module, switch off.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use meridio_maglev::{Engine, Options, Protocol, Reason, Settings, Target, Targets, own_directory, remove_gone};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::DONE;
use super::common::net::{V4, V6};
use super::common::{dual_stack, flow};

/// What a cloud kernel keeps out of its image and the programs are attached by.
const MODULES: [&str; 2] = ["sch_ingress", "cls_bpf"];
/// What the guest gets.
pub(crate) const ALL_MODULES: [&str; 3] = ["veth", MODULES[0], MODULES[1]];
/// TC_ACT_OK, TC_ACT_REDIRECT.
const OK: u32 = 0;
const REDIRECT: u32 = 7;

/// Not a test of this machine: the host's test boots a kernel with this as its init.
#[test]
#[ignore = "runs as init of an emulated machine"]
fn init() {
    assert_eq!(std::process::id(), 1, "this is the init of an emulated machine");
    if let Err(panic) = std::panic::catch_unwind(run) {
        let text = panic.downcast_ref::<String>().cloned();
        println!("guest: failed: {}", text.unwrap_or_default());
    }
    // SAFETY: takes no pointer.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF) };
}

fn ip(args: &str) {
    let out = Command::new("/sbin/ip").args(args.split_whitespace()).output().unwrap();
    assert!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
}

fn prepare() {
    let none = None::<&str>;
    let mounts =
        [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"), ("bpf", "/sys/fs/bpf"), ("tmpfs", "/run")];
    for (kind, place) in mounts {
        mount(Some(kind), place, Some(kind), MsFlags::empty(), none).unwrap_or_else(|e| panic!("mount {place}: {e}"));
    }
    ip("link set lo up");
    for (key, value) in [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")] {
        std::fs::write(Path::new("/proc/sys/net").join(key), value).unwrap();
    }
}

fn load(module: &str) {
    let file = std::fs::File::open(format!("/modules/{module}.ko")).unwrap();
    // SAFETY: an open file and an empty string that ends with 0.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    assert_eq!(result, 0, "module {module}: {}", std::io::Error::last_os_error());
}

/// Loads the modules one after the other: as long as one is missing, that is what the attachment fails for.
fn what_the_kernel_lacks_is_named() {
    let mut kernel = Options::new("/sys/fs/bpf/early");
    kernel.chunks = 4;
    let mut engine = Engine::open(Settings { kernel, offset_start: 5000 }).unwrap_or_else(|e| panic!("{e}"));
    for module in MODULES {
        let refused = engine.attach("lo").unwrap_err().to_string();
        let named = ["interface lo", "CONFIG_NET_SCH_INGRESS", "CONFIG_NET_CLS_BPF"];
        assert!(named.iter().all(|name| refused.contains(name)), "without {module}: {refused}");
        load(module);
    }
    engine.attach("lo").unwrap_or_else(|e| panic!("{e}"));
    drop(engine);
    Engine::remove(Path::new("/sys/fs/bpf/early"), &["lo"]).unwrap_or_else(|e| panic!("{e}"));
}

/// A namespace with one cable to this one; what arrives at its end of the cable is answered as the VIP.
struct Pod {
    name: &'static str,
    call: mpsc::Sender<Box<dyn FnOnce() + Send>>,
}

impl Pod {
    fn new(name: &'static str, device: &str, net: u8, host: u8) -> Self {
        let (call, calls) = mpsc::channel::<Box<dyn FnOnce() + Send>>();
        let (ready, is_ready) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ready.send(nix::unistd::gettid()).unwrap();
            calls.into_iter().for_each(|f| f());
        });
        let thread = is_ready.recv().unwrap();
        ip(&format!("link add {device} type veth peer name eth0 netns {thread}"));
        let pod = Pod { name, call };
        let other = 3 - host;
        ip(&format!("addr add 172.16.{net}.{other}/24 dev {device}"));
        ip(&format!("addr add fd00:{net}::{other}/64 dev {device} nodad"));
        ip(&format!("link set {device} up"));
        pod.run(move || {
            ip("link set lo up");
            ip(&format!("addr add 172.16.{net}.{host}/24 dev eth0"));
            ip(&format!("addr add fd00:{net}::{host}/64 dev eth0 nodad"));
            ip("link set eth0 up");
            ip(&format!("route add default via 172.16.{net}.{other}"));
            ip(&format!("-6 route add default via fd00:{net}::{other}"));
        });
        pod
    }

    fn run<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> T {
        let (result, done) = mpsc::channel();
        self.call.send(Box::new(move || drop(result.send(f())))).unwrap();
        done.recv().unwrap_or_else(|_| panic!("pod {} failed", self.name))
    }
}

fn index(device: &str) -> u32 {
    std::fs::read_to_string(format!("/sys/class/net/{device}/ifindex")).unwrap().trim().parse().unwrap()
}

/// With an Ethernet header for the loopback interface, which test runs use.
fn udp_packet(vip: IpAddr, ttl: u8, payload: u16) -> Vec<u8> {
    let mut packet = vec![0; 12];
    match vip {
        IpAddr::V4(vip) => {
            packet.extend([0x08, 0x00, 0x45, 0]);
            packet.extend((28 + payload).to_be_bytes());
            packet.extend([0, 0, 0, 0, ttl, 17, 0, 0, 172, 16, 1, 1]);
            packet.extend(vip.octets());
        }
        IpAddr::V6(vip) => {
            packet.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            packet.extend((8 + payload).to_be_bytes());
            packet.extend([17, ttl]);
            packet.extend("fd00:1::1".parse::<Ipv6Addr>().unwrap().octets());
            packet.extend(vip.octets());
        }
    }
    packet.extend([0x30, 0x39, 0x0f, 0xa0]);
    packet.extend((8 + payload).to_be_bytes());
    packet.extend([0; 2]);
    packet.extend(vec![0; payload as usize]);
    packet
}

/// The programs' answers: fast path, and what the stack has to do; then datagrams of a client to a target and back.
fn run() {
    prepare();
    what_the_kernel_lacks_is_named();
    load("veth");
    let client = Pod::new("client", "ext", 1, 1);
    let target = Pod::new("target", "nsm", 2, 2);
    target.run(|| {
        ip(&format!("addr add {V4}/32 dev lo"));
        ip(&format!("addr add {V6}/128 dev lo nodad"));
    });
    let nsm = index("nsm");
    let config = dual_stack(vec![flow("f", &[Protocol::Udp], &[4000])]);
    let hop = Target {
        v4: Some((Ipv4Addr::new(172, 16, 2, 2), nsm)),
        v6: Some(("fd00:2::2".parse().unwrap(), nsm)),
        mtu: 1500,
        direct: true,
    };
    let targets = BTreeMap::from([("s".to_owned(), Targets::from([(7, hop)]))]);
    let mut kernel = Options::new("/sys/fs/bpf/lb");
    kernel.chunks = 4;
    let started = std::time::Instant::now();
    let mut engine = Engine::open(Settings { kernel, offset_start: 5000 }).unwrap_or_else(|e| panic!("{e}"));
    let loaded = started.elapsed();
    engine.apply(&config, &targets).unwrap_or_else(|e| panic!("{e:?}"));
    engine.attach("ext").unwrap_or_else(|e| panic!("{e}"));
    for vip in [IpAddr::V4(V4), IpAddr::V6(V6)] {
        for (ttl, payload, wanted) in [(64, 20, REDIRECT), (1, 20, OK), (64, 1_800, OK)] {
            let packet = udp_packet(vip, ttl, payload);
            let run = engine.test_run(true, &packet, 1).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(run.result, wanted, "{vip}, TTL {ttl}, {payload} bytes");
        }
    }
    let echoes = datagrams(&client, &target);
    let reasons = engine.reasons().unwrap_or_else(|e| panic!("{e}"));
    let count = |reason: Reason| reasons.iter().find(|(r, _)| *r == reason).map_or(0, |(_, c)| c.packets);
    assert!(count(Reason::Redirected) >= 2 + echoes, "{reasons:?}");
    assert_eq!((count(Reason::SlowTtl), count(Reason::SlowMtu)), (2, 2), "{reasons:?}");
    what_a_pod_leaves_is_removed_once_it_is_gone();
    let (size, verified) = engine.program_size().unwrap_or_else(|e| panic!("{e}"));
    let release = nix::sys::utsname::uname().unwrap();
    println!(
        "{DONE} {} loaded {size} instructions in {:.1} s ({verified} verified, 0: not told), {echoes} echoes",
        release.release().to_string_lossy(),
        loaded.as_secs_f64(),
    );
}

/// The link to a network namespace, and what the kernel says of it before and after.
fn what_a_pod_leaves_is_removed_once_it_is_gone() {
    let base = Path::new("/sys/fs/bpf/pods");
    let pod = Pod::new("gone", "gone", 3, 2);
    let directory = pod.run(move || {
        let mut kernel = Options::new(own_directory(base).unwrap());
        kernel.chunks = 4;
        let directory = kernel.directory.clone();
        drop(Engine::open(Settings { kernel, offset_start: 5000 }).unwrap_or_else(|e| panic!("{e}")));
        directory
    });
    assert!(remove_gone(base).unwrap().is_empty());
    // With its only thread the namespace goes.
    drop(pod);
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while remove_gone(base).unwrap() != std::slice::from_ref(&directory) {
        assert!(std::time::Instant::now() < end, "not removed");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(!directory.exists());
}

/// Datagrams answered by the target as the VIP, of both families. The first ones may wait for neighbours.
fn datagrams(client: &Pod, target: &Pod) -> u64 {
    let server = target.run(|| {
        [IpAddr::V4(V4), IpAddr::V6(V6)]
            .map(|vip| UdpSocket::bind((vip, 4000)).unwrap_or_else(|e| panic!("{vip}: {e}")))
    });
    for socket in server {
        std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while let Ok((n, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..n], from);
            }
        });
    }
    client.run(|| {
        let mut answered = 0;
        for (vip, any) in [(IpAddr::V4(V4), "0.0.0.0:0"), (IpAddr::V6(V6), "[::]:0")] {
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect((vip, 4000)).unwrap_or_else(|e| panic!("connect {vip}: {e}"));
            socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            let mut buffer = [0; 64];
            for n in 0..10u8 {
                // One repetition: emulation is slow, and neighbours have to be found.
                let mut echo = || socket.send(&[n; 40]).is_ok() && matches!(socket.recv(&mut buffer), Ok(40));
                assert!(echo() || echo(), "{vip}: no answer to datagram {n}");
                answered += 1;
            }
        }
        answered
    })
}
