//! The end of forwarding in this network namespace, on request; and of what is left of others that do not exist any more.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use nsm_kernel::Netns;
use tokio_util::sync::CancellationToken;

use crate::routing;
use crate::settings::Settings;

/// Takes away what load balancers have left: programs, maps, rules, routes.
pub(crate) async fn remove(settings: &Settings) -> anyhow::Result<()> {
    let netns = Netns::current().context("network namespace")?;
    let links = netns.netlink().await.context("network namespace")?.links().await.context("interfaces")?;
    let (base, external) = (settings.bpf_dir.clone(), settings.external_interface.clone());
    let programs = move || {
        let directory = meridio_maglev::own_directory(&base)?;
        // Other settings may have had another one.
        let mut interfaces = vec![external.as_str()];
        for link in links.iter().filter(|link| link.name != external) {
            if meridio_maglev::Engine::attached(&link.name)? {
                interfaces.push(&link.name);
            }
        }
        meridio_maglev::Engine::remove(&directory, &interfaces)?;
        // It stays if somebody has begun to use it again.
        let _ = std::fs::remove_dir(&directory);
        Ok::<_, meridio_maglev::Error>(())
    };
    let removed = tokio::task::spawn_blocking(programs).await?;
    if let Err(error @ meridio_maglev::Error::Held { .. }) = removed {
        return Err(anyhow::Error::new(error).context("nothing is removed while a load balancer runs: end it first"));
    }
    removed?;
    routing::remove(&netns, settings.tables()).await.context("rules and routes")?;
    tracing::info!("removed");
    Ok(())
}

/// How often is looked for what pods that are gone have left on the node's BPF file system.
const LOOK: Duration = Duration::from_secs(600);

