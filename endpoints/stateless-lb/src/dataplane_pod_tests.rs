//! Tests in network namespaces of their own, with interfaces in them.

use nsm_kernel::Route;
use nsm_kernel::netlink::Netlink;

use super::*;

/// Runs a test in a namespace of its own: the threads of its runtime inherit that of the thread that starts them.
async fn in_a_pod<Work: Future<Output = ()>>(work: impl FnOnce() -> Work + Send + 'static) {
    let pod = move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(work());
    };
    Netns::anonymous().unwrap().run(pod).await.unwrap();
}

fn run(command: &str) {
    let (program, words) = command.split_once(' ').unwrap();
    let status = std::process::Command::new(program).args(words.split(' ')).status().unwrap();
    assert!(status.success(), "{command}");
}

/// A pair of links, both ends up.
fn cable(name: &str, far: &str) {
    run(&format!("ip link add {name} type veth peer name {far}"));
    [name, far].iter().for_each(|end| run(&format!("ip link set {end} up")));
}

async fn index(name: &str) -> u32 {
    let netns = Netns::current().unwrap();
    let links = netns.netlink().await.unwrap().links().await.unwrap();
    links.iter().find(|link| link.name == name).unwrap().index
}

/// A load balancer whose rules and routes are in this namespace as well.
fn here(path: &std::path::Path, external: &str) -> Dataplane {
    let directory = std::mem::ManuallyDrop::new(Directory(path.to_owned()));
    Dataplane { netns: Netns::current().unwrap(), ..told(&directory, &["--external-interface", external]) }
}

