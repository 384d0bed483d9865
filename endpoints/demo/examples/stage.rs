//! Builds the stage of the demo (namespaces, cables) and waits for a line on standard input.

use std::io::BufRead as _;

fn main() -> anyhow::Result<()> {
    let start = std::time::Instant::now();
    let blueprint = meridio_demo::cluster::Blueprint {
        id: "stage".into(),
        binary: std::env::current_exe()?,
        logs: "/tmp/work/stage-logs".into(),
        trenches: vec![meridio_demo::topology::Trench::fixture('a', 0)],
        options: meridio_demo::topology::Options { log_level: "INFO".into(), bird: "/usr/sbin/bird".into() },
    };
    let cluster = meridio_demo::cluster::Cluster::build(blueprint, &mut |line| println!("{line}"))?;
    println!("built in {:?}", start.elapsed());
    for pod in cluster.pods(meridio_demo::topology::Kind::Gateway) {
        pod.process("bird")?.start(&pod.namespace)?;
    }
    println!("ready");
    let _ = std::io::stdin().lock().lines().next();
    let start = std::time::Instant::now();
    drop(cluster);
    println!("gone in {:?}", start.elapsed());
    Ok(())
}
