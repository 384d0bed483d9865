//! What needs the kernel's own stack takes its way by the rules and routes that the load balancer makes; gateways are reached by the
//! frontend's table alone, which the test fills.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};

use meridio_maglev::Reason;

use super::wire::{Datagram, Eyes, Seen, What};
use super::{PORT, Scene, VIPS, configuration, eventually, run};

/// Clients behind the gateway: only the frontend's table knows the way.
const CLIENTS: [&str; 2] = ["10.9.0.1", "fd99::1"];
/// The load balancer's addresses on the external network.
const ROUTER: [&str; 2] = ["10.0.0.1", "fd0a::1"];
/// An MTU that is smaller than that of the other links.
const SMALL: u16 = 1400;
/// Of a packet that does not fit it.
const BIG: usize = 1428;

/// Something in IPv4 or IPv6.
fn of(list: [&str; 2], v6: bool) -> IpAddr {
    list[v6 as usize].parse().unwrap()
}

fn vip(v6: bool) -> SocketAddr {
    (of(VIPS, v6), PORT).into()
}

/// A client nobody has been before.
fn client(v6: bool) -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    (of(CLIENTS, v6), NEXT.fetch_add(1, Ordering::Relaxed)).into()
}

/// One whose machine does not say that there is none when it is answered.
fn listening(scene: &Scene, v6: bool) -> UdpSocket {
    scene.netns("c").run_blocking(|| UdpSocket::bind(client(v6)).unwrap()).unwrap()
}

/// The frontend of the pod, and a client that is not on the external network itself.
fn gateways(scene: &Scene) {
    let (c, l) = (scene.name("c"), scene.name("l"));
    for (family, address, vip, via) in
        [("-4", "10.9.0.1/32", "20.0.0.1/32", "10.0.0.2"), ("-6", "fd99::1/128", "2000::1/128", "fd0a::2")]
    {
        run(&format!("ip -n {c} {family} addr add {address} dev lo"));
        run(&format!("ip -n {l} {family} rule add pref 100 from {vip} lookup 4096"));
        run(&format!("ip -n {l} {family} route add default via {via} dev ext-vlan0 table 4096"));
    }
}

/// What everybody sees.
struct Watched {
    client: Eyes,
    targets: [Eyes; 2],
    primary: Eyes,
}

impl Watched {
    fn new(scene: &mut Scene) -> Self {
        Watched { client: scene.eyes("c"), targets: [scene.eyes("t1"), scene.eyes("t2")], primary: scene.eyes("p") }
    }

    /// Waits for so many packets at one of the targets; none may get to the other one.
    fn arrive(&self, count: usize, which: impl Fn(&Seen) -> bool) -> (usize, Vec<Seen>) {
        let seen = || self.targets.each_ref().map(|target| target.see(&which));
        let sum = || seen().map(|seen| seen.len()).iter().sum::<usize>();
        eventually(|| sum() >= count, || format!("{} packets at the targets", sum()));
        let [first, second] = seen();
        assert!(first.is_empty() || second.is_empty(), "{first:?} {second:?}");
        if second.is_empty() { (1, first) } else { (2, second) }
    }

    /// Whatever has a VIP at one of its ends.
    fn strays(&self) -> Vec<Seen> {
        let vips = VIPS.map(|vip| vip.parse::<IpAddr>().unwrap());
        self.primary.see(|seen| vips.contains(&seen.to) || vips.contains(&seen.from))
    }
}

fn counted(scene: &Scene, reason: Reason) -> u64 {
    let reasons = scene.counters().unwrap().reasons;
    reasons.iter().find(|(known, _)| *known == reason).unwrap().1.packets
}

/// The one thing that a client is told about a packet of its own.
fn told(watched: &Watched, sent: &Datagram<'_>) -> Seen {
    let port = sent.from.port();
    let mut told = watched.client.wait(1, |seen| seen.tells_of(port));
    assert_eq!(told.len(), 1, "{told:?}");
    let seen = watched.targets.each_ref().map(|target| target.see(|seen| seen.has(port)));
    assert!(seen.iter().all(Vec::is_empty), "neither the packet nor the error gets to a target: {seen:?}");
    let told = told.remove(0);
    assert_eq!(told.to, sent.from.ip());
    told
}

fn ends_on_its_way(scene: &Scene, watched: &Watched, v6: bool) {
    let sent = Datagram { ttl: 1, ..Datagram::new(client(v6), vip(v6)) };
    let before = counted(scene, Reason::SlowTtl);
    scene.send("c", &sent);
    let told = told(watched, &sent);
    let What::Error { kind, .. } = told.what else { unreachable!() };
    let exceeded = if v6 { [3, 0] } else { [11, 0] };
    assert_eq!((kind, told.from), (exceeded, of(ROUTER, v6)), "time exceeded, as routers say it");
    assert_eq!(counted(scene, Reason::SlowTtl), before + 1);
}

fn is_too_big(scene: &Scene, watched: &Watched, v6: bool) {
    let sent = Datagram { size: BIG, ..Datagram::new(client(v6), vip(v6)) };
    let before = counted(scene, Reason::SlowMtu);
    scene.send("c", &sent);
    let told = told(watched, &sent);
    let What::Error { kind, mtu, .. } = told.what else { unreachable!() };
    let too_big = if v6 { [2, 0] } else { [3, 4] };
    assert_eq!((kind, mtu, told.from), (too_big, SMALL, of(VIPS, v6)), "packet too big, from the VIP");
    assert_eq!(counted(scene, Reason::SlowMtu), before + 1);
}

