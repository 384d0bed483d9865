//! Two trenches with the same VIPs and the same gateway addresses, on the same nodes.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use meridio_demo::cleanup::prefix;
use meridio_demo::cluster::Cluster;
use meridio_demo::namespace::{BINARY_DIR, Filesystem, Namespace};
use meridio_demo::topology::{NODES, Trench, node_bpffs};
use meridio_demo::traffic::continuous::{Continuous, Mark};
use meridio_demo::traffic::{tcp, udp};
use meridio_tests::scene::{check_clean, scene, turn};

#[test]
fn two_trenches_in_parallel_do_not_see_each_other() {
    let _turn = turn();
    let stage = scene("two", vec![Trench::fixture('a', 0), Trench::fixture('b', 1)]).unwrap();
    let runs = std::thread::scope(|scope| {
        let tasks: Vec<_> = stage
            .observers
            .iter()
            .map(|observer| {
                scope.spawn(move || {
                    let mut runs = Vec::new();
                    for vip in observer.vips() {
                        runs.push(observer.generator.run(tcp::connections(vip, 400, 16, 4)).unwrap());
                        runs.push(observer.generator.run(udp::packets(vip, 200, 3, 16, 4)).unwrap());
                    }
                    (observer.targets_of_trench(), runs)
                })
            })
            .collect();
        tasks.into_iter().map(|task| task.join().unwrap()).collect::<Vec<_>>()
    });
    for (targets, runs) in runs {
        for run in runs {
            println!("{} {}: {} failed, {:?}", run.protocol, run.vip, run.failed, run.per_target);
            assert_eq!(run.failed, 0, "{:?}", run.failures);
            assert_eq!(run.per_target.keys().cloned().collect::<BTreeSet<_>>(), targets);
        }
    }
    check_clean(&stage).unwrap();
}

/// Nothing was lost and no connection broke since `from`.
fn lossless(what: &str, traffic: &Continuous, from: Mark) {
    let window = traffic.since(from);
    let (lost, broken) = (window.losses.len(), window.breaks.len());
    println!("{what}: {} packets sent, {lost} lost; {} exchanges, {broken} broken", window.sent, window.exchanges);
    assert!(window.losses.is_empty(), "{what}: {:?} of {lost}", window.losses.first());
    assert!(window.breaks.is_empty(), "{what}: {:?} of {broken}", window.breaks.first());
    assert!(window.sent > 1_000 && window.exchanges > 1_000, "{what}: {window:?}");
}

/// The directories of load balancers on a node's BPF file system.
fn directories(base: &Path) -> BTreeSet<String> {
    let names = std::fs::read_dir(base).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.collect()
}

/// A load balancer that is killed and its namespace deleted before NSM has heard of it; the name of the directory that it has left.
fn stray(cluster: &Cluster) -> String {
    let bpffs = cluster.directory().join(node_bpffs(NODES[0]));
    let before = directories(&bpffs.join("meridio"));
    let filesystem = Filesystem {
        hostname: "stray".to_owned(),
        hosts: cluster.directory().join("hosts"),
        binary: cluster.blueprint().binary.clone(),
        binds: vec![(bpffs.clone(), PathBuf::from("/sys/fs/bpf"))],
        directories: vec![PathBuf::from("/var/lib/meridio")],
    };
    let namespace = Namespace::create(&format!("{}stray", prefix("share")), Some(filesystem)).unwrap();
    let start = || {
        let mut command = Command::new(format!("{BINARY_DIR}/meridio"));
        command.arg("stateless-lb").stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut process = namespace.run(start).unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    let made = loop {
        let now = directories(&bpffs.join("meridio"));
        let new = now.difference(&before).find(|name| bpffs.join("meridio").join(name).join("namespace").exists());
        if let Some(name) = new {
            break name.clone();
        }
        assert!(Instant::now() < end, "no directory of its own: {now:?}");
        std::thread::sleep(Duration::from_millis(20));
    };
    process.kill().unwrap();
    process.wait().unwrap();
    drop(namespace);
    assert!(directories(&bpffs.join("meridio")).contains(&made), "stays behind");
    made
}

#[test]
fn load_balancers_share_the_bpffs_of_their_node_and_none_disturbs_another() {
    let _turn = turn();
    let stage = scene("share", vec![Trench::fixture('a', 0), Trench::fixture('b', 1)]).unwrap();
    let cluster = &stage.cluster;
    let [first, second] = &stage.observers[..] else { panic!("two trenches") };
    let base = cluster.directory().join(node_bpffs(NODES[0])).join("meridio");
    let both = directories(&base);
    assert_eq!(both.len(), 2, "lb-1 and b-lb-1: {both:?}");
    let whole = |what: &str| {
        let say = &mut |line: &str| println!("{what}: {line}");
        first.wait_whole(&first.targets_of_trench(), Duration::from_secs(30), say).unwrap();
    };
    let traffic = second.traffic().unwrap();
    let begin = traffic.mark();

    let pod = cluster.pod("lb-1").unwrap();
    let process = pod.process("stateless-lb").unwrap();
    let own = first.traffic().unwrap();
    let restart = own.mark();
    process.restart(&pod.namespace).unwrap();
    // Also while the new one finds what is there.
    std::thread::sleep(Duration::from_secs(3));
    whole("killed and started again");
    assert_eq!(directories(&base), both);
    lossless("its own trench", &own, restart);
    drop(own);

    assert!(process.terminate(Duration::from_secs(5)));
    assert_eq!(directories(&base), both, "what is stopped forwards on");
    pod.namespace.output(&format!("{BINARY_DIR}/meridio"), &["stateless-lb", "--remove"]).unwrap();
    let other = directories(&base);
    assert!(other.len() == 1 && other.is_subset(&both), "{other:?} of {both:?}");
    process.start(&pod.namespace).unwrap();
    whole("stopped, removed and started again");
    assert_eq!(directories(&base), both, "the same namespace has the same directory");

    drop((pod, process));
    let stray = stray(cluster);
    cluster.delete_pod("lb-1").unwrap();
    cluster.recreate_pod("lb-1").unwrap();
    whole("deleted with its namespace and made anew");
    let end = Instant::now() + Duration::from_secs(30);
    while directories(&base).contains(&stray) {
        assert!(Instant::now() < end, "{:?} has still what {stray} left", directories(&base));
        // It looks when it starts; the kernel may have needed longer to take the namespace apart.
        let pod = cluster.pod("lb-1").unwrap();
        pod.process("stateless-lb").unwrap().restart(&pod.namespace).unwrap();
        std::thread::sleep(Duration::from_secs(3));
    }
    whole("after that");
    // That of the pod that was deleted may still be there: the node's NSM holds its namespace for a while.
    let now = directories(&base);
    assert!(now.is_superset(&other) && now.difference(&both).count() == 1, "{now:?}");

    std::thread::sleep(Duration::from_secs(1));
    lossless("the other trench", &traffic, begin);
    check_clean(&stage).unwrap();
}
