//! Two trenches with the same VIPs and the same gateway addresses, on the same nodes.

use std::collections::BTreeSet;

use meridio_demo::topology::Trench;
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
