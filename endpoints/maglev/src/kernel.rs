//! Loading: maps pinned on a BPF file system, programs attached by clsact. Both outlive the process that made them.
//!
//! Where the kernel has TCX (6.6), the program that decides is attached by it as well, for as long as the process lives: it runs
//! first and costs less on the way to it. What it has decided ends there; what it leaves to the stack passes the
//! second one, which leaves it to the stack too.
#![allow(unsafe_code)] // SAFETY: two uses below: statfs of a path, a limit of this process.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::programs::links::LinkOrder;
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use meridio_decision::layout::{
    CHUNK_ROWS, CLIENTS_REMEMBERED, DEFAULT_CHUNKS, DESTINATIONS_REMEMBERED, FLOW_COUNTERS, HOP_ENTRIES,
    LAYOUT_VERSION, MAX_TARGETS,
};

use crate::error::Error;
use crate::flat::Hits;
use crate::gone;
use crate::grace::Grace;
use crate::maps::Maps;
use crate::owner::Lock;
use crate::qdisc;
use crate::sys::{self, RawMap, max_entries};
use crate::tap;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/meridio.bpf.o"));

/// Priority and handle of the filters: fixed, so that a new process replaces what an old one attached.
const PRIORITY: u16 = 0x4d;
const HANDLE: TcHandle = TcHandle::new(0, 1);
const INGRESS: &str = "meridio_ingress";
const EGRESS: &str = "meridio_egress";

/// Where and how to load.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory on a BPF file system; maps are pinned in a directory of the layout's version below it.
    pub directory: PathBuf,
    /// Chunks of the row map (128 KiB each); only used when the maps are made.
    pub chunks: u32,
    /// Version of the maps' layout; tests set another one to play an older process.
    pub layout: u32,
    /// Object file of the programs; `None`: the one that this crate was built with.
    pub object: Option<PathBuf>,
    /// The program can be traced. Without the trace there is nothing to switch on; the bench measures what that saves.
    pub trace: bool,
}

impl Options {
    /// Default sizes.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Options {
            directory: directory.into(),
            chunks: DEFAULT_CHUNKS as u32,
            layout: LAYOUT_VERSION,
            object: None,
            trace: true,
        }
    }
}

/// The loaded programs and their maps.
#[derive(Debug)]
pub(crate) struct Kernel {
    ebpf: Ebpf,
    /// Attached by TCX, by interface.
    first: HashMap<String, SchedClassifierLink>,
    pub(crate) maps: Maps,
    pub(crate) hits: Hits,
    pub(crate) grace: Arc<Grace>,
    pub(crate) chunks: u32,
    pub(crate) cpus: usize,
    /// Nobody else changes these maps.
    _lock: Lock,
}

pub(crate) fn versioned(directory: &Path, layout: u32) -> PathBuf {
    directory.join(format!("v{layout}"))
}

pub(crate) fn check_bpffs(path: &Path) -> Result<(), Error> {
    const BPF_FS_MAGIC: libc::c_long = 0xcafe_4a11;
    let io = |source| Error::Io { path: path.to_owned(), source };
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|e| io(e.into()))?;
    // SAFETY: a zeroed statfs is a valid buffer for the call to fill, and the path is NUL-terminated.
    let (result, stat) = unsafe {
        let mut stat: libc::statfs = std::mem::zeroed();
        (libc::statfs(c_path.as_ptr(), &raw mut stat), stat)
    };
    if result != 0 {
        return Err(io(std::io::Error::last_os_error()));
    }
    if stat.f_type & 0xffff_ffff != BPF_FS_MAGIC {
        return Err(Error::NotBpfFs { path: path.to_owned() });
    }
    Ok(())
}

/// CPUs that per-CPU values are kept for.
pub(crate) fn cpus() -> Result<usize, Error> {
    aya::util::nr_cpus().map_err(|(what, e)| Error::Load(format!("{what}: {e}")))
}

/// Numbers that CPUs may have: on some machines one in between is missing.
fn cpu_numbers() -> Result<u32, Error> {
    const POSSIBLE: &str = "/sys/devices/system/cpu/possible";
    let fault = |what: String| Error::Load(format!("{POSSIBLE}: {what}"));
    let text = std::fs::read_to_string(POSSIBLE).map_err(|e| fault(e.to_string()))?;
    highest(&text).map(|highest| highest.saturating_add(1)).ok_or_else(|| fault(format!("{text:?}")))
}