async fn eventually(what: &str, mut there: impl AsyncFnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !there().await {
        assert!(begun.elapsed() < Duration::from_secs(30), "{what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn via(netlink: &Netlink, table: u32, index: u32) -> Vec<Route> {
    netlink.routes(Some(table)).await.unwrap().into_iter().filter(|route| route.only_via(index)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_that_share_a_directory_do_not_find_each_others_tables() {
    let directory = Directory::new("two-pods");
    directory.mount();
    let mut first = dataplane(&directory);
    first.step(&good()).await;
    let path = directory.0.clone();
    in_a_pod(move || async move {
        let mut second = dataplane(&std::mem::ManuallyDrop::new(Directory(path)));
        second.step(&Inputs { targets: Some(vec![target("s", 9)]), ..good() }).await;
        assert!(!second.engine.as_ref().unwrap().adopted());
        assert_eq!((identifiers(&second, "s"), second.kept), (vec![9], Some(false)));
    })
    .await;
    assert_eq!((identifiers(&first, "s"), identifiers(&first, "z")), (vec![1, 2], vec![3, 4]));
}

/// The other version is played by maps elsewhere: they are not adopted either.
#[tokio::test(flavor = "multi_thread")]
async fn what_another_version_forwards_is_not_taken_away_until_all_targets_are_there() {
    let directories = ["version-old", "version-new", "version-none"].map(Directory::new);
    directories.iter().for_each(Directory::mount);
    let [old, new, none] = directories.each_ref().map(|directory| directory.0.clone());
    in_a_pod(move || async move {
        cable("ext-vlan", "other");
        let mut first = here(&old, "ext-vlan");
        first.step(&Inputs { external: Some(index("ext-vlan").await), ..good() }).await;
        assert_eq!(waits_for(&first, "DataPlane"), None);
        drop(first);
        let marked = async || {
            let rules = Netns::current().unwrap().netlink().await.unwrap().rules().await.unwrap();
            rules.iter().filter(|rule| rule.mark.is_some()).count()
        };
        assert_eq!(marked().await, 4);
        // A target whose subnet is not there is missing.
        let far = nsp::Target { ips: vec!["172.30.0.9/24".into()], ..target("s", 2) };
        for (directory, name, forwards) in [(&new, "ext-vlan", true), (&none, "other", false)] {
            let targets = Some(vec![target("s", 1), far.clone()]);
            let inputs = Inputs { targets, external: Some(index(name).await), ..good() };
            let mut second = here(directory, name);
            second.step(&Inputs { external: inputs.external, ..Inputs::default() }).await;
            assert_eq!((second.kept, second.gate.open), (Some(forwards), forwards), "{name}");
            assert_eq!(second.availability.said(), forwards.then_some(true), "{name}");
            // What can be read of a faulty configuration is better than nothing only.
            let mut flows = inputs.flows.clone().unwrap();
            flows.push(flow("bad", &stream("s", 10), &[vip("20.0.0.1/32")], "icmp"));
            second.step(&Inputs { flows: Some(flows), ..inputs.clone() }).await;
            let configured = second.engine.as_ref().unwrap().configured();
            assert_eq!((configured, second.attached.is_some()), (!forwards, !forwards), "{name}");
            assert_eq!(second.availability.said(), Some(forwards), "{name}");
            let waits = waits_for(&second, "Configuration").unwrap();
            assert!(waits.contains("the last good one forwards on"), "{name}: {waits}");
            assert_eq!(marked().await, if forwards { 4 } else { 1 }, "{name}");
            second.step(&inputs).await;
            assert!(!second.engine.as_ref().unwrap().adopted());
            assert_eq!((identifiers(&second, "s"), second.gate.open), (vec![1], forwards), "{name}");
            assert_eq!((second.availability.said(), marked().await), (Some(forwards), 1), "{name}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn vips_are_announced_only_where_a_program_is_attached() {
    let directory = Directory::new("announced");
    directory.mount();
    let path = directory.0.clone();
    in_a_pod(move || async move {
        run("ip tuntap add dev ext-vlan mode tun");
        run("ip link set ext-vlan up");
        let mut first = here(&path, "ext-vlan");
        assert!(!first.step(&Inputs { external: Some(index("ext-vlan").await), ..good() }).await, "to be tried again");
        assert!(waits_for(&first, "DataPlane").unwrap().contains("no Ethernet header"));
        assert_eq!((identifiers(&first, "s"), first.availability.said()), (vec![1, 2], Some(false)));
        run("ip link del ext-vlan");
        cable("ext-vlan", "other");
        first.step(&Inputs { external: Some(index("ext-vlan").await), ..good() }).await;
        assert_eq!(first.availability.said(), Some(true));
        drop(first);
        // The interface is not told yet, but what the first one has attached to it is there.
        let mut second = here(&path, "ext-vlan");
        second.step(&Inputs::default()).await;
        assert_eq!((second.attached, second.availability.said()), (None, Some(true)));
        second.step(&good()).await;
        assert_eq!((second.attached, second.availability.said()), (None, Some(true)));
        run("ip link del ext-vlan");
        second.step(&good()).await;
        assert_eq!(second.availability.said(), Some(false));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_detour_has_its_route_again_before_the_nsp_tells_anything() {
    let directory = Directory::new("detour");
    directory.mount();
    let path = directory.0.clone();
    in_a_pod(move || async move {
        cable("ext-vlan", "other");
        let external = Some(index("ext-vlan").await);
        let netns = Netns::current().unwrap();
        let netlink = netns.netlink().await.unwrap();
        let mut first = here(&path, "ext-vlan");
        first.step(&Inputs { external, ..good() }).await;
        let detour = |dataplane: &Dataplane| dataplane.engine.as_ref().unwrap().detour().unwrap();
        assert_eq!(via(netlink, routing::GUARD_TABLE, detour(&first)).await.len(), 2, "one of each IP version");
        let rules = netlink.rules().await.unwrap();
        drop(first);
        let mut second = here(&path, "ext-vlan");
        second.step(&Inputs { external, ..Inputs::default() }).await;
        assert!(waits_for(&second, "Configuration").is_some());
        assert_eq!(via(netlink, routing::GUARD_TABLE, detour(&second)).await.len(), 2);
        assert_eq!(netlink.rules().await.unwrap(), rules);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_take_away_is_put_back_however_often_inputs_change() {
    let directory = Directory::new("put-back");
    directory.mount();
    let path = directory.0.clone();
    in_a_pod(move || async move {
        cable("ext-vlan", "other");
        cable("nsm-0", "target");
        run("ip addr add 172.31.0.1/24 dev nsm-0");
        let link = index("nsm-0").await;
        let subnet = Subnet { net: "172.31.0.1/24".parse().unwrap(), index: link, mtu: 1500, direct: false };
        let (shared, stop) = (Shared::new(), CancellationToken::new());
        let external = Some(index("ext-vlan").await);
        shared.change(|inputs| *inputs = Inputs { external, subnets: Some([subnet].into()), ..good() });
        let dataplane = here(&path, "ext-vlan");
        let health = dataplane.health.clone();
        let following = tokio::spawn(dataplane.run(shared.clone(), stop.clone()));
        let netns = Netns::current().unwrap();
        let netlink = netns.netlink().await.unwrap();
        let routes = async || via(netlink, 5001, link).await.len();
        eventually("a route", async || routes().await == 1).await;
        run("ip link set nsm-0 down");
        assert_eq!(routes().await, 0, "it goes with the link");
        run("ip link set nsm-0 up");
        eventually("the route again", async || routes().await == 1).await;
        run("tc filter del dev ext-vlan ingress");
        let mut changes = 0;
        eventually("the filter again", async || {
            changes += 1;
            let odd = format!("odd-{changes}");
            shared.change(|inputs| inputs.unusable = [odd].into());
            health.report().notes.contains_key("Attachment")
        })
        .await;
        stop.cancel();
        following.await.unwrap();
    })
    .await;
}
