//! What the kernel tells: NSM interfaces with their subnets, the external interface, and targets that do not answer on
//! their link.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use futures_util::future::{Fuse, FusedFuture as _, FutureExt as _};
use nsm_kernel::Netns;
use nsm_kernel::monitor::{Event, Monitor, Topic};
use nsm_kernel::netlink::{Address, Link, LinkChange, NeighbourState};
use nsm_kernel::ping::Pinger;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::inputs::{Shared, Subnet};

/// Events come in bursts; this is the time to let one pass.
const SETTLE: Duration = Duration::from_millis(5);
/// What no event told is seen after this time at the latest.
const RESCAN: Duration = Duration::from_secs(10);
/// A neighbour entry that is deleted is reported as failed just before; a failure counts once it has lasted this long.
const CONFIRM: Duration = Duration::from_millis(30);
/// How often targets that do not answer are asked again, and for how long each.
const PROBE: Duration = Duration::from_millis(500);
/// Shortest and longest time that a target stays out of the tables.
const HOLD: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// A target that stayed in for this long starts with the shortest time again.
const FORGIVEN: Duration = Duration::from_secs(60);

/// Follows the kernel until `stop`.
pub(crate) async fn run(netns: Netns, prefix: String, external: String, shared: Shared, stop: CancellationToken) {
    let following = async {
        loop {
            match Monitor::open(&netns, &[Topic::Links, Topic::Routes, Topic::Neighbours]).await {
                Ok(monitor) => {
                    let links = Links {
                        netns: netns.clone(),
                        prefix: prefix.clone(),
                        external: external.clone(),
                        shared: shared.clone(),
                    };
                    links.follow(monitor).await;
                }
                Err(error) => tracing::warn!(%error, "kernel events cannot be followed"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = following => {}
    }
}

/// What interfaces there are.
struct Read {
    subnets: BTreeSet<Subnet>,
    unusable: BTreeSet<String>,
    external: Option<u32>,
}

struct Links {
    netns: Netns,
    prefix: String,
    external: String,
    shared: Shared,
}

impl Links {
    async fn follow(&self, mut monitor: Monitor) {
        let mut suspects = Suspects::default();
        let mut rescan = tokio::time::interval(RESCAN);
        let mut probe = tokio::time::interval(PROBE);
        probe.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut due: Option<Instant> = None;
        let mut doubted: BTreeMap<IpAddr, Instant> = BTreeMap::new();
        // Beside the events: who is silent takes all of the time there is, and others may fail meanwhile.
        let mut asking = std::pin::pin!(Fuse::terminated());
        loop {
            let settle = at(due);
            let confirm = at(doubted.values().min().copied());
            tokio::select! {
                event = monitor.next() => match event {
                    Event::Neighbour(n) if n.state == NeighbourState::Failed => {
                        if self.is_target(n.ip) {
                            doubted.entry(n.ip).or_insert_with(|| Instant::now() + CONFIRM);
                        }
                    }
                    Event::Neighbour(n) if n.state == NeighbourState::Reachable => {
                        doubted.remove(&n.ip);
                        suspects.answer(n.ip);
                        self.back(&mut suspects);
                    }
                    Event::NeighbourGone(n) => _ = doubted.remove(&n.ip),
                    Event::Neighbour(_) => {}
                    _ => due = due.or(Some(Instant::now() + SETTLE)),
                },
                () = settle => {
                    due = None;
                    self.scan().await;
                }
                () = confirm => {
                    let now = Instant::now();
                    let failed: Vec<IpAddr> = doubted.extract_if(.., |_, at| *at <= now).map(|(ip, _)| ip).collect();
                    for ip in failed {
                        if suspects.fail(ip, now) {
                            tracing::warn!(%ip, "target does not answer on its link: out of the tables");
                        }
                    }
                    self.publish(&suspects);
                }
                () = at(suspects.next()) => self.back(&mut suspects),
                _ = rescan.tick() => self.scan().await,
                _ = probe.tick(), if suspects.any() && asking.is_terminated() => {
                    suspects.retain(|ip| self.is_target(ip));
                    self.publish(&suspects);
                    asking.set(self.probe(suspects.out()).fuse());
                }
                answers = &mut asking, if !asking.is_terminated() => {
                    for ip in answers {
                        suspects.answer(ip);
                    }
                    self.publish(&suspects);
                    self.back(&mut suspects);
                }
            }
        }
    }

    fn is_target(&self, ip: IpAddr) -> bool {
        let inputs = self.shared.get();
        let text = ip.to_string();
        let ours = |t: &str| t == text || t.split('/').next() == Some(text.as_str());
        inputs.targets.iter().flatten().any(|t| t.ips.iter().any(|i| ours(i)))
    }

    /// Lets those in whose time is over.
    fn back(&self, suspects: &mut Suspects) {
        let back = suspects.back(Instant::now());
        for ip in &back {
            tracing::info!(%ip, "target answers on its link again");
        }
        if !back.is_empty() {
            self.publish(suspects);
        }
    }

    fn publish(&self, suspects: &Suspects) {
        let out: BTreeSet<IpAddr> = suspects.out().into_iter().collect();
        self.shared.change(|inputs| inputs.unreachable = out);
    }

    /// Asks each address once; asking makes the kernel resolve it anew, which is what counts.
    async fn probe(&self, addresses: Vec<IpAddr>) -> Vec<IpAddr> {
        let asking = addresses.into_iter().map(|ip| async move {
            let pinger = Pinger::open(&self.netns, ip.is_ipv6(), None).await.ok()?;
            pinger.probe(ip, PROBE * 4 / 5).await.then_some(ip)
        });
        futures_util::future::join_all(asking).await.into_iter().flatten().collect()
    }

    async fn scan(&self) {
        match self.read().await {
            Ok(read) => self.shared.change(|inputs| {
                inputs.subnets = Some(read.subnets);
                inputs.unusable = read.unusable;
                inputs.external = read.external;
            }),
            Err(error) => tracing::warn!(%error, "interfaces cannot be read"),
        }
    }

    async fn read(&self) -> Result<Read, nsm_kernel::Error> {
        let netlink = self.netns.netlink().await?;
        let links = netlink.links().await?;
        let external = links.iter().find(|l| l.name == self.external && l.up).map(|l| l.index);
        let ours = links.iter().filter(|l| l.up && l.name.starts_with(&self.prefix) && l.name != self.external);
        let (usable, unusable): (Vec<&Link>, Vec<&Link>) = ours.partition(|l| l.mac.is_some());
        let ours: BTreeMap<u32, (u32, bool)> =
            usable.iter().map(|l| (l.index, (l.mtu, l.kind == "veth" && l.peer_nsid.is_some()))).collect();
        let mut addresses: Vec<Address> = netlink.addresses(None).await?.into_iter().filter(|a| a.global).collect();
        for index in replaced(&addresses, &ours) {
            let name = usable.iter().find(|l| l.index == index).map_or("", |l| l.name.as_str());
            tracing::warn!(interface = name, "a newer interface has its address: set down");
            // It may go while we look, and what it is in the way of is to be served in any case.
            if let Err(error) =
                netlink.link_change(index, &LinkChange { up: Some(false), ..LinkChange::default() }).await
            {
                tracing::warn!(interface = name, %error, "not set down");
            }
            addresses.retain(|a| a.index != index);
        }
        let subnets = addresses
            .into_iter()
            .filter_map(|a| {
                let (mtu, direct) = *ours.get(&a.index)?;
                Some(Subnet { net: a.net, index: a.index, mtu, direct })
            })
            .collect();
        Ok(Read { subnets, unusable: unusable.iter().map(|l| l.name.clone()).collect(), external })
    }
}

/// Interfaces whose address a newer one of ours has. Proxy and NSM of a node may have forgotten the connection that an interface belongs
/// to, and have made another beside it: what is sent over the old one gets nowhere, and the kernel would prefer it.
///
/// An interface is as new as its newest address: one that was down has got its IPv6 addresses later than its IPv4 ones. Whatever the
/// times are, each address stays with the newest interface that has it.
fn replaced(addresses: &[Address], ours: &BTreeMap<u32, (u32, bool)>) -> BTreeSet<u32> {
    let mut interfaces: BTreeMap<u32, (u32, Vec<IpAddr>)> = BTreeMap::new();
    for address in addresses.iter().filter(|a| ours.contains_key(&a.index)) {
        let (newest, ips) = interfaces.entry(address.index).or_default();
        *newest = address.since.max(*newest);
        ips.push(address.net.addr());
    }
    let mut newest_first: Vec<_> = interfaces.into_iter().collect();
    newest_first.sort_by_key(|(index, (newest, _))| Reverse((*newest, *index)));
    let mut held = BTreeSet::new();
    let mut old = BTreeSet::new();
    for (index, (_, ips)) in newest_first {
        if ips.iter().any(|ip| held.contains(ip)) {
            old.insert(index);
        } else {
            held.extend(ips);
        }
    }
    old
}

/// Waits until `time`; for ever if there is none.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Targets that do not answer, and how patient to be with each.
#[derive(Debug, Default)]
struct Suspects(BTreeMap<IpAddr, Suspect>);

#[derive(Debug)]
struct Suspect {
    out: bool,
    since: Instant,
    hold: Duration,
    /// It has answered since it failed the last time.
    answers: bool,
}

impl Suspects {
    /// The address failed; `true`: it goes out of the tables.
    fn fail(&mut self, ip: IpAddr, now: Instant) -> bool {
        let suspect =
            self.0.entry(ip).or_insert(Suspect { out: false, since: now, hold: Duration::ZERO, answers: false });
        suspect.answers = false;
        if suspect.out {
            return false;
        }
        let forgiven = now.duration_since(suspect.since) > FORGIVEN;
        suspect.hold = if forgiven { HOLD.0 } else { (suspect.hold * 2).clamp(HOLD.0, HOLD.1) };
        (suspect.out, suspect.since) = (true, now);
        true
    }

    /// The address answers: it comes back, which takes its time after each failure.
    fn answer(&mut self, ip: IpAddr) {
        if let Some(suspect) = self.0.get_mut(&ip) {
            suspect.answers = true;
        }
    }

    /// When the next one comes back unless it fails again.
    fn next(&self) -> Option<Instant> {
        self.0.values().filter(|s| s.out && s.answers).map(|s| s.since + s.hold).min()
    }

    /// Those that answer and have been out for long enough: they are no longer.
    fn back(&mut self, now: Instant) -> Vec<IpAddr> {
        let due = |s: &Suspect| s.out && s.answers && now.duration_since(s.since) >= s.hold;
        let mut back = Vec::new();
        for (ip, suspect) in self.0.iter_mut().filter(|(_, suspect)| due(suspect)) {
            (suspect.out, suspect.since) = (false, now);
            back.push(*ip);
        }
        back
    }

    fn retain(&mut self, keep: impl Fn(IpAddr) -> bool) {
        self.0.retain(|ip, _| keep(*ip));
    }

    fn any(&self) -> bool {
        self.0.values().any(|s| s.out)
    }

    fn out(&self) -> Vec<IpAddr> {
        self.0.iter().filter(|(_, s)| s.out).map(|(ip, _)| *ip).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flapping_target_is_held_longer_each_time() {
        let ip: IpAddr = "172.16.0.9".parse().unwrap();
        let mut suspects = Suspects::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let answers = |suspects: &mut Suspects, ms| {
            suspects.answer(ip);
            suspects.back(at(ms)) == [ip]
        };
        assert!(suspects.fail(ip, at(0)) && !suspects.fail(ip, at(1)), "fails once");
        assert!(!answers(&mut suspects, 999) && answers(&mut suspects, 1000), "out for a second");
        assert!(suspects.fail(ip, at(2000)));
        assert!(!answers(&mut suspects, 3900) && answers(&mut suspects, 4000), "out for two");
        assert!(suspects.fail(ip, at(70_000)));
        assert!(answers(&mut suspects, 71_000), "a minute of good conduct is rewarded");
        suspects.answer("172.16.0.10".parse().unwrap());
        assert!(suspects.back(at(71_000)).is_empty(), "who never failed cannot come back");
    }

    #[tokio::test(start_paused = true)]
    async fn one_answer_while_it_is_held_suffices_unless_it_fails_again() {
        let ip: IpAddr = "172.16.0.9".parse().unwrap();
        let mut suspects = Suspects::default();
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        suspects.fail(ip, at(0));
        assert_eq!(suspects.next(), None, "silent");
        suspects.answer(ip);
        assert_eq!((suspects.back(at(100)), suspects.next()), (vec![], Some(at(1000))));
        suspects.fail(ip, at(500));
        assert_eq!((suspects.back(at(1000)), suspects.next()), (vec![], None), "silent again");
        suspects.answer(ip);
        assert_eq!((suspects.back(at(1200)), suspects.next(), suspects.any()), (vec![ip], None, false));
    }

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

    #[test]
    fn an_address_stays_with_the_newest_interface_that_has_it() {
        let ours: BTreeMap<u32, (u32, bool)> = (1..5).map(|index| (index, (1500, true))).collect();
        let old = |addresses: &[(u32, &str, u32)]| -> Vec<u32> {
            let address = |&(index, net, since): &(u32, &str, u32)| Address {
                index,
                net: net.parse().unwrap(),
                global: true,
                tentative: false,
                since,
            };
            replaced(&addresses.iter().map(address).collect::<Vec<_>>(), &ours).into_iter().collect()
        };
        let (v4, v6) = ("172.31.0.1/24", "fd00::1/64");
        assert_eq!(old(&[(1, v4, 10), (1, v6, 10), (2, v4, 20), (2, v6, 20)]), [1]);
        assert_eq!(old(&[(1, v4, 20), (2, v4, 10), (1, v6, 20)]), [2], "in one family only");
        // The first one was down meanwhile, which cost it its IPv6 address: one of the two has to stay.
        assert_eq!(old(&[(1, v4, 10), (2, v4, 20), (1, v6, 30), (2, v6, 20)]), [2]);
        assert_eq!(
            old(&[(1, v4, 10), (2, v4, 10), (2, v6, 10), (1, v6, 10)]),
            [1],
            "in the same instant, whatever the order"
        );
        // What goes because of one takes nothing with it.
        assert_eq!(old(&[(1, v4, 10), (2, v4, 20), (2, v6, 20), (3, v6, 30)]), [2]);
        assert!(old(&[(1, v4, 10), (2, "172.31.1.1/24", 20), (9, v4, 30)]).is_empty(), "nobody else's counts");
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
}
