//! What the machine must offer, checked before anything is made: one line per fault, each with what to do.

use std::path::{Path, PathBuf};

/// Oldest kernel whose TC programs may do all that the load balancer's does.
const KERNEL: (u32, u32) = (5, 15);

/// Directories that are searched beside those of `PATH`: root's shell may lack them.
const SYSTEM: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds a program in `path` (colon separated) or the system's directories.
pub fn find(program: &str, path: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Path::new(program).is_file().then(|| PathBuf::from(program));
    }
    let directories = path.split(':').chain(SYSTEM.split(':')).filter(|directory| !directory.is_empty());
    directories.map(|directory| Path::new(directory).join(program)).find(|candidate| candidate.is_file())
}

/// Every fault, one line each; empty if the demo can run.
pub fn faults(bird: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if !nix::unistd::geteuid().is_root() {
        // The rest would fail for this reason alone.
        return vec![
            "not root: the demo makes network namespaces and loads eBPF programs; run it with sudo".to_owned(),
        ];
    }
    let release =
        nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default();
    faults.extend(kernel_fault(&release));
    let path = std::env::var("PATH").unwrap_or_default();
    match find(bird, &path) {
        None => {
            faults.push(format!("BIRD: there is no program {bird}; install BIRD 2 (Debian: apt-get install bird2)"))
        }
        Some(program) => faults.extend(bird_fault(&program)),
    }
    if find("ip", &path).is_none() {
        faults.push("iproute2: there is no program ip; install it (Debian: apt-get install iproute2)".to_owned());
    }
    faults.extend(bpf_fault());
    faults
}

fn kernel_fault(release: &str) -> Option<String> {
    let mut numbers =
        release.split(|character: char| !character.is_ascii_digit()).map(|number| number.parse::<u32>().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (found < KERNEL).then(|| format!("kernel {release}: {}.{} or newer is needed", KERNEL.0, KERNEL.1))
}

fn bird_fault(program: &Path) -> Option<String> {
    let output = std::process::Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().last()?.to_owned();
    version
        .starts_with('1')
        .then(|| format!("BIRD {version} at {}: BIRD 2 is needed (Debian: apt-get install bird2)", program.display()))
}

/// Makes and drops a tiny map.
#[allow(unsafe_code)]
fn bpf_fault() -> Option<String> {
    use std::os::fd::{FromRawFd as _, OwnedFd};
    // bpf(2): BPF_MAP_CREATE of an array of one entry; fields map_type, key_size, value_size, max_entries, map_flags.
    let attributes: [u32; 5] = [2, 4, 4, 1, 0];
    // SAFETY: the attributes outlive the call and their size is given; the kernel only reads them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, 0, attributes.as_ptr(), std::mem::size_of_val(&attributes)) };
    match i32::try_from(result) {
        Ok(descriptor) if descriptor >= 0 => {
            // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
            drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
            None
        }
        _ => {
            let error = std::io::Error::last_os_error();
            Some(format!(
                "eBPF: bpf(2) says {error}; CAP_BPF and CAP_NET_ADMIN are needed, and no seccomp or lockdown in the way"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_kernels_are_named() {
        assert_eq!(kernel_fault("6.1.0-18-amd64"), None);
        assert_eq!(kernel_fault("5.15.0"), None);
        assert_eq!(kernel_fault("5.10.0-28-amd64").unwrap(), "kernel 5.10.0-28-amd64: 5.15 or newer is needed");
        assert!(kernel_fault("").is_some());
    }

    #[test]
    fn programs_are_found_in_the_path_only_if_they_are_there() {
        assert!(find("sh", "").is_some());
        assert_eq!(find("no-such-program", "/usr/bin"), None);
        assert_eq!(find("/no/such/bird", ""), None);
    }
}
