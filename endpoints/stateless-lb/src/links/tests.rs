//! With the kernel, in namespaces.

use super::suspects::HOLD;
use super::*;
use nsm_kernel::netlink::NeighbourState;

fn ip(args: &str) {
    let out = std::process::Command::new("ip").args(args.split(' ')).output().unwrap();
    assert!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
}

/// Two namespaces with a cable between them, removed at the end.
struct Cable(String);

impl Cable {
    fn new(test: &str) -> Self {
        let cable = Cable(format!("mdl-{:x}-{test}", std::process::id()));
        let (l, p) = (format!("{}-l", cable.0), format!("{}-p", cable.0));
        for ns in [&l, &p] {
            ip(&format!("netns add {ns}"));
        }
        ip(&format!("link add nsm-0 netns {l} type veth peer name eth0 netns {p}"));
        for (ns, device, host) in [(&l, "nsm-0", 1), (&p, "eth0", 2)] {
            ip(&format!("-n {ns} addr add 172.31.0.{host}/24 dev {device}"));
            ip(&format!("-n {ns} link set {device} up"));
        }
        cable
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for end in ["l", "p"] {
            let name = format!("{}-{end}", self.0);
            let _ = std::process::Command::new("ip").args(["netns", "del", &name]).status();
        }
    }
}

async fn until(shared: &Shared, what: &str, condition: impl Fn(&crate::inputs::Inputs) -> bool) {
    let mut inputs = shared.subscribe();
    let waiting = inputs.wait_for(|inputs| condition(inputs));
    let waited = tokio::time::timeout(Duration::from_secs(30), waiting).await;
    assert!(waited.is_ok(), "{what}: {:?}", shared.get());
}

/// The newer one is the one whose address is newer, whatever the indexes say; it may hold for one of two families only.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_interfaces_with_one_address_the_older_is_set_down() {
    let cable = Cable::new("two");
    let (l, p) = (format!("{}-l", cable.0), format!("{}-p", cable.0));
    ip(&format!("link add nsm-1 netns {l} type veth peer name eth1 netns {p}"));
    ip(&format!("-n {p} link set eth1 up"));
    let netns = Netns::named(&l).unwrap();
    let netlink = netns.netlink().await.unwrap();
    let index = async |name: &str| netlink.link_by_name(name).await.unwrap().unwrap().index;
    let (first, second) = (index("nsm-0").await, index("nsm-1").await);
    let (shared, stop) = (Shared::new(), CancellationToken::new());
    let following = run(netns.clone(), "nsm-".to_owned(), "ext".to_owned(), shared.clone(), stop.clone());
    let following = tokio::spawn(following);
    let uses = async |index: u32| {
        until(&shared, "the newer one alone", |inputs| {
            inputs.subnets.iter().flatten().map(|subnet| subnet.index).collect::<Vec<_>>() == [index]
        })
        .await;
    };
    let up = async |name: &str| netlink.link_by_name(name).await.unwrap().unwrap().up;
    uses(first).await;
    // Its clock has hundredths of a second.
    tokio::time::sleep(Duration::from_millis(30)).await;
    ip(&format!("-n {l} addr add 172.31.0.1/24 dev nsm-1"));
    ip(&format!("-n {l} link set nsm-1 up"));
    uses(second).await;
    assert!(!up("nsm-0").await && up("nsm-1").await);
    let routes = netlink.routes(Some(nsm_kernel::netlink::TABLE_MAIN)).await.unwrap();
    assert!(routes.iter().any(|r| r.only_via(second)) && !routes.iter().any(|r| r.only_via(first)), "{routes:?}");

    // The first one comes back under its old index, with its address anew.
    tokio::time::sleep(Duration::from_millis(30)).await;
    ip(&format!("-n {l} addr flush dev nsm-0"));
    ip(&format!("-n {l} addr add 172.31.0.1/24 dev nsm-0"));
    ip(&format!("-n {l} link set nsm-0 up"));
    uses(first).await;
    assert!(up("nsm-0").await && !up("nsm-1").await);
    stop.cancel();
    following.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_target_leaves_and_comes_back_not_too_soon() {
    let cable = Cable::new("silent");
    let (l, p) = (format!("{}-l", cable.0), format!("{}-p", cable.0));
    let netns = Netns::named(&l).unwrap();
    let target: IpAddr = "172.31.0.2".parse().unwrap();
    let shared = Shared::new();
    let message = meridio_proto::nsp::v1::Target { ips: vec!["172.31.0.2/24".to_owned()], ..Default::default() };
    shared.change(|inputs| inputs.targets = Some(vec![message]));
    let stop = CancellationToken::new();
    let following = run(netns.clone(), "nsm-".to_owned(), "ext".to_owned(), shared.clone(), stop.clone());
    let following = tokio::spawn(following);
    until(&shared, "its subnet", |inputs| inputs.subnets.as_ref().is_some_and(|s| s.len() == 1)).await;

    // An interface without Ethernet headers is of no use.
    for args in ["tuntap add dev nsm-tun mode tun", "addr add 172.30.0.1/24 dev nsm-tun", "link set nsm-tun up"] {
        ip(&format!("-n {l} {args}"));
    }
    until(&shared, "told", |inputs| inputs.unusable.contains("nsm-tun")).await;
    assert_eq!(shared.get().subnets.unwrap().len(), 1);

    // It answers no ping, ever. Now it no longer answers at all; what is sent to it makes the kernel ask.
    let silent = || std::fs::write("/proc/sys/net/ipv4/icmp_echo_ignore_all", "1").unwrap();
    Netns::named(&p).unwrap().run(silent).await.unwrap();
    ip(&format!("-n {p} link set eth0 arp off"));
    ip(&format!("-n {l} neigh flush dev nsm-0"));
    let send = move || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let _ = socket.send_to(b"anybody there?", (target, 9));
    };
    netns.run(send).await.unwrap();
    until(&shared, "out", |inputs| inputs.unreachable.contains(&target)).await;
    let out = Instant::now();
    ip(&format!("-n {p} link set eth0 arp on"));
    until(&shared, "back", |inputs| inputs.unreachable.is_empty()).await;
    let took = out.elapsed();
    assert!(took >= HOLD.0 - PROBE && took < HOLD.0 + 8 * PROBE, "after {took:?}");

    // An entry that is only deleted says nothing about the target.
    let before = shared.subscribe();
    netns.run(send).await.unwrap();
    ip(&format!("-n {l} neigh flush dev nsm-0"));
    tokio::time::sleep(CONFIRM * 4).await;
    assert!(!before.has_changed().unwrap() && shared.get().unreachable.is_empty());
    stop.cancel();
    following.await.unwrap();
}