/// The highest number of a list of ranges such as `0-2,4`.
fn highest(list: &str) -> Option<u32> {
    let numbers: Option<Vec<u32>> = list.trim().split([',', '-']).map(|number| number.parse().ok()).collect();
    numbers?.into_iter().max()
}

/// Before 5.11 maps count against the limit of locked memory, which is far below their size by default. Where the limit
/// may not be raised the loading itself says what is wrong.
fn raise_memlock() {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the call reads one live rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) } != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "limit of locked memory stays");
    }
}

/// Whether this kernel is of a version or later.
fn since(major: u8, minor: u8) -> bool {
    match aya::util::KernelVersion::current() {
        Ok(version) => version >= aya::util::KernelVersion::new(major, minor, 0),
        Err(_) => false,
    }
}

impl Kernel {
    /// Loads the programs, with the maps pinned in the directory if they are there, else with new ones.
    pub(crate) fn load(options: &Options) -> Result<Self, Error> {
        let directory = versioned(&options.directory, options.layout);
        let lock = Lock::take(&options.directory, &directory)?;
        raise_memlock();
        if let Err(error) = gone::mark(&options.directory) {
            tracing::warn!(%error, "once this pod is gone its directory of maps stays");
        }
        std::fs::create_dir_all(&directory).map_err(|source| Error::Io { path: directory.clone(), source })?;
        let check_mtu = since(5, 12) as u32;
        // Until 6.2.1 the kernel also tells link addresses of neighbours that have failed.
        let direct = since(6, 3) as u32;
        let cpus = cpus()?;
        let numbers = cpu_numbers()?;
        let each = |entries: u32| numbers.saturating_mul(entries).max(1);
        let trace = options.trace as u32;
        let mut loader = EbpfLoader::new();
        let loader = loader
            .default_map_pin_directory(&directory)
            .override_global("HAS_CHECK_MTU", &check_mtu, true)
            .override_global("HAS_DIRECT", &direct, true)
            .override_global("HAS_TRACE", &trace, true)
            .map_max_entries("HOPS", each(direct * HOP_ENTRIES))
            .map_max_entries("DESTINATIONS", each(DESTINATIONS_REMEMBERED))
            .map_max_entries("CLIENTS", each(CLIENTS_REMEMBERED))
            .map_max_entries("FLOW_HITS", each(FLOW_COUNTERS))
            .map_max_entries("TARGET_HITS", each(MAX_TARGETS as u32))
            .map_max_entries("ROWS", options.chunks);
        let mut ebpf = match &options.object {
            Some(path) => loader.load_file(path),
            None => loader.load(OBJECT),
        }
        .map_err(|e| refused(chain(&e)))?;
        for name in [INGRESS, EGRESS] {
            program(&mut ebpf, name)?.load().map_err(|e| refused(format!("{name}: {}", chain(&e))))?;
        }
        let maps = Maps::open(|name| raw(&ebpf, name))?;
        let kernel = Kernel {
            // Adopted maps may be of another size than the one asked for.
            chunks: max_entries(&maps.rows.fd).map_err(|e| Error::Map { name: "ROWS", reason: e.to_string() })?,
            hits: Hits::open(&maps, true)?,
            maps,
            grace: Arc::new(Grace::new()?),
            cpus,
            first: HashMap::new(),
            ebpf,
            _lock: lock,
        };
        const _: () = assert!(CHUNK_ROWS * 2 < 4 << 20, "a chunk must fit a map value");
        Ok(kernel)
    }

    /// Attaches both programs to an interface of this network namespace, or replaces the ones attached before.
    pub(crate) fn attach(&mut self, interface: &str) -> Result<(), Error> {
        let fault = |reason: String| Error::Attach { interface: interface.to_owned(), reason };
        let link = tap::link_type(interface).map_err(|e| fault(e.to_string()))?;
        if ![libc::ARPHRD_ETHER, libc::ARPHRD_LOOPBACK].contains(&link) {
            return Err(fault(format!(
                "its packets have no Ethernet header (link type {link}), which the program reads"
            )));
        }
        self.attach_some(interface, &[(INGRESS, TcAttachType::Ingress), (EGRESS, TcAttachType::Egress)])?;
        self.attach_first(interface);
        Ok(())
    }

