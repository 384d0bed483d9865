//! Builds the eBPF program with the workspace's own compiler: `core` is built for the target from rust-src, and
//! bpf-linker links with the LLVM inside that compiler.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const HOW: &str = "run:\n  rustup component add rust-src\n  cargo install bpf-linker --version 0.10.4 --no-default-features \
                   --features rust-llvm-22\n(or `make setup` in the root of the repository)";

fn main() {
    let here = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    for path in ["ebpf/src", "ebpf/Cargo.toml", "ebpf/Cargo.lock", "decision/src", "decision/Cargo.toml", "build.rs"] {
        println!("cargo::rerun-if-changed={}", here.join(path).display());
    }
    println!("cargo::rerun-if-env-changed=PATH");

    let path = match path_with_linker() {
        Some(path) => path,
        None => fail("bpf-linker was found neither on PATH nor in cargo's bin directory"),
    };
    let target = out.join("ebpf");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command
        .current_dir(here.join("ebpf"))
        .args(["build", "--release", "--locked", "-Z", "build-std=core", "--target", "bpfel-unknown-none"])
        .arg("--target-dir")
        .arg(&target);
    // What cargo and the user set for the host's build means something else there.
    for (name, _) in env::vars_os() {
        let name_text = name.to_string_lossy();
        let keep = ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_HTTP_", "CARGO_REGISTRIES_", "CARGO_SOURCE_"];
        if (name_text.starts_with("CARGO") && !keep.iter().any(|k| name_text.starts_with(k)))
            || name_text.starts_with("RUSTFLAGS")
            || name_text == "RUSTC_WRAPPER"
            || name_text == "RUSTC_WORKSPACE_WRAPPER"
            || name_text == "RUSTDOC"
            || name_text == "RUSTC"
            || name_text == "TARGET"
            || name_text == "PROFILE"
        {
            command.env_remove(&name);
        }
    }
    if let Some(rustc) = env::var_os("RUSTC") {
        command.env("RUSTC", rustc);
    }
    // Unstable flags on a stable compiler: build-std and the assembly of the eBPF target.
    command.env("RUSTC_BOOTSTRAP", "1").env("PATH", path);
    // Version 3 of the instruction set (Linux 5.1) has what versions before put together of several: half words, and comparisons
    // with less. And else the linker turns each memset and memmove of a few bytes into a call of a loop over bytes.
    let flags = "-C target-cpu=v3 -C link-arg=--disable-expand-memcpy-in-order";
    command.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS", flags);
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("building the eBPF program failed ({status}), see above")),
        Err(error) => fail(&format!("starting cargo for the eBPF program failed: {error}")),
    }
    for program in ["meridio", "bench"] {
        let object = target.join("bpfel-unknown-none/release").join(program);
        if let Err(error) = std::fs::copy(&object, out.join(program).with_extension("bpf.o")) {
            fail(&format!("{}: {error}", object.display()));
        }
    }
}

/// PATH with the directory that holds bpf-linker.
fn path_with_linker() -> Option<std::ffi::OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let has = |dir: &Path| dir.join("bpf-linker").is_file();
    if env::split_paths(&path).any(|dir| has(&dir)) {
        return Some(path);
    }
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))?;
    let bin = cargo_home.join("bin");
    if !has(&bin) {
        return None;
    }
    env::join_paths(std::iter::once(bin).chain(env::split_paths(&path))).ok()
}

fn fail(what: &str) -> ! {
    println!("cargo::error={what}; {}", HOW.replace('\n', " "));
    eprintln!("{what}\n{HOW}");
    exit(1);
}
