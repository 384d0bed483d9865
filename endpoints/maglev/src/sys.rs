//! The bpf system call for what the loader library has no call for: maps of large values, and test runs.
#![allow(unsafe_code)] // SAFETY: bpf(2) takes pointers; each call below states why they are valid.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use meridio_decision::{Decision, layout::*};

const LOOKUP: libc::c_long = 1;
const UPDATE: libc::c_long = 2;
const DELETE: libc::c_long = 3;
const NEXT_KEY: libc::c_long = 4;
const LOAD: libc::c_long = 5;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const CREATE: libc::c_long = 0;
const TEST_RUN: libc::c_long = 10;
const INFO: libc::c_long = 15;
const QUERY: libc::c_long = 16;
const LINK_CREATE: libc::c_long = 28;
/// Where TCX programs of packets that come in are attached.
const TCX_INGRESS: u32 = 46;
/// Programs that are asked for the socket of a packet, and where they are attached.
const SK_LOOKUP: u32 = 30;
const SK_LOOKUP_ATTACH: u32 = 36;
/// Links to network namespaces.
const NETNS_LINK: u32 = 5;
/// Opened for reading only.
const READ_ONLY: u32 = 1 << 3;

/// Values that are plain bytes: `repr(C)`, no padding, every bit pattern valid.
///
/// # Safety
/// As the name says: the kernel reads and writes them as bytes.
pub(crate) unsafe trait Plain: Copy {}

macro_rules! plain {
    ($($t:ty),* $(,)?) => { $(
        // SAFETY: integers, arrays of them, and the `repr(C)` structs of the layout, which have no padding.
        unsafe impl Plain for $t {}
    )* };
}
plain!(u16, u32, u64, [u8; 128], Config, Vector, FlowEntry, StreamEntry, TargetEntry, NatKey, PrefixKey, Counter);
plain!(ByteList, FragmentKey, FragmentValue, Decision, PortMap, Chunk, Trace);

