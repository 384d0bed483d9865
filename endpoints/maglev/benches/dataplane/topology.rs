//! The namespaces: a generator, the machine in the middle, one real target, and a fan of next hops.
//!
//! ```text
//!  generator            middle                                fan
//!    mbg0 --------- mbx0 (load balancer)   mbf0 ------------- mbf1   1,000 static neighbours, a sink
//!    mbg1 --------- mbx1 (plain forwarding)
//!    mbg2 --------- mbx2 (another balancer) mbt0 ------------ mbt1   target: holds all VIPs
//! ```
//!
//! The three ways share everything but their first cable, so that measuring one after the other changes nothing else.
#![allow(unsafe_code)] // SAFETY: one ioctl below.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;

use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns};
use nix::unistd::Pid;

/// Next hops of the fan.
pub(crate) const FAN: u32 = 1_000;
const PREFIX: &str = "mdb-";
const PODS: [&str; 4] = ["generator", "middle", "fan", "target"];

/// Which way packets take, by the VIP they are sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through the programs.
    Balancer = 0,
    /// By the kernel's routing table.
    Kernel = 1,
    /// Another balancer.
    Peer = 2,
}

impl Way {
    /// VIP whose packets end in the fan.
    pub(crate) fn fan_vip(self) -> Ipv4Addr {
        Ipv4Addr::new(20, 0, self as u8, 1)
    }

    /// The same in IPv6.
    pub(crate) fn fan_vip6(self) -> Ipv6Addr {
        Ipv6Addr::new(0x2000, 0, 0, self as u16, 0, 0, 0, 1)
    }

    /// VIP whose packets go to the target.
    pub(crate) fn target_vip(self) -> Ipv4Addr {
        Ipv4Addr::new(20, 0, self as u8, 2)
    }

    /// The same in IPv6.
    pub(crate) fn target_vip6(self) -> Ipv6Addr {
        Ipv6Addr::new(0x2000, 0, 0, self as u16, 0, 0, 0, 2)
    }

    /// The middle's interface.
    pub(crate) fn interface(self) -> String {
        format!("mbx{}", self as u8)
    }
}

/// Address of a next hop in the fan.
pub(crate) fn fan_address(identifier: u32) -> Ipv4Addr {
    Ipv4Addr::new(172, 16, (identifier >> 8) as u8, identifier as u8)
}

/// The same in IPv6.
pub(crate) fn fan_address6(identifier: u32) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x16, 0, 0, 0, 0, 0, identifier as u16)
}

/// Address of the target.
pub(crate) const TARGET: Ipv4Addr = Ipv4Addr::new(172, 20, 0, 2);
/// The same in IPv6.
pub(crate) const TARGET6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x20, 0, 0, 0, 0, 0, 2);

pub(crate) struct Topology {
    id: String,
}

