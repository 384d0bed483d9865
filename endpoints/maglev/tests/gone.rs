//! Directories of pods that are gone are removed, and no other: not that of a load balancer that lives, was killed, or has nothing
//! attached at the moment.
#![allow(clippy::unwrap_used)] // a test says what it expects by unwrapping it

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::net::{Net, ip};
use common::{BpfFs, dual_stack, flow, start};
use meridio_maglev::{Engine, Error, Options, Protocol, Settings, own_directory, remove_gone};

const PORT: u16 = 4000;

/// Settings of the load balancer of a namespace, and its directory.
fn settings(net: &Net, base: &Path) -> (Settings, PathBuf) {
    let base = base.to_owned();
    let directory = net.run("l", move || own_directory(&base).unwrap());
    let mut kernel = Options::new(&directory);
    kernel.chunks = 8;
    (Settings { kernel, offset_start: 5000 }, directory)
}

/// A load balancer that forwards, and its directory.
fn forwarding(net: &Net, base: &Path) -> (Engine, PathBuf) {
    let (settings, directory) = settings(net, base);
    let config = dual_stack(vec![flow("f", &[Protocol::Udp], &[PORT])]);
    (start(net, settings, config, net.targets(&[1])), directory)
}

fn remove(net: &Net, base: &Path) -> Vec<PathBuf> {
    let base = base.to_owned();
    net.run("l", move || remove_gone(&base).unwrap())
}

/// Looks until something is removed: the kernel takes a namespace apart in the background.
fn removed(net: &Net, base: &Path) -> Vec<PathBuf> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let removed = remove(net, base);
        if !removed.is_empty() {
            return removed;
        }
        assert!(Instant::now() < end, "nothing is removed: {:?}", std::fs::read_dir(base).unwrap().collect::<Vec<_>>());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn directories_of_namespaces_that_are_gone_are_removed_and_no_others() {
    let fs = BpfFs::new();
    let base = fs.path();
    let (here, lives, killed, gone) = (Net::new(1), Net::new(1), Net::new(1), Net::new(1));
    let (own, its_own) = forwarding(&here, &base);
    let (alive, alive_directory) = forwarding(&lives, &base);
    let (engine, killed_directory) = forwarding(&killed, &base);
    // As after a kill in the moment in which the interface is replaced: no process, and nothing attached.
    drop(engine);
    ip(&format!("-n {} link del ext", killed.name("l")));
    let (engine, gone_directory) = forwarding(&gone, &base);
    drop(engine);
    // Not made by a load balancer, or not known to be whose.
    let others = [base.join("something"), base.join("netns-1"), base.join("netns-2").join("v4")];
    others.iter().for_each(|path| std::fs::create_dir_all(path).unwrap());

    assert!(remove(&here, &base).is_empty(), "all of them are there");
    drop(gone);
    assert_eq!(removed(&here, &base), std::slice::from_ref(&gone_directory));
    assert!(!gone_directory.exists());
    assert!(remove(&here, &base).is_empty());
    for directory in others.iter().chain([&its_own, &alive_directory, &killed_directory]) {
        assert!(directory.exists(), "{}", directory.display());
    }
    // What was killed finds all that it had, and the others have lost nothing.
    let (settings, _) = settings(&killed, &base);
    let again = killed.run("l", move || Engine::open(settings).unwrap());
    assert!(again.adopted() && again.targets("s").is_some_and(|targets| targets.len() == 1));
    for (net, mut engine) in [(&here, own), (&lives, alive)] {
        let missing = net.run("l", move || engine.missing("ext").unwrap());
        assert_eq!(missing, [""; 0]);
    }
}

/// Directories of one namespace, of load balancers that have nothing attached: a detour would keep the namespace.
fn several(net: &Net, base: &Path, names: [&str; 3]) -> [(Engine, PathBuf); 3] {
    names.map(|name| {
        let directory = base.join(name);
        let mut kernel = Options::new(&directory);
        kernel.chunks = 4;
        let settings = Settings { kernel, offset_start: 5000 };
        (net.run("l", move || Engine::open(settings).unwrap()), directory)
    })
}