    /// Attaches the program that decides in front of its copy, if the kernel can.
    fn attach_first(&mut self, interface: &str) {
        if !since(6, 6) {
            return;
        }
        // The one of before may belong to an interface of this name that is gone.
        self.first.remove(interface);
        let attached = program(&mut self.ebpf, INGRESS).map_err(|e| e.to_string()).and_then(|program| {
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            let id = program.attach_with_options(interface, TcAttachType::Ingress, options);
            id.and_then(|id| program.take_link(id)).map_err(|e| chain(&e))
        });
        match attached {
            Ok(link) => _ = self.first.insert(interface.to_owned(), link),
            Err(error) => tracing::info!(interface, error, "no TCX, which is a little slower"),
        }
    }

    /// Attaches the program that decides only.
    pub(crate) fn attach_ingress(&mut self, interface: &str) -> Result<(), Error> {
        self.attach_some(interface, &[(INGRESS, TcAttachType::Ingress)])
    }

    fn attach_some(&mut self, interface: &str, programs: &[(&str, TcAttachType)]) -> Result<(), Error> {
        let fault = |reason: String| Error::Attach { interface: interface.to_owned(), reason };
        match tc::qdisc_add_clsact(interface) {
            Ok(()) | Err(tc::TcError::AlreadyAttached) => {}
            Err(error) if chain(&error).contains("File exists") => {}
            Err(error) => return Err(fault(unknown(chain(&error)))),
        }
        for (name, direction) in programs {
            let program = program(&mut self.ebpf, name)?;
            replace(program, interface, *direction).map_err(|e| fault(unknown(chain(&e))))?;
        }
        Ok(())
    }

    /// What is no longer attached to an interface, in words. One that is gone misses nothing.
    pub(crate) fn missing(&mut self, interface: &str) -> Result<Vec<&'static str>, Error> {
        let fault = |e: std::io::Error| Error::Attach { interface: interface.to_owned(), reason: e.to_string() };
        let Some(index) = qdisc::index(interface) else { return Ok(Vec::new()) };
        let mut missing = Vec::new();
        for (name, parent, what) in [
            (INGRESS, qdisc::INGRESS, "the filter of packets that come in"),
            (EGRESS, qdisc::EGRESS, "the filter of packets that go out"),
        ] {
            let id = self.program_id(name)?;
            if qdisc::program(index, parent, PRIORITY, HANDLE.into()).map_err(fault)? != Some(id) {
                missing.push(what);
            }
        }
        let id = self.program_id(INGRESS)?;
        if self.first.contains_key(interface) && !sys::tcx_programs(index).map_err(fault)?.contains(&id) {
            missing.push("the TCX program");
        }
        Ok(missing)
    }

    /// Whether a filter is where this load balancer has its own, whoever attached it.
    pub(crate) fn attached(interface: &str) -> Result<bool, Error> {
        let fault = |e: std::io::Error| Error::Attach { interface: interface.to_owned(), reason: e.to_string() };
        let Some(index) = qdisc::index(interface) else { return Ok(false) };
        Ok(qdisc::program(index, qdisc::INGRESS, PRIORITY, HANDLE.into()).map_err(fault)?.is_some())
    }

    fn program_id(&mut self, name: &str) -> Result<u32, Error> {
        Ok(program(&mut self.ebpf, name)?.info().map_err(|e| Error::Load(chain(&e)))?.id())
    }

    /// Takes the programs off an interface. One that is not there has none.
    pub(crate) fn detach(interface: &str) -> Result<(), Error> {
        if qdisc::index(interface).is_none() {
            return Ok(());
        }
        let fault = |e: &dyn std::error::Error| Error::Attach { interface: interface.to_owned(), reason: chain(e) };
        for (name, direction) in [(INGRESS, TcAttachType::Ingress), (EGRESS, TcAttachType::Egress)] {
            match tc::qdisc_detach_program(interface, direction, name) {
                Ok(()) => {}
                Err(tc::TcError::IoError(e)) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(fault(&error)),
            }
        }
        Ok(())
    }

    /// File descriptor of a program, for test runs.
    pub(crate) fn program_fd(&mut self, ingress: bool) -> Result<i32, Error> {
        let program = program(&mut self.ebpf, if ingress { INGRESS } else { EGRESS })?;
        Ok(program.fd().map_err(|e| Error::Load(chain(&e)))?.as_fd().as_raw_fd())
    }

    /// Translated instructions and verified instructions of the ingress program.
    pub(crate) fn program_size(&mut self) -> Result<(u32, u32), Error> {
        let info = program(&mut self.ebpf, INGRESS)?.info().map_err(|e| Error::Load(chain(&e)))?;
        Ok((info.size_translated().unwrap_or(0) / 8, info.verified_instruction_count().unwrap_or(0)))
    }
}

