use meridio_proto::nsp::v1 as nsp;

use super::*;
use crate::cli;
use crate::inputs::Subnet;

#[path = "dataplane_pod_tests.rs"]
mod pods;

/// A directory, with a BPF file system on request, gone at the end.
struct Directory(std::path::PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mdt-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    fn mount(&self) {
        let status = std::process::Command::new("mount").args(["-t", "bpf", "bpf"]).arg(&self.0).status().unwrap();
        assert!(status.success(), "mounting bpffs needs root");
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-q").arg(&self.0).status();
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn dataplane(directory: &Directory) -> Dataplane {
    told(directory, &[])
}

fn told(directory: &Directory, more: &[&str]) -> Dataplane {
    let directory = directory.0.join("lb");
    let settings = cli::settings(&[&["--bpf-dir", directory.to_str().unwrap()], more].concat());
    let netns = Netns::anonymous().unwrap();
    Dataplane::new(&settings, netns, Health::detached("test"), Availability::new("test"))
}

fn waits_for(dataplane: &Dataplane, subservice: &str) -> Option<String> {
    let report = dataplane.health.report();
    let subservice = report.subservices.get(subservice)?;
    (!subservice.serving).then(|| subservice.waits_for.clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_says_what_the_kernel_refuses_until_it_does_not() {
    let directory = Directory::new("refused");
    let mut dataplane = dataplane(&directory);
    assert!(!dataplane.step(&Inputs::default()).await, "to be tried again");
    let reason = waits_for(&dataplane, "DataPlane").unwrap();
    assert!(reason.contains("not on a BPF file system"), "{reason}");
    directory.mount();
    dataplane.step(&Inputs::default()).await;
    assert!(dataplane.engine.is_some());
    assert_eq!(waits_for(&dataplane, "DataPlane").unwrap(), "a configuration to attach with");
}

fn vip(address: &str) -> nsp::Vip {
    nsp::Vip { name: address.into(), address: address.into(), ..Default::default() }
}

fn stream(name: &str, max_targets: u32) -> nsp::Stream {
    nsp::Stream { name: name.into(), max_targets, ..Default::default() }
}

fn flow(name: &str, stream: &nsp::Stream, vips: &[nsp::Vip], protocol: &str) -> nsp::Flow {
    nsp::Flow {
        name: name.into(),
        stream: Some(stream.clone()),
        vips: vips.to_vec(),
        source_subnets: vec!["0.0.0.0/0".into()],
        destination_port_ranges: vec!["80".into()],
        source_port_ranges: vec!["any".into()],
        protocols: vec![protocol.into()],
        ..Default::default()
    }
}

fn target(stream: &str, identifier: u32) -> nsp::Target {
    nsp::Target {
        ips: vec![format!("172.31.0.{}/24", identifier + 1)],
        context: [("identifier".to_owned(), identifier.to_string())].into(),
        status: nsp::target::Status::Enabled as i32,
        stream: Some(self::stream(stream, 0)),
        ..Default::default()
    }
}

/// Two VIPs; streams `s` and `z` of up to ten targets, of which each has two; a flow of `s`.
fn good() -> Inputs {
    let vips = ["20.0.0.1/32", "20.0.0.2/32"].map(vip).to_vec();
    let streams = ["s", "z"].map(|name| stream(name, 10)).to_vec();
    let subnet = Subnet { net: "172.31.0.1/24".parse().unwrap(), index: 1, mtu: 1500, direct: false };
    Inputs {
        conduits: Some(vec![]),
        flows: Some(vec![flow("web", &streams[0], &vips, "tcp")]),
        targets: Some(vec![target("s", 1), target("s", 2), target("z", 3), target("z", 4)]),
        subnets: Some(BTreeSet::from([subnet])),
        vips: Some(vips),
        streams: Some(streams),
        ..Inputs::default()
    }
}

fn identifiers(dataplane: &Dataplane, stream: &str) -> Vec<u32> {
    let targets = dataplane.engine.as_ref().unwrap().targets(stream).unwrap();
    targets.into_iter().map(|(identifier, _)| identifier).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_says_what_is_wrong_with_a_configuration_and_the_last_good_one_stays() {
    let directory = Directory::new("faults");
    directory.mount();
    let mut dataplane = dataplane(&directory);
    dataplane.step(&good()).await;
    assert_eq!(waits_for(&dataplane, "Configuration"), None);
    let bad = flow("bad", &stream("s", 10), &[vip("20.0.0.1/32")], "icmp");
    dataplane.step(&Inputs { flows: Some(vec![bad]), ..good() }).await;
    let reason = waits_for(&dataplane, "Configuration").unwrap();
    assert!(reason.contains("the last good one forwards on"), "{reason}");
    let report = dataplane.health.report();
    assert!(report.subservices["Configuration"].to_do.contains("icmp"), "{report:?}");
    assert_eq!(dataplane.engine.as_ref().unwrap().streams(), ["s", "z"]);
    dataplane.step(&good()).await;
    assert_eq!(waits_for(&dataplane, "Configuration"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_are_followed_while_a_configuration_that_does_not_fit_stands() {
    let directory = Directory::new("too-much");
    directory.mount();
    let mut dataplane = dataplane(&directory);
    dataplane.step(&good()).await;
    assert_eq!((identifiers(&dataplane, "s"), identifiers(&dataplane, "z")), (vec![1, 2], vec![3, 4]));
    // Each of them can be read; together they are more than the maps hold.
    let many = (0..3_000).map(|n| vip(&format!("20.1.{}.{}/32", n / 250, n % 250))).collect();
    let too_much = Inputs { vips: Some(many), ..good() };
    dataplane.step(&too_much).await;
    let reason = waits_for(&dataplane, "Configuration").unwrap();
    assert!(reason.contains("the last good one forwards on"), "{reason}");
    assert_eq!((identifiers(&dataplane, "s"), identifiers(&dataplane, "z")), (vec![1, 2], vec![3, 4]));
    // One leaves, another one no longer answers, a third one comes.
    let changed = Inputs {
        targets: Some(vec![target("s", 2), target("s", 5), target("z", 3), target("z", 4)]),
        unreachable: BTreeSet::from(["172.31.0.4".parse().unwrap()]),
        ..too_much.clone()
    };
    dataplane.step(&changed).await;
    assert_eq!((identifiers(&dataplane, "s"), identifiers(&dataplane, "z")), (vec![2, 5], vec![4]));
    assert!(waits_for(&dataplane, "Configuration").is_some());
    dataplane.step(&good()).await;
    assert_eq!(waits_for(&dataplane, "Configuration"), None);
    assert_eq!((identifiers(&dataplane, "s"), identifiers(&dataplane, "z")), (vec![1, 2], vec![3, 4]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_report_says_which_targets_are_kept_out_by_their_identifiers() {
    let directory = Directory::new("identifiers");
    directory.mount();
    let mut dataplane = dataplane(&directory);
    let twin = nsp::Target { ips: vec!["172.31.0.200/24".into()], ..target("s", 2) };
    let nameless = nsp::Target { ips: vec!["172.31.0.201/24".into()], context: [].into(), ..target("s", 2) };
    let mut targets = good().targets.unwrap();
    targets.extend([target("s", 11), twin, nameless]);
    dataplane.step(&Inputs { targets: Some(targets), ..good() }).await;
    let notes = dataplane.health.report().notes["Targets"].clone();
    let expected = [
        "target 172.31.0.12/24 of stream s: identifier \"11\" is not in 1..10",
        "target 172.31.0.200/24 of stream s: identifier 2 is taken by another target",
        "target 172.31.0.201/24 of stream s: has no identifier",
    ];
    assert_eq!(notes, expected);
    assert_eq!((identifiers(&dataplane, "s"), waits_for(&dataplane, "Configuration")), (vec![1, 2], None));
    dataplane.step(&good()).await;
    assert!(!dataplane.health.report().notes.contains_key("Targets"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_slow_path_of_a_new_target_is_there_before_its_first_packet() {
    let directory = Directory::new("ahead");
    directory.mount();
    let mut dataplane = dataplane(&directory);
    let cable = || {
        let ip = |args: &str| std::process::Command::new("ip").args(args.split(' ')).output().unwrap();
        for args in
            ["link add nsm-0 type veth peer name other", "addr add 172.31.0.1/24 dev nsm-0", "link set other up"]
        {
            assert!(ip(args).status.success(), "{args}");
        }
        assert!(ip("link set nsm-0 up").status.success());
        let line = String::from_utf8(ip("-o link show nsm-0").stdout).unwrap();
        line.split(':').next().unwrap().parse::<u32>().unwrap()
    };
    let index = dataplane.netns.run(cable).await.unwrap();
    let subnet = Subnet { net: "172.31.0.1/24".parse().unwrap(), index, mtu: 1500, direct: false };
    let good = || Inputs { subnets: Some(BTreeSet::from([subnet.clone()])), ..good() };
    dataplane.step(&good()).await;
    let more = Inputs { targets: Some(vec![target("s", 1), target("s", 2), target("s", 5)]), ..good() };
    let desired = desired(&more, &[]).unwrap();
    // The tables alone: what follows them in a round is left out.
    assert!(dataplane.configure(&desired, &more).await);
    assert_eq!(identifiers(&dataplane, "s"), [1, 2, 5]);
    let table = dataplane.engine.as_ref().unwrap().places("s").first().unwrap().0 + 5;
    let netlink = dataplane.netns.netlink().await.unwrap();
    let (rules, routes) = (netlink.rules().await.unwrap(), netlink.routes(Some(table)).await.unwrap());
    let mark = Some(meridio_maglev::MARK_FLAG | table);
    assert!(rules.iter().any(|rule| rule.mark == mark && rule.table == table), "{rules:?}");
    assert!(routes.iter().any(|route| route.only_via(index)), "{routes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_refused_does_not_disturb_what_runs() {
    let directory = Directory::new("refused-targets");
    directory.mount();
    let mut dataplane = dataplane(&directory);
    dataplane.step(&good()).await;
    let guards = async |dataplane: &Dataplane| {
        let rules = dataplane.netns.netlink().await.unwrap().rules().await.unwrap();
        rules.iter().filter(|rule| rule.to.is_some()).count()
    };
    assert_eq!(guards(&dataplane).await, 2);
    // The faulty configuration has no stream s, no second VIP, and room for more targets of z, one of which is there.
    let vips = vec![vip("20.0.0.1/32")];
    let z = stream("z", 20);
    let mut faulty = Inputs {
        flows: Some(vec![flow("bad", &z, &vips, "icmp")]),
        vips: Some(vips),
        streams: Some(vec![z]),
        targets: Some(vec![target("s", 1), target("s", 2), target("z", 15), target("z", 4)]),
        ..good()
    };
    dataplane.step(&faulty).await;
    assert!(waits_for(&dataplane, "Configuration").is_some());
    assert_eq!((identifiers(&dataplane, "s"), identifiers(&dataplane, "z")), (vec![1, 2], vec![4]));
    assert_eq!(guards(&dataplane).await, 2, "both VIPs are in use");
    // Targets of the stream that is in use come and go.
    faulty.targets = Some(vec![target("s", 2), target("s", 6), target("z", 15), target("z", 4)]);
    dataplane.step(&faulty).await;
    assert_eq!((identifiers(&dataplane, "s"), identifiers(&dataplane, "z")), (vec![2, 6], vec![4]));
    let repaired = Inputs { flows: Some(vec![]), ..faulty };
    dataplane.step(&repaired).await;
    assert_eq!(waits_for(&dataplane, "Configuration"), None);
    assert_eq!((identifiers(&dataplane, "z"), guards(&dataplane).await), (vec![4, 15], 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_made_as_large_as_set_and_keep_their_size_until_they_are_removed() {
    let directory = Directory::new("chunks");
    directory.mount();
    let mut first = told(&directory, &["--table-chunks", "7"]);
    // Two streams of 2 chunks each have room, a third one has not while one changes.
    first.step(&good()).await;
    assert_eq!(waits_for(&first, "Configuration"), None);
    assert_eq!(first.engine.as_ref().unwrap().chunks(), 7);
    assert!(!first.health.report().notes.contains_key("Tables"));
    let streams = ["s", "z", "y", "x"].map(|name| stream(name, 10)).to_vec();
    first.step(&Inputs { streams: Some(streams.clone()), ..good() }).await;
    let to_do = first.health.report().subservices["Configuration"].to_do.clone();
    assert!(to_do.contains("there are 7") && to_do.contains("NSM_TABLE_CHUNKS"), "{to_do}");
    drop(first);
    let mut second = told(&directory, &["--table-chunks", "64"]);
    second.step(&Inputs { streams: Some(streams), ..good() }).await;
    assert!(waits_for(&second, "Configuration").is_some());
    let note = second.health.report().notes["Tables"].join("");
    assert!(note.contains("7 chunks, not 64 (NSM_TABLE_CHUNKS)") && note.contains("--remove"), "{note}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sctp_is_spread_by_ports_alone_where_that_is_set() {
    let directory = Directory::new("sctp");
    directory.mount();
    let mut dataplane = told(&directory, &["--sctp-ports-only", "s"]);
    let vips = good().vips.unwrap();
    let z = nsp::Flow { destination_port_ranges: vec!["81".into()], ..flow("z", &stream("z", 10), &vips, "sctp") };
    let flows = vec![flow("s", &stream("s", 10), &vips, "sctp"), z];
    dataplane.step(&Inputs { flows: Some(flows), ..good() }).await;
    assert_eq!(waits_for(&dataplane, "Configuration"), None);
    let own = meridio_maglev::own_directory(&directory.0.join("lb")).unwrap();
    let live = meridio_maglev::Live::open(&own).unwrap();
    let image = meridio_maglev::Image::of(&live).unwrap();
    let chosen = |port: u16| -> BTreeSet<u32> {
        let target = |n: u8| {
            let mut packet = vec![0x45, 0, 0, 32, 0, 0, 0, 0, 64, 132, 0, 0, 10, 0, 0, n, 20, 0, 0, 1];
            packet.extend([4, 210].iter().chain(&port.to_be_bytes()).chain(&[0; 8]));
            image.explain(&packet, meridio_maglev::ETH_IPV4).decision.identifier
        };
        (1..=40).map(target).collect()
    };
    assert_eq!(chosen(81), BTreeSet::from([3, 4]), "by addresses too");
    let one = chosen(80);
    assert!(one.len() == 1 && one.is_subset(&BTreeSet::from([1, 2])), "{one:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_processes_in_a_pod_the_second_one_waits_and_then_takes_over() {
    let directory = Directory::new("two-processes");
    directory.mount();
    let (mut first, mut second) = (dataplane(&directory), dataplane(&directory));
    first.step(&good()).await;
    for _ in 0..2 {
        assert!(!second.step(&Inputs { targets: Some(vec![]), ..good() }).await, "to be tried again");
        let reason = waits_for(&second, "DataPlane").unwrap();
        assert!(reason.contains(&format!("process {} (", std::process::id())), "{reason}");
        assert_eq!(identifiers(&first, "s"), [1, 2], "not touched");
    }
    // A whole process does not even begin, unless the first one is about to end.
    let base = directory.0.join("lb");
    let refused = crate::alone(&base, Duration::from_millis(150)).await.unwrap_err().to_string();
    assert!(refused.contains(&format!("process {} (", std::process::id())), "{refused}");
    let (waiting, ending) = (crate::alone(&base, Duration::from_secs(60)), async { drop(first) });
    tokio::join!(waiting, ending).0.unwrap();
    second.step(&Inputs::default()).await;
    assert!(second.engine.as_ref().unwrap().adopted());
    assert_eq!((identifiers(&second, "s"), second.kept), (vec![1, 2], Some(true)));
}
