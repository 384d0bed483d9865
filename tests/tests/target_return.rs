//! Targets that leave and come back.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use meridio_demo::cluster::Pod;
use meridio_demo::topology::{Kind, Trench};
use meridio_tests::scene::{addresses, check_clean, scene, turn};
use nsm_kernel::{Netns, ping};

const PATIENCE: Duration = Duration::from_secs(30);
/// The interface of the conduit's connection in a target.
const INTERFACE: &str = "nsm-0";

/// How long it takes until `proxy` answers `target` for each family.
fn heard(target: &Pod, proxy: &Pod) -> Vec<Duration> {
    let netns = Netns::named(target.namespace.name()).unwrap();
    let (own, gateways) = (addresses(target, INTERFACE).unwrap(), addresses(proxy, "bridge0").unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let wait = |&(gateway, length): &(std::net::IpAddr, u8)| {
        // VIPs are on the interface too, as single addresses.
        let source = own.iter().find(|(ip, l)| *l == length && ip.is_ipv4() == gateway.is_ipv4()).unwrap().0;
        let begin = Instant::now();
        let answered = runtime.block_on(async {
            while begin.elapsed() < PATIENCE {
                if ping::probe(&netns, Some(source), gateway, Duration::from_millis(100)).await {
                    return true;
                }
            }
            false
        });
        assert!(answered, "{gateway} does not answer {source}");
        begin.elapsed()
    };
    gateways.iter().map(wait).collect()
}

fn link_layer_address(pod: &Pod) -> String {
    let link = pod.namespace.output("ip", &["-o", "link", "show", "dev", INTERFACE]).unwrap();
    link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).unwrap().to_owned()
}

/// Its addresses are the same, its link is another one.
#[test]
fn a_target_that_comes_back_hears_its_gateway_at_once() {
    let _turn = turn();
    let stage = scene("tgback", vec![Trench::fixture('a', 0)]).unwrap();
    let observer = &stage.observers[0];
    let _traffic = observer.traffic().unwrap();
    let all = observer.targets_of_trench();
    let target = stage.cluster.pods(Kind::Target).remove(0);
    let rest: BTreeSet<String> = all.iter().filter(|name| **name != target.plan.name).cloned().collect();
    let proxy = stage.cluster.pods(Kind::Proxy).into_iter().find(|proxy| proxy.plan.node == target.plan.node).unwrap();
    let mut macs = BTreeSet::from([link_layer_address(&target)]);
    heard(&target, &proxy);
    for _ in 0..2 {
        observer.close(&target.plan.name).unwrap();
        observer.wait_whole(&rest, PATIENCE, &mut |line| println!("{line}")).unwrap();
        observer.open(&target.plan.name, Duration::from_secs(5)).unwrap();
        observer.wait_whole(&all, PATIENCE, &mut |line| println!("{line}")).unwrap();
        let took = heard(&target, &proxy);
        println!("{}: answered after {took:?}", link_layer_address(&target));
        // What the kernel has heard of a neighbour it believes for 15 s at least.
        assert!(took.iter().all(|took| *took < Duration::from_secs(3)), "{took:?}");
        macs.insert(link_layer_address(&target));
    }
    assert!(macs.len() > 1, "the link was never another one: nothing was tested");
    check_clean(&stage).unwrap();
}

/// Nobody is told that the pod has gone: its registration, its addresses and the connection's id are those of its predecessor.
#[test]
fn a_target_that_is_made_anew_under_its_name_gets_its_traffic() {
    let _turn = turn();
    let stage = scene("tgnew", vec![Trench::fixture('a', 0)]).unwrap();
    let observer = &stage.observers[0];
    let traffic = observer.traffic().unwrap();
    let target = stage.cluster.pods(Kind::Target).remove(0);
    let (name, before) =
        (target.plan.name.clone(), (addresses(&target, INTERFACE).unwrap(), link_layer_address(&target)));
    drop(target);
    stage.cluster.delete_pod(&name).unwrap();
    stage.cluster.recreate_pod(&name).unwrap();
    let opened = observer.open(&name, Duration::from_secs(10)).unwrap();
    observer.wait_whole(&observer.targets_of_trench(), PATIENCE, &mut |line| println!("{line}")).unwrap();
    let whole = opened.elapsed();
    let target = stage.cluster.pod(&name).unwrap();
    let after = (addresses(&target, INTERFACE).unwrap(), link_layer_address(&target));
    println!("whole {whole:?} after it was opened; {after:?}");
    assert_eq!(before, after, "neighbours notice nothing");
    let mark = traffic.mark();
    std::thread::sleep(Duration::from_secs(2));
    let window = traffic.since(mark);
    println!("{} packets sent, {} lost", window.sent, window.losses.len());
    assert!(window.losses.is_empty(), "{:?}", window.losses.first());
    // By itself a kernel doubts what it has heard of a neighbour after 15 s at the earliest.
    assert!(whole < Duration::from_secs(10), "{whole:?}");
    check_clean(&stage).unwrap();
}