/// Removes everything pinned by any version of this layout below `directory`.
///
/// `keep`: the directory of the layout in use.
pub(crate) fn remove_pins(directory: &Path, keep: Option<&Options>) -> Result<(), Error> {
    let io = |path: &Path, source| Error::Io { path: path.to_owned(), source };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io(directory, e)),
    };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let ours = name.to_str().and_then(|n| n.strip_prefix('v')).is_some_and(|n| n.parse::<u32>().is_ok());
        if !ours || keep.is_some_and(|options| entry.path() == versioned(&options.directory, options.layout)) {
            continue;
        }
        for pin in std::fs::read_dir(entry.path()).map_err(|e| io(&entry.path(), e))?.flatten() {
            std::fs::remove_file(pin.path()).map_err(|e| io(&pin.path(), e))?;
        }
        std::fs::remove_dir(entry.path()).map_err(|e| io(&entry.path(), e))?;
    }
    Ok(())
}

fn replace(program: &mut SchedClassifier, interface: &str, direction: TcAttachType) -> Result<(), ProgramError> {
    let id = match SchedClassifierLink::attached(interface, direction, PRIORITY, HANDLE, None)
        .map_err(ProgramError::from)
        .and_then(|link| program.attach_to_link(link))
    {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, ..NlOptions::default() };
            program.attach_with_options(interface, direction, TcAttachOptions::Netlink(options))?
        }
    };
    // Dropping the link would detach the program; it has to survive this process.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, Error> {
    let program = ebpf.program_mut(name).ok_or_else(|| Error::Load(format!("no program {name}")))?;
    program.try_into().map_err(|e: ProgramError| Error::Load(chain(&e)))
}

fn raw(ebpf: &Ebpf, name: &'static str) -> Result<RawMap, Error> {
    use aya::maps::Map;
    let fault = |reason: String| Error::Map { name, reason };
    let map = ebpf.map(name).ok_or_else(|| fault("not in the object".into()))?;
    let data = match map {
        Map::Array(data) | Map::LpmTrie(data) | Map::HashMap(data) | Map::LruHashMap(data) | Map::PerCpuArray(data) => {
            data
        }
        _ => return Err(fault("of another type".into())),
    };
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(|e| fault(e.to_string()))?;
    Ok(RawMap { fd, name })
}

/// What the kernel said to the program, and that it is too old if it is.
fn refused(said: String) -> Error {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Error::Load(match too_old(release.trim()) {
        true => format!("Linux {} is too old, 5.10 or later is needed: {said}", release.trim()),
        false => said,
    })
}

/// Before 5.10 a program cannot send a packet to a neighbour.
fn too_old(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map_while(|n| n.parse::<u32>().ok());
    (numbers.next(), numbers.next()) < (Some(5), Some(10))
}

/// What the kernel said to the attachment, and what it is built without if it does not know what is meant.
fn unknown(said: String) -> String {
    let unknown = ["(os error 2)", "(os error 95)"].iter().any(|code| said.contains(code));
    let needs = "; the kernel needs CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF";
    if unknown { said + needs } else { said }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    // A verifier's log has a megabyte, of which the end says why.
    const ROOM: usize = 1500;
    if text.len() > 2 * ROOM {
        let head: String = text.chars().take(200).collect();
        let tail: Vec<char> = text.chars().rev().take(ROOM).collect();
        text = format!("{head} ... {}", tail.into_iter().rev().collect::<String>());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_may_be_numbered_with_gaps() {
        for (list, found) in [("0\n", Some(0)), ("0-1\n", Some(1)), ("0-2,4\n", Some(4)), ("", None), ("0-x", None)] {
            assert_eq!(highest(list), found, "{list:?}");
        }
        assert!(cpu_numbers().unwrap() as usize >= cpus().unwrap());
    }

    #[test]
    fn kernels_that_are_too_old_are_told() {
        for (release, old) in [("5.10.0-9-amd64", false), ("5.4.0", true), ("4.18.0-553.el8", true), ("6.1", false)] {
            assert_eq!(too_old(release), old, "{release}");
        }
        assert!(unknown("No such file or directory (os error 2)".into()).ends_with("CONFIG_NET_CLS_BPF"));
        assert_eq!(unknown("Operation not permitted (os error 1)".into()), "Operation not permitted (os error 1)");
    }
}