#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct CreateAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
    inner_map_fd: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    map_type: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct TestRunAttr {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    pad: u32,
    more: [u64; 4],
}

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// The beginning of `struct bpf_link_info`, as it is for a network namespace.
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    link_type: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    netns_ino: u32,
    attach_type: u32,
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: attr is a live, properly sized attribute block; the pointers in it are live for the call (callers).
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr as *mut T, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A command that makes a file descriptor.
fn descriptor<T>(command: libc::c_long, attr: &mut T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A map by its file descriptor; sizes are fixed by the types of the calls, which [`crate::kernel`] pairs with names.
#[derive(Debug)]
pub(crate) struct RawMap {
    pub(crate) fd: OwnedFd,
    pub(crate) name: &'static str,
}

impl RawMap {
    /// Opens a pinned map for reading.
    pub(crate) fn pinned(path: &Path, name: &'static str) -> io::Result<Self> {
        Self::open(path, name, READ_ONLY)
    }

    /// Opens a pinned map for reading and writing.
    pub(crate) fn pinned_writable(path: &Path, name: &'static str) -> io::Result<Self> {
        Self::open(path, name, 0)
    }

    fn open(path: &Path, name: &'static str, flags: u32) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let fd = descriptor(OBJ_GET, &mut ObjectAttr { path: path.as_ptr() as u64, flags, fd: 0 })?;
        Ok(RawMap { fd, name })
    }

    /// The same map once more.
    pub(crate) fn try_clone(&self) -> io::Result<RawMap> {
        Ok(RawMap { fd: self.fd.try_clone()?, name: self.name })
    }

    fn element(&self, key: u64, value: u64) -> ElementAttr {
        ElementAttr { map_fd: self.fd.as_raw_fd() as u32, key, value, ..ElementAttr::default() }
    }

    /// Writes one element.
    pub(crate) fn set<K: Plain, V: Plain>(&self, key: &K, value: &V) -> io::Result<()> {
        bpf(UPDATE, &mut self.element(key as *const K as u64, value as *const V as u64)).map(drop)
    }

    /// Writes one element from a slice that is as long as the map's value; `None` for another length.
    pub(crate) fn set_slice(&self, key: u32, value: &[u16; CHUNK_ROWS]) -> io::Result<()> {
        bpf(UPDATE, &mut self.element(&raw const key as u64, value.as_ptr() as u64)).map(drop)
    }

    /// Reads one element; `None`: no such key.
    pub(crate) fn get<K: Plain, V: Plain>(&self, key: &K, mut value: V) -> io::Result<Option<V>> {
        match bpf(LOOKUP, &mut self.element(key as *const K as u64, &raw mut value as u64)) {
            Ok(_) => Ok(Some(value)),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Reads a chunk of rows.
    pub(crate) fn chunk(&self, index: u32) -> io::Result<Vec<u16>> {
        let mut rows = vec![0u16; CHUNK_ROWS];
        bpf(LOOKUP, &mut self.element(&raw const index as u64, rows.as_mut_ptr() as u64))?;
        Ok(rows)
    }

    /// Reads a map of port classes.
    pub(crate) fn ports(&self, index: u32) -> io::Result<Box<PortMap>> {
        let mut ports = Box::new([0u16; 65_536]);
        bpf(LOOKUP, &mut self.element(&raw const index as u64, ports.as_mut_ptr() as u64))?;
        Ok(ports)
    }

    /// Sums a per-CPU element over all CPUs.
    pub(crate) fn sum(&self, index: u32, cpus: usize) -> io::Result<Counter> {
        let mut values = vec![Counter::default(); cpus];
        bpf(LOOKUP, &mut self.element(&raw const index as u64, values.as_mut_ptr() as u64))?;
        Ok(values
            .iter()
            .fold(Counter::default(), |a, b| Counter { packets: a.packets + b.packets, bytes: a.bytes + b.bytes }))
    }

    /// Sets a per-CPU counter to zero.
    pub(crate) fn zero(&self, index: u32, cpus: usize) -> io::Result<()> {
        let values = vec![Counter::default(); cpus];
        bpf(UPDATE, &mut self.element(&raw const index as u64, values.as_ptr() as u64)).map(drop)
    }

    /// Reads a per-CPU array of decisions (for tests).
    pub(crate) fn decisions(&self, cpus: usize) -> io::Result<Vec<[u8; 40]>> {
        // Per-CPU values are padded to 8 bytes each.
        let mut values = vec![[0u8; 40]; cpus];
        let index = 0u32;
        bpf(LOOKUP, &mut self.element(&raw const index as u64, values.as_mut_ptr() as u64))?;
        Ok(values)
    }

    /// Removes one element; a missing one is fine.
    pub(crate) fn delete<K: Plain>(&self, key: &K) -> io::Result<()> {
        match bpf(DELETE, &mut self.element(key as *const K as u64, 0)) {
            Err(e) if e.raw_os_error() != Some(libc::ENOENT) => Err(e),
            _ => Ok(()),
        }
    }

    /// All keys.
    pub(crate) fn keys<K: Plain>(&self, zero: K) -> io::Result<Vec<K>> {
        let mut keys = Vec::new();
        let mut next = zero;
        let mut at: Option<K> = None;
        loop {
            let from = at.as_ref().map_or(0, |k| k as *const K as u64);
            match bpf(NEXT_KEY, &mut self.element(from, &raw mut next as u64)) {
                Ok(_) => keys.push(next),
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
                Err(e) => return Err(e),
            }
            at = Some(next);
        }
    }
}

/// What a test run of a program gave.
#[derive(Debug)]
pub struct TestRun {
    /// Return value of the program.
    pub result: u32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// Average time of one run, ns.
    pub nanoseconds: u32,
}

/// Length of the kernel's `struct __sk_buff`, and where `gso_segs` and `gso_size` are in it.
const SK_BUFF: usize = 192;
const GSO_SEGS: usize = 164;
const GSO_SIZE: usize = 176;

/// Runs a program `repeat` times on `packet` (with its Ethernet header); each run sees what the last one left. `segment`: not 0
/// for a super-packet, of segments of so many bytes.
pub(crate) fn test_run(program: i32, packet: &[u8], repeat: u32, segment: u32) -> io::Result<TestRun> {
    let mut out = vec![0u8; packet.len() + 256];
    let mut context = [0u8; SK_BUFF];
    let segments = (packet.len() as u32).checked_div(segment).unwrap_or(0);
    context[GSO_SEGS..GSO_SEGS + 4].copy_from_slice(&segments.to_ne_bytes());
    context[GSO_SIZE..GSO_SIZE + 4].copy_from_slice(&segment.to_ne_bytes());
    let with = segment != 0;
    let mut attr = TestRunAttr {
        prog_fd: program as u32,
        data_size_in: packet.len() as u32,
        data_size_out: out.len() as u32,
        data_in: packet.as_ptr() as u64,
        data_out: out.as_mut_ptr() as u64,
        repeat,
        ctx_size_in: if with { SK_BUFF as u32 } else { 0 },
        ctx_in: if with { context.as_ptr() as u64 } else { 0 },
        ..TestRunAttr::default()
    };
    bpf(TEST_RUN, &mut attr)?;
    out.truncate(attr.data_size_out as usize);
    Ok(TestRun { result: attr.retval, packet: out, nanoseconds: attr.duration })
}

/// Makes a map that is pinned nowhere.
pub(crate) fn create_map(name: &'static str, attr: [u32; 6]) -> io::Result<RawMap> {
    let [map_type, key_size, value_size, max_entries, map_flags, inner_map_fd] = attr;
    let mut attr = CreateAttr { map_type, key_size, value_size, max_entries, map_flags, inner_map_fd };
    Ok(RawMap { fd: descriptor(CREATE, &mut attr)?, name })
}

/// Entries that a map was made for.
pub(crate) fn max_entries(fd: &OwnedFd) -> io::Result<u32> {
    let mut info = MapInfo::default();
    let mut attr =
        InfoAttr { fd: fd.as_raw_fd() as u32, length: size_of::<MapInfo>() as u32, info: &raw mut info as u64 };
    bpf(INFO, &mut attr)?;
    Ok(info.max_entries)
}

/// Pins a link to a network namespace. Of the kinds of program that can be linked to one, this kind leaves room for others; what it does
/// is to leave each packet the socket that it has anyway.
pub(crate) fn pin_namespace(namespace: &File, path: &Path) -> io::Result<()> {
    // r0 = SK_PASS; exit
    const CODE: [u64; 2] = [0x1_0000_00b7, 0x95];
    let mut load = LoadAttr {
        prog_type: SK_LOOKUP,
        insn_cnt: CODE.len() as u32,
        insns: CODE.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        expected_attach_type: SK_LOOKUP_ATTACH,
        ..LoadAttr::default()
    };
    load.prog_name[..9].copy_from_slice(b"namespace");
    let program = descriptor(LOAD, &mut load)?;
    let mut link = LinkAttr {
        prog_fd: program.as_raw_fd() as u32,
        target_fd: namespace.as_raw_fd() as u32,
        attach_type: SK_LOOKUP_ATTACH,
        flags: 0,
    };
    let link = descriptor(LINK_CREATE, &mut link)?;
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(OBJ_PIN, &mut ObjectAttr { path: path.as_ptr() as u64, fd: link.as_raw_fd() as u32, flags: 0 }).map(drop)
}

/// Number of the network namespace of such a link; 0: it is gone.
pub(crate) fn linked_namespace(path: &Path) -> io::Result<u32> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let link = descriptor(OBJ_GET, &mut ObjectAttr { path: path.as_ptr() as u64, ..ObjectAttr::default() })?;
    let mut info = LinkInfo::default();
    let length = size_of::<LinkInfo>() as u32;
    let mut attr = InfoAttr { fd: link.as_raw_fd() as u32, length, info: &raw mut info as u64 };
    bpf(INFO, &mut attr)?;
    if attr.length < length || (info.link_type, info.attach_type) != (NETNS_LINK, SK_LOOKUP_ATTACH) {
        return Err(io::Error::other("no link to a network namespace"));
    }
    Ok(info.netns_ino)
}

/// Numbers of the TCX programs that look at what comes in through an interface, in their order.
pub(crate) fn tcx_programs(index: u32) -> io::Result<Vec<u32>> {
    // The kernel takes 64 at most.
    let mut programs = vec![0u32; 64];
    let mut attr = QueryAttr {
        ifindex: index,
        attach_type: TCX_INGRESS,
        programs: programs.as_mut_ptr() as u64,
        count: programs.len() as u32,
        ..QueryAttr::default()
    };
    match bpf(QUERY, &mut attr) {
        Ok(_) => programs.truncate(attr.count as usize),
        // There never was one.
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => programs.clear(),
        Err(e) => return Err(e),
    }
    Ok(programs)
}

/// The clock that the program reads, ns.
pub fn monotonic() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a live timespec to fill.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A name as it lies in a map, cut off after 127 bytes.
pub(crate) fn text(name: &str) -> [u8; 128] {
    let mut bytes = [0; 128];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(127)) {
        *to = from;
    }
    bytes
}

/// The name again.
pub(crate) fn untext(bytes: &[u8; 128]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
