//! The program on kernels other than this machine's: Debian's cloud kernels 5.10 and 6.1 in an emulator.
//!
//! `tools/kernels` fetches them. The guest's only process is this test itself, as init: it loads and attaches the
//! programs, lets them decide about packets, and sends datagrams through them.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;
#[path = "kernels/guest.rs"]
mod guest;
#[path = "kernels/initramfs.rs"]
mod initramfs;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// What a guest prints last; the line goes on with figures.
const DONE: &str = "guest: done:";
/// Software emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// The kernel's files. Where something is missing that is said, unless this test has to run: `MERIDIO_KERNELS=required`.
fn kernel(version: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/kernels").join(version);
    let missing = if !root.join("vmlinuz").is_file() {
        format!("target/kernels/{version}/vmlinuz is missing, tools/kernels fetches it")
    } else if Command::new("qemu-system-x86_64").arg("--version").stdout(Stdio::null()).status().is_err() {
        "qemu-system-x86_64 is missing, tools/kernels installs it".to_owned()
    } else {
        return Some(root);
    };
    skip(version, &missing, std::env::var("MERIDIO_KERNELS").is_ok_and(|wanted| wanted == "required"));
    None
}

fn skip(version: &str, missing: &str, required: bool) {
    assert!(!required, "kernel {version}: {missing}");
    // Not by `eprintln`, of which nothing is shown when a test succeeds.
    let _ = writeln!(std::io::stderr(), "SKIPPED: the test on kernel {version}: {missing}");
}

#[test]
#[should_panic(expected = "kernel 4.4: no such file")]
fn what_is_required_is_not_skipped() {
    skip("4.4", "no such file", true);
}

fn boots_and_forwards(version: &str) {
    let Some(kernel) = kernel(version) else { return };
    let started = Instant::now();
    let image = tempfile::Builder::new().prefix("mdt-initramfs-").tempfile().unwrap();
    std::fs::write(image.path(), initramfs::build(&kernel)).unwrap();
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "768"])
        .args(["-display", "none", "-monitor", "none", "-serial", "stdio", "-nic", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(kernel.join("vmlinuz"))
        .arg("-initrd")
        .arg(image.path())
        .args(["-append", "console=ttyS0 quiet panic=-1 -- --exact guest::init --ignored --nocapture"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = qemu.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = output.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    let ended = loop {
        if qemu.try_wait().unwrap().is_some() {
            break true;
        }
        if started.elapsed() > PATIENCE {
            qemu.kill().unwrap();
            qemu.wait().unwrap();
            break false;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let console = reader.join().unwrap();
    let done = console.lines().find_map(|line| line.split(DONE).nth(1));
    let Some(done) = done.filter(|_| ended) else {
        panic!("kernel {version} did not get through (powered off: {ended}):\n{console}");
    };
    println!("kernel {version}:{done}; all in {:.1} s", started.elapsed().as_secs_f64());
    assert!(done.contains(&format!(" {version}.")), "another kernel than asked for: {done}");
}

#[test]
fn debian_11_kernel_without_check_mtu() {
    boots_and_forwards("5.10");
}

#[test]
fn debian_12_kernel() {
    boots_and_forwards("6.1");
}