/// Removes what pods that are gone have left there: at once, and from time to time until `stop`.
pub(crate) async fn clean_up(base: PathBuf, stop: CancellationToken) {
    let mut said = String::new();
    loop {
        let place = base.clone();
        let removed = tokio::task::spawn_blocking(move || meridio_maglev::remove_gone(&place)).await;
        match removed.map_err(anyhow::Error::new).and_then(|removed| Ok(removed?)) {
            // Nothing depends on it.
            Err(error) if error.to_string() != said => {
                tracing::warn!(%error, "what pods that are gone have left stays");
                said = error.to_string();
            }
            _ => {}
        }
        if stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use meridio_common::Health;
    use meridio_proto::nsp::v1 as nsp;

    use super::*;
    use crate::availability::Availability;
    use crate::cli;
    use crate::dataplane::Dataplane;
    use crate::inputs::{Inputs, Subnet};
    use crate::namespaces::run;

    fn said(commands: &[&str]) -> String {
        commands.iter().map(|command| format!("# {command}\n{}", run(command))).collect()
    }

    fn rules_and_routes() -> String {
        said(&["ip -4 rule", "ip -6 rule", "ip -4 route show table all", "ip -6 route show table all"])
    }

    /// Everything in the namespace of this thread that a load balancer could have made.
    fn traces() -> String {
        let interface = [
            "ip -br link",
            "tc qdisc show dev ext-vlan0",
            "tc filter show dev ext-vlan0 ingress",
            "tc filter show dev ext-vlan0 egress",
        ];
        rules_and_routes() + &said(&interface)
    }

    fn index(device: &str) -> u32 {
        run(&format!("ip -o link show dev {device}")).split(':').next().unwrap().parse().unwrap()
    }

    /// Two interfaces without addresses of their own making: the outside, and the link of two targets.
    fn links() {
        for (device, v4, v6) in [("ext-vlan0", "10.0.0.1/24", "fd0a::1/64"), ("nsm-0", "172.31.0.1/24", "fd00::1/64")] {
            let far = format!("far-{device}");
            run(&format!("ip link add {device} type veth peer name {far}"));
            for end in [device, &far] {
                run(&format!("ip link set {end} addrgenmode none"));
                run(&format!("ip link set {end} up"));
            }
            run(&format!("ip addr add {v4} dev {device}"));
            run(&format!("ip addr add {v6} dev {device} nodad"));
        }
        // The kernel takes IPv6 addresses and links into use a moment later.
        let begun = std::time::Instant::now();
        let devices =
            ["ext-vlan0", "far-ext-vlan0", "nsm-0", "far-nsm-0"].map(|device| format!("ff00::/8 dev {device} "));
        let settled = || {
            let routes = run("ip -6 route show table local");
            devices.iter().all(|line| routes.contains(line))
                && ["local fd0a::1 ", "local fd00::1 "].iter().all(|line| routes.contains(line))
        };
        while !settled() {
            assert!(begun.elapsed() < Duration::from_secs(10), "IPv6 addresses are not in use");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn inputs() -> Inputs {
        let vips: Vec<nsp::Vip> = ["20.0.0.1/32", "2000::1/128"]
            .map(|address| nsp::Vip { name: address.into(), address: address.into(), ..Default::default() })
            .to_vec();
        let stream = nsp::Stream { name: "s".into(), max_targets: 10, ..Default::default() };
        let flow = nsp::Flow {
            name: "web".into(),
            stream: Some(stream.clone()),
            vips: vips.clone(),
            source_subnets: vec!["0.0.0.0/0".into(), "::/0".into()],
            destination_port_ranges: vec!["80".into()],
            source_port_ranges: vec!["any".into()],
            protocols: vec!["tcp".into()],
            ..Default::default()
        };
        let target = |id: u32| nsp::Target {
            ips: vec![format!("172.31.0.{}/24", id + 1), format!("fd00::{}/64", id + 1)],
            context: [("identifier".to_owned(), id.to_string())].into(),
            status: nsp::target::Status::Enabled as i32,
            stream: Some(stream.clone()),
            ..Default::default()
        };
        let subnet = |net: &str| Subnet { net: net.parse().unwrap(), index: index("nsm-0"), mtu: 1500, direct: false };
        Inputs {
            vips: Some(vips),
            conduits: Some(vec![]),
            targets: Some(vec![target(1), target(2)]),
            streams: Some(vec![stream]),
            flows: Some(vec![flow]),
            subnets: Some(BTreeSet::from([subnet("172.31.0.1/24"), subnet("fd00::1/64")])),
            external: Some(index("ext-vlan0")),
            ..Inputs::default()
        }
    }

    /// A load balancer that forwards, with these settings.
    async fn set_up(settings: &Settings) -> Dataplane {
        let netns = Netns::current().unwrap();
        let errors = routing::errors_to_gateways(netns.netlink().await.unwrap(), settings.gateway_table);
        errors.await.unwrap();
        let mut dataplane = Dataplane::new(settings, netns, Health::detached("test"), Availability::new("test"));
        assert!(dataplane.step(&inputs()).await, "forwards");
        dataplane
    }

    async fn set_up_and_remove(directory: String) {
        let settings = cli::settings(&["--bpf-dir", &directory]);
        let before = traces();
        let mut dataplane = set_up(&settings).await;
        let running = traces();
        let refused = format!("{:#}", remove(&settings).await.unwrap_err());
        let us = format!("process {} (", std::process::id());
        assert!(refused.contains("end it first") && refused.contains(&us), "{refused}");
        assert_eq!(traces(), running, "forwards on");
        assert!(dataplane.verify().await, "and nothing is missing");
        // As after a kill: only what belongs to the process is gone.
        drop(dataplane);
        let after = traces();
        for left in
            ["fwmark 0x4d001389", "from all to 20.0.0.1", "table 5001", "blackhole", "clsact", "meridio_ingress"]
        {
            assert!(after.contains(left), "{left} is missing in {after}");
        }
        assert!(std::fs::read_dir(&directory).unwrap().count() > 0);
        // Once more does no harm.
        for _ in 0..2 {
            remove(&settings).await.unwrap();
            nothing_left(&before, &directory);
        }
        let others =
            ["--external-interface", "far-nsm-0", "--identifier-offset-start", "50000", "--gateway-table", "99"];
        let other = cli::settings(&[&["--bpf-dir", &directory], &others[..]].concat());
        drop(set_up(&settings).await);
        remove(&other).await.unwrap();
        nothing_left(&before, &directory);
        // What only the settings of a process before lead to ends with the next one.
        drop(set_up(&settings).await);
        drop(set_up(&Settings { external_interface: settings.external_interface.clone(), ..other }).await);
        let after = traces();
        assert!(after.contains("table 50001") && after.contains("lookup 99"), "{after}");
        for gone in ["fwmark 0x4d001389", "table 5001", "lookup 4096"] {
            assert!(!after.contains(gone), "{gone} is in {after}");
        }
        remove(&settings).await.unwrap();
        nothing_left(&before, &directory);
        // Without the interface, and so without its programs, the rest goes all the same.
        drop(set_up(&settings).await);
        run("ip link del ext-vlan0");
        remove(&settings).await.unwrap();
        let after = rules_and_routes();
        for gone in ["lookup 4098", "lookup 5001", "lookup 4096", "table 5001", "table 4098"] {
            assert!(!after.contains(gone), "{gone} is in {after}");
        }
        assert_eq!(std::fs::read_dir(&directory).map(|entries| entries.count()).unwrap_or(0), 0);
    }

    fn nothing_left(before: &str, directory: &str) {
        assert_eq!(traces(), before);
        assert_eq!(std::fs::read_dir(directory).map(|entries| entries.count()).unwrap_or(0), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn removal_leaves_no_rule_route_interface_program_or_map() {
        let directory = tempfile::Builder::new().prefix("mdt-removal-").tempdir().unwrap();
        let path = directory.path().to_str().unwrap().to_owned();
        run(&format!("mount -t bpf bpf {path}"));
        let below = format!("{path}/lb");
        // A thread in a namespace of its own; the threads of the runtime in it inherit that.
        let netns = Netns::anonymous().unwrap();
        let tested = move || {
            links();
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(set_up_and_remove(below));
        };
        let result = netns.run(tested).await;
        run(&format!("umount {path}"));
        result.unwrap();
    }
}
