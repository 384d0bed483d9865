//! What the tests of the engine share: a BPF file system of their own, generated configurations and packets.
#![allow(dead_code)]
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

pub(crate) mod build;
pub(crate) mod flood;
pub(crate) mod generate;
pub(crate) mod net;
pub(crate) mod shrink;

use std::path::PathBuf;
use std::process::Command;

use meridio_maglev::{Options, Settings};

#[allow(unused_imports)] // each test uses some
pub(crate) use generate::{Rng, config, frame, packet, target};

/// A BPF file system mounted below a temporary directory, unmounted at the end.
pub(crate) struct BpfFs {
    dir: tempfile::TempDir,
}

impl BpfFs {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("mdt-bpf-").tempdir().unwrap();
        let status = Command::new("mount").args(["-t", "bpf", "bpf"]).arg(dir.path()).status().unwrap();
        assert!(status.success(), "mounting bpffs needs root");
        BpfFs { dir }
    }

    pub(crate) fn settings(&self) -> Settings {
        let mut kernel = Options::new(self.dir.path().join("lb"));
        kernel.chunks = 64;
        Settings { kernel, offset_start: 5000 }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("lb")
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.dir.path()).status();
    }
}