/// Something that makes the kernel resolve the address.
async fn send(netns: &Netns, to: IpAddr) {
    let send = move || {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let _ = socket.send_to(b"anybody there?", (to, 9));
    };
    netns.run(send).await.unwrap();
}

fn registered(ips: &[IpAddr]) -> Vec<meridio_proto::nsp::v1::Target> {
    let target = |ip: &IpAddr| meridio_proto::nsp::v1::Target { ips: vec![format!("{ip}/24")], ..Default::default() };
    ips.iter().map(target).collect()
}

/// Neighbours that the kernel asks for `times` times, a tenth of a second after the other.
async fn ask_for(netns: &Netns, times: u32) {
    let settings = move || {
        for (key, value) in [("retrans_time_ms", 100), ("mcast_solicit", times)] {
            std::fs::write(format!("/proc/sys/net/ipv4/neigh/nsm-0/{key}"), value.to_string()).unwrap();
        }
    };
    netns.run(settings).await.unwrap();
}

async fn until_neighbour(netns: &Netns, what: &str, condition: impl Fn(&Neighbour) -> bool) {
    let netlink = netns.netlink().await.unwrap();
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let all = netlink.neighbours(None).await.unwrap();
        if all.iter().any(&condition) {
            return;
        }
        assert!(Instant::now() < end, "{what}: {all:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a process is told that begins now.
struct Begun {
    shared: Shared,
    stop: CancellationToken,
    following: tokio::task::JoinHandle<()>,
    /// Who was out as soon as interfaces were known.
    out: BTreeSet<IpAddr>,
}

impl Begun {
    async fn with(netns: &Netns, targets: Option<&[IpAddr]>) -> Begun {
        let (shared, stop) = (Shared::new(), CancellationToken::new());
        shared.change(|inputs| inputs.targets = targets.map(registered));
        let following = run(netns.clone(), "nsm-".to_owned(), "ext".to_owned(), shared.clone(), stop.clone());
        let mut inputs = shared.subscribe();
        let following = tokio::spawn(following);
        let first = tokio::time::timeout(Duration::from_secs(30), inputs.wait_for(|inputs| inputs.subnets.is_some()));
        let out = first.await.unwrap().unwrap().unreachable.clone();
        Begun { shared, stop, following, out }
    }

    async fn end(self) -> BTreeSet<IpAddr> {
        self.stop.cancel();
        self.following.await.unwrap();
        self.out
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_that_begins_believes_what_the_kernel_has_found_out() {
    let cable = Cable::new("begin");
    let (l, p) = (format!("{}-l", cable.0), format!("{}-p", cable.0));
    let netns = Netns::named(&l).unwrap();
    let (alive, dead): (IpAddr, IpAddr) = ("172.31.0.2".parse().unwrap(), "172.31.0.9".parse().unwrap());
    ask_for(&netns, 3).await;
    for ip in [alive, dead] {
        send(&netns, ip).await;
    }
    until_neighbour(&netns, "resolved", |n| n.ip == alive && n.mac.is_some()).await;
    until_neighbour(&netns, "failed", |n| n.ip == dead && n.state == NeighbourState::Failed).await;
    let both = [alive, dead];
    assert_eq!(Begun::with(&netns, Some(&both)).await.end().await, BTreeSet::from([dead]));
    // Targets may be told later than interfaces.
    let begun = Begun::with(&netns, None).await;
    assert_eq!(begun.out, BTreeSet::from([dead]));
    begun.shared.change(|inputs| inputs.targets = Some(registered(&[alive])));
    until(&begun.shared, "of no interest", |inputs| inputs.unreachable.is_empty()).await;
    begun.end().await;

    // Somebody goes on sending to it: it is asked for at this moment.
    ask_for(&netns, 1000).await;
    ip(&format!("-n {l} neigh flush dev nsm-0"));
    send(&netns, dead).await;
    until_neighbour(&netns, "being resolved", |n| n.ip == dead && n.state == NeighbourState::Probing).await;
    let begun = Begun::with(&netns, Some(&both)).await;
    assert_eq!(begun.out, BTreeSet::from([dead]));
    ip(&format!("-n {p} addr add {dead}/24 dev eth0"));
    until(&begun.shared, "back", |inputs| inputs.unreachable.is_empty()).await;
    begun.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_whose_messages_were_lost_are_read() {
    let cable = Cable::new("lost");
    let netns = Netns::named(&format!("{}-l", cable.0)).unwrap();
    let dead: IpAddr = "172.31.0.9".parse().unwrap();
    ask_for(&netns, 1).await;
    send(&netns, dead).await;
    until_neighbour(&netns, "failed", |n| n.ip == dead && n.state == NeighbourState::Failed).await;
    let links = Links { netns, prefix: "nsm-".to_owned(), external: "ext".to_owned(), shared: Shared::new() };
    links.shared.change(|inputs| inputs.subnets = Some(BTreeSet::new()));
    let (mut known, mut unread) = (Neighbours::default(), false);
    known.targets(Some(&registered(&[dead])));
    links.scan(&mut known, &mut unread).await;
    assert_eq!(known.doubt(), None, "nothing was lost");
    unread = true;
    links.scan(&mut known, &mut unread).await;
    assert!(!unread && known.out().is_empty(), "an entry that is being deleted looks like that for a moment");
    assert_eq!(known.confirm(Instant::now() + CONFIRM), [dead]);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_link_layer_address_behind_a_targets_address_is_told() {
    let cable = Cable::new("mac");
    let (l, p) = (format!("{}-l", cable.0), format!("{}-p", cable.0));
    let netns = Netns::named(&l).unwrap();
    let target: IpAddr = "172.31.0.2".parse().unwrap();
    let index = netns.netlink().await.unwrap().link_by_name("nsm-0").await.unwrap().unwrap().index;
    send(&netns, target).await;
    until_neighbour(&netns, "resolved", |n| n.ip == target && n.mac.is_some()).await;
    // The first one was there before the process.
    let begun = Begun::with(&netns, Some(&[target])).await;
    for number in 1..=2 {
        ip(&format!("-n {p} link set eth0 address 02:00:00:00:00:0{number}"));
        ip(&format!("-n {l} neigh flush dev nsm-0"));
        send(&netns, target).await;
        let changed = |inputs: &Inputs| inputs.mac_changes.get(&(index, target)) == Some(&number);
        until(&begun.shared, "changed", changed).await;
    }
    begun.end().await;
}