fn is_fragmented(scene: &Scene, watched: &Watched) {
    let client = listening(scene, false);
    let sent = Datagram { size: BIG, whole: false, ..Datagram::new(client.local_addr().unwrap(), vip(false)) };
    scene.send("c", &sent);
    let (_, seen) = watched.arrive(2, |seen| seen.from == sent.from.ip() && seen.id == sent.from.port());
    let first = (SMALL as usize - 20) & !7;
    let pieces: Vec<_> = seen.iter().map(|seen| (seen.fragment, seen.length)).collect();
    assert_eq!(pieces, [((0, true), first), ((first as u16, false), BIG - 20 - first)]);
    assert!(seen[0].has(sent.from.port()), "{seen:?}");
    answered(watched, &sent);
}

fn has_options(scene: &Scene, watched: &Watched, options: &[u8]) {
    let client = listening(scene, false);
    let sent = Datagram { options, ..Datagram::new(client.local_addr().unwrap(), vip(false)) };
    let before = counted(scene, Reason::SlowOptions);
    scene.send("c", &sent);
    let way_in = |seen: &Seen| seen.has(sent.from.port()) && seen.from == sent.from.ip();
    let (_, seen) = watched.arrive(1, way_in);
    assert_eq!((seen[0].options.as_slice(), seen[0].ttl, seen.len()), (options, 63, 1));
    assert_eq!(counted(scene, Reason::SlowOptions), before + 1);
    answered(watched, &sent);
}

/// The target has got the datagram, and its answer has got to the client.
fn answered(watched: &Watched, sent: &Datagram<'_>) {
    let what = What::Udp { from: PORT, to: sent.from.port() };
    watched.client.wait(1, |seen| seen.from == sent.to.ip() && seen.what == what);
}

#[test]
fn what_needs_the_kernels_own_stack_takes_the_way_by_its_rules() {
    let mut scene = Scene::with("slow", configuration(), |scene| {
        gateways(scene);
        for n in 1..=2 {
            run(&format!("ip -n {} link set nsm-{n} mtu {SMALL}", scene.name("l")));
        }
    });
    let watched = Watched::new(&mut scene);
    // In one process, and in another one that finds what the first has left.
    for life in 1..=2 {
        for v6 in [false, true] {
            ends_on_its_way(&scene, &watched, v6);
            is_too_big(&scene, &watched, v6);
        }
        // Flows of both targets.
        for _ in 0..8 {
            is_fragmented(&scene, &watched);
            // Router alert, and options that say nothing.
            for options in [[148, 4, 0, 0], [1, 1, 1, 1]] {
                has_options(&scene, &watched, &options);
            }
        }
        assert_eq!(watched.strays(), [], "process {life}");
        if life == 1 {
            scene.end();
            begin_again(&mut scene);
        }
    }
}

/// Another process finds what an earlier one has left, and is told everything.
fn begin_again(scene: &mut Scene) {
    scene.begin(configuration());
    assert_eq!(scene.shared.get().kept, Some(true), "adopted");
}

/// A reply that does not fit the external link, sent by the target that a flow belongs to.
fn reply(scene: &Scene, watched: &Watched, client: &UdpSocket) -> (usize, Datagram<'static>) {
    let from = client.local_addr().unwrap();
    let asked = Datagram::new(from, vip(from.is_ipv6()));
    scene.send("c", &asked);
    let (owner, _) = watched.arrive(1, |seen| seen.has(asked.from.port()) && seen.from == asked.from.ip());
    let reply = Datagram { size: BIG, ..Datagram::new(asked.to, asked.from) };
    // What it has learnt of earlier ones.
    let target = format!("t{owner}");
    for family in ["-4", "-6"] {
        run(&format!("ip -n {} {family} route flush cache", scene.name(&target)));
    }
    scene.send(&target, &reply);
    (owner, reply)
}

/// Errors about replies get to the targets that have sent these.
fn replies_that_are_too_big(scene: &Scene, watched: &Watched) {
    for v6 in [false, true] {
        let mut told = [0; 2];
        for _ in 0..64 {
            let client = listening(scene, v6);
            let (owner, reply) = reply(scene, watched, &client);
            let (at, seen) = watched.arrive(1, |seen| seen.tells_of(reply.to.port()));
            let What::Error { kind, mtu, about } = &seen[0].what else { unreachable!() };
            let too_big = if v6 { [2, 0] } else { [3, 4] };
            assert_eq!((at, seen.len(), *kind, *mtu), (owner, 1, too_big, SMALL), "{seen:?}");
            assert_eq!((seen[0].to, about.to), (reply.from.ip(), reply.to.ip()));
            told[owner - 1] += 1;
            if !told.contains(&0) {
                break;
            }
        }
        assert!(!told.contains(&0), "targets with flows: {told:?}");
    }
}

#[test]
fn errors_about_replies_reach_the_target_that_sent_them() {
    let mut scene = Scene::with("reply", configuration(), |scene| {
        gateways(scene);
        run(&format!("ip -n {} link set ext-vlan0 mtu {SMALL}", scene.name("l")));
    });
    let watched = Watched::new(&mut scene);
    replies_that_are_too_big(&scene, &watched);
    for _ in 0..2 {
        scene.end();
        // Without the process there is no detour; even then no VIP's packet takes the default route.
        let clients = [false, true].map(|v6| listening(&scene, v6));
        let lost = clients.each_ref().map(|client| reply(&scene, &watched, client).1.to.port());
        begin_again(&mut scene);
        replies_that_are_too_big(&scene, &watched);
        for port in lost {
            let errors = watched.targets.iter().map(|target| target.see(|seen| seen.tells_of(port)).len());
            assert_eq!((errors.sum::<usize>(), watched.strays()), (0, vec![]));
        }
    }
}