#[test]
fn a_process_that_still_holds_the_directory_of_a_gone_namespace_keeps_it() {
    let fs = BpfFs::new();
    let base = fs.path();
    let (here, gone) = (Net::new(1), Net::new(1));
    let [first, (held, directory), last] = several(&gone, &base, ["netns-a", "netns-b", "netns-c"]);
    drop((first.0, last.0));
    drop(gone);
    let mut without = Vec::new();
    while without.len() < 2 {
        without.extend(removed(&here, &base));
    }
    without.sort();
    assert_eq!(without, [first.1, last.1]);
    assert!(remove(&here, &base).is_empty() && directory.exists(), "of the same namespace, but held");
    drop(held);
    // Not at once: a command that another test has just started has this process's files until it runs.
    assert_eq!(removed(&here, &base), [directory]);
}

#[test]
fn a_directory_that_cannot_be_removed_does_not_keep_the_others() {
    let fs = BpfFs::new();
    let base = fs.path();
    let (here, gone) = (Net::new(1), Net::new(1));
    // Whichever way they are listed, one comes behind the one that stays.
    let [first, (engine, stays), last] = several(&gone, &base, ["netns-a", "netns-b", "netns-c"]);
    drop((first.0, engine, last.0));
    std::fs::create_dir_all(stays.join("v1").join("of-somebody-else")).unwrap();
    drop(gone);
    let look = || {
        let base = base.clone();
        here.run("l", move || remove_gone(&base))
    };
    let end = Instant::now() + Duration::from_secs(30);
    while first.1.exists() || last.1.exists() {
        let result = look();
        assert!(Instant::now() < end, "{result:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let error = look().unwrap_err().to_string();
    assert!(error.contains("of-somebody-else") && stays.join("namespace").exists(), "{error}");
}

#[test]
fn maps_of_an_earlier_namespace_of_the_same_name_are_not_adopted() {
    let fs = BpfFs::new();
    let before = Net::new(1);
    let config = || dual_stack(vec![flow("f", &[Protocol::Udp], &[PORT])]);
    drop(start(&before, fs.settings(), config(), before.targets(&[1])));
    let settings = fs.settings();
    let again = before.run("l", move || Engine::open(settings).unwrap());
    assert!(again.adopted(), "in its own namespace");
    drop((again, before));
    let after = Net::new(1);
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let settings = fs.settings();
        let engine = after.run("l", move || Engine::open(settings).unwrap());
        if !engine.adopted() {
            break;
        }
        // The kernel has not taken it apart yet.
        assert!(Instant::now() < end, "adopted");
        drop(engine);
        std::thread::sleep(Duration::from_millis(50));
    }
    let engine = start(&after, fs.settings(), config(), after.targets(&[1]));
    assert!(engine.configured());
}

#[test]
fn removal_takes_the_sign_of_the_namespace_too_and_an_ordinary_directory_is_refused() {
    let fs = BpfFs::new();
    let net = Net::new(1);
    let (engine, directory) = forwarding(&net, &fs.path());
    drop(engine);
    assert!(directory.join("namespace").exists());
    let owned = directory.clone();
    net.run("l", move || Engine::remove(&owned, &["ext"]).unwrap());
    std::fs::remove_dir(&directory).unwrap();
    let ordinary = tempfile::tempdir().unwrap();
    assert!(matches!(remove_gone(ordinary.path()), Err(Error::NotBpfFs { .. })));
    assert!(remove_gone(&ordinary.path().join("none")).unwrap().is_empty());
}

/// What a container of the load balancer has (deploy/README.md) is enough.
#[test]
fn no_more_capabilities_are_needed_than_to_forward() {
    let fs = BpfFs::new();
    let status = Command::new("setpriv")
        .args(["--bounding-set", "-all,+net_admin,+bpf,+perfmon,+net_raw", "--inh-caps", "-all"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "with_few_capabilities", "--ignored", "--nocapture"])
        .env("MERIDIO_TEST_DIR", fs.path())
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
#[ignore = "the process that another test starts"]
fn with_few_capabilities() {
    let Ok(directory) = std::env::var("MERIDIO_TEST_DIR") else { return };
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
    let bits = 1u64 << 12 | 1 << 13 | 1 << 38 | 1 << 39;
    assert_eq!(u64::from_str_radix(effective, 16).unwrap(), bits);
    let base = PathBuf::from(directory);
    let mut kernel = Options::new(own_directory(&base).unwrap());
    kernel.chunks = 8;
    drop(Engine::open(Settings { kernel: kernel.clone(), offset_start: 5000 }).unwrap());
    assert!(kernel.directory.join("namespace").exists());
    assert!(remove_gone(&base).unwrap().is_empty());
}
