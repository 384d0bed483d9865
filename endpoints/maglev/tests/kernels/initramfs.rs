//! The guest's root: a cpio archive ("newc", see cpio(5)) of this very test, `ip`, their libraries and three modules.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

/// Directories first, as the kernel unpacks in order.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    count: u32,
}

impl Archive {
    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.count += 1;
        let name = path.trim_start_matches('/');
        let fields = [self.count, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Libraries that a program asks for, and the loader, by the path at which it expects them.
fn libraries(program: &Path) -> Vec<String> {
    let out = Command::new("ldd").arg(program).output().unwrap();
    assert!(out.status.success(), "ldd {}: {}", program.display(), String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).unwrap();
    text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect()
}

fn find(program: &str) -> std::path::PathBuf {
    let places = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];
    let found = places.iter().map(|place| Path::new(place).join(program)).find(|path| path.is_file());
    found.unwrap_or_else(|| panic!("{program} is missing, tools/setup installs it"))
}

/// The archive for the kernel in a directory.
pub(crate) fn build(kernel: &Path) -> Vec<u8> {
    let own = std::env::current_exe().unwrap();
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for (path, program) in [("/init", own), ("/sbin/ip", find("ip"))] {
        for library in libraries(&program) {
            let content = std::fs::read(&library).unwrap();
            files.insert(library, content);
        }
        files.insert(path.to_owned(), std::fs::read(program).unwrap());
    }
    for module in super::guest::ALL_MODULES {
        let file = format!("{module}.ko");
        let content = std::fs::read(kernel.join(&file)).unwrap();
        files.insert(format!("/modules/{file}"), content);
    }
    let mut directories: Vec<String> = ["/dev", "/proc", "/sys", "/tmp", "/run"].map(str::to_owned).to_vec();
    for path in files.keys() {
        for parent in Path::new(path).ancestors().skip(1).filter(|p| p.parent().is_some()) {
            directories.push(parent.display().to_string());
        }
    }
    directories.sort_unstable();
    directories.dedup();
    let mut archive = Archive::default();
    for directory in &directories {
        archive.entry(directory, 0o040_755, &[]);
    }
    for (path, content) in &files {
        archive.entry(path, 0o100_755, content);
    }
    archive.entry("TRAILER!!!", 0, &[]);
    archive.bytes
}