fn command(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(out.status.success(), "{program} {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr));
}

fn ip(args: &str) {
    command("ip", &args.split_whitespace().collect::<Vec<_>>());
}

impl Topology {
    pub(crate) fn new() -> Self {
        sweep();
        let topology = Topology { id: format!("{PREFIX}{}-", std::process::id()) };
        for pod in PODS {
            ip(&format!("netns add {}", topology.name(pod)));
            ip(&format!("-n {} link set lo up", topology.name(pod)));
            topology.within(pod, || {
                for (key, value) in [
                    ("ipv4/ip_forward", "1"),
                    ("ipv6/conf/all/forwarding", "1"),
                    ("ipv4/conf/all/rp_filter", "0"),
                    ("ipv4/conf/default/rp_filter", "0"),
                    ("ipv6/conf/all/accept_dad", "0"),
                    ("ipv6/conf/default/accept_dad", "0"),
                ] {
                    std::fs::write(format!("/proc/sys/net/{key}"), value).unwrap();
                }
            });
        }
        for way in 0..3 {
            let (near, far) = (format!("mbg{way}"), format!("mbx{way}"));
            topology.cable(
                ("generator", &near, &format!("10.0.{way}.1/24")),
                ("middle", &far, &format!("10.0.{way}.2/24")),
            );
            ip(&format!("-n {} route add 20.0.{way}.0/24 via 10.0.{way}.2", topology.name("generator")));
            ip(&format!("-n {} addr add fd00:10:{way}::1/64 dev {near}", topology.name("generator")));
            ip(&format!("-n {} addr add fd00:10:{way}::2/64 dev {far}", topology.name("middle")));
            ip(&format!("-n {} -6 route add 2000:0:0:{way}::/64 via fd00:10:{way}::2", topology.name("generator")));
        }
        topology.cable(("middle", "mbf0", "172.16.255.1/16"), ("fan", "mbf1", "172.16.255.2/16"));
        ip(&format!("-n {} addr add fd00:16::1:1/64 dev mbf0", topology.name("middle")));
        topology.cable(("middle", "mbt0", "172.20.0.1/24"), ("target", "mbt1", "172.20.0.2/24"));
        let (middle, target) = (topology.name("middle"), topology.name("target"));
        ip(&format!("-n {middle} addr add fd00:20::1/64 dev mbt0"));
        ip(&format!("-n {target} addr add {TARGET6}/64 dev mbt1"));
        for way in [Way::Balancer, Way::Kernel, Way::Peer] {
            ip(&format!("-n {target} addr add {}/32 dev lo", way.target_vip()));
            ip(&format!("-n {target} addr add {}/128 dev lo", way.target_vip6()));
        }
        ip(&format!("-n {target} route add default via 172.20.0.1"));
        ip(&format!("-n {target} -6 route add default via fd00:20::1"));
        ip(&format!("-n {middle} route add {}/32 via {}", Way::Kernel.fan_vip(), fan_address(1)));
        ip(&format!("-n {middle} -6 route add {}/128 via {}", Way::Kernel.fan_vip6(), fan_address6(1)));
        ip(&format!("-n {middle} route add {}/32 via {TARGET}", Way::Kernel.target_vip()));
        ip(&format!("-n {middle} -6 route add {}/128 via {TARGET6}", Way::Kernel.target_vip6()));
        topology.neighbours();
        topology
    }

    fn neighbours(&self) {
        let addresses = (1..=FAN).flat_map(|id| [(id, IpAddr::V4(fan_address(id))), (id, fan_address6(id).into())]);
        let lines: String = addresses
            .map(|(id, address)| {
                let [high, low] = (id as u16).to_be_bytes();
                format!("neigh add {address} lladdr 02:00:00:00:{high:02x}:{low:02x} dev mbf0 nud permanent\n")
            })
            .collect();
        let batch = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(batch.path(), lines).unwrap();
        command("ip", &["-n", &self.name("middle"), "-batch", &batch.path().display().to_string()]);
    }

    fn cable(&self, a: (&str, &str, &str), b: (&str, &str, &str)) {
        let (na, nb) = (self.name(a.0), self.name(b.0));
        ip(&format!("link add {} netns {na} type veth peer name {} netns {nb}", a.1, b.1));
        for (ns, (_, device, address)) in [(&na, a), (&nb, b)] {
            ip(&format!("-n {ns} addr add {address} dev {device}"));
            ip(&format!("-n {ns} link set {device} up"));
        }
    }

    /// Name of a pod's namespace.
    pub(crate) fn name(&self, pod: &str) -> String {
        format!("{}{pod}", self.id)
    }

    /// Runs on a thread of its own in a pod's namespace.
    pub(crate) fn within<T: Send>(&self, pod: &str, f: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| match scope.spawn(|| enter(&self.path(pod), f)).join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    }

    /// The same without waiting for it.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        pod: &str,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> std::thread::JoinHandle<T> {
        let path = self.path(pod);
        std::thread::spawn(move || enter(&path, f))
    }

    fn path(&self, pod: &str) -> PathBuf {
        PathBuf::from("/run/netns").join(self.name(pod))
    }

    /// Index of an interface.
    pub(crate) fn index(&self, pod: &str, device: &str) -> u32 {
        self.within(pod, || nix::net::if_::if_nametoindex(device).unwrap())
    }

    /// Link address of an interface.
    pub(crate) fn mac(&self, pod: &str, device: &str) -> [u8; 6] {
        let out = Command::new("ip").args(["-n", &self.name(pod), "-o", "link", "show", device]).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let mac = text.split("link/ether ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        let bytes: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        bytes.try_into().unwrap()
    }

    /// As a NIC with a core of its own: packets are taken off the cable by a kernel thread on CPU 1. `false`: as usual.
    pub(crate) fn own_core(&self, on: bool) {
        for way in [Way::Balancer, Way::Kernel, Way::Peer] {
            let device = way.interface();
            let thread = || {
                let script = format!("echo {} > /sys/class/net/{device}/threaded", on as u8);
                command("ip", &["netns", "exec", &self.name("middle"), "sh", "-c", &script]);
            };
            // Receive offload is what makes veth poll at all, so it comes first and goes last.
            if !on {
                thread();
            }
            for (pod, name) in [("middle", device.clone()), ("generator", format!("mbg{}", way as u8))] {
                self.within(pod, move || receive_offload(&name, on));
            }
            if on {
                thread();
                pin(kernel_thread(&format!("napi/{device}-")), 1);
            }
        }
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        for pod in PODS {
            let _ = Command::new("ip").args(["netns", "del", &self.name(pod)]).status();
        }
    }
}

fn enter<T>(path: &std::path::Path, f: impl FnOnce() -> T) -> T {
    let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    setns(file.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
    f()
}

/// Removes what a killed run has left.
fn sweep() {
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !std::path::Path::new("/proc").join(pid).exists()) {
            let _ = Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

/// Binds a thread (0: the calling one) to a CPU.
pub(crate) fn pin(thread: i32, cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu).unwrap();
    sched_setaffinity(Pid::from_raw(thread), &set).unwrap_or_else(|e| panic!("CPU {cpu}: {e}"));
}

fn kernel_thread(prefix: &str) -> i32 {
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.starts_with(prefix) {
            return pid;
        }
    }
    panic!("no kernel thread {prefix}*");
}

/// Switches generic receive offload of an interface of this namespace.
fn receive_offload(device: &str, on: bool) {
    const SIOCETHTOOL: libc::c_ulong = 0x8946;
    const ETHTOOL_SGRO: u32 = 0x2c;
    let socket = std::net::UdpSocket::bind((IpAddr::from(Ipv4Addr::UNSPECIFIED), 0)).unwrap();
    let mut value = [ETHTOOL_SGRO, on as u32];
    // SAFETY: a zeroed ifreq is valid; the kernel reads the name and two words behind the pointer during the call.
    let result = unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(device.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
        libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), SIOCETHTOOL as _, &raw mut request)
    };
    assert_eq!(result, 0, "receive offload of {device}: {}", std::io::Error::last_os_error());
}
