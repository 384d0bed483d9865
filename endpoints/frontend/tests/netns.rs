//! The frontend with real BIRDs and real routes, in namespaces of its own. Needs root and bird2.

mod support;

use std::time::{Duration, Instant};

use meridio_frontend::gateway::Family;
use meridio_proto::nsp::v1 as nsp;
use rustix::process::Signal;
use support::{Echo, Frontend, Net, attractor, gateway, in_ns, ip, wait};

fn dual() -> nsp::Attractor {
    attractor(vec![gateway("gw-v4", "169.254.100.150", "bgp"), gateway("gw-v6", "100:100::150", "bgp")])
}

fn up(net: &mut Net, more: &[&str]) -> Frontend {
    net.start_gateway("");
    let frontend = Frontend::start(net, more);
    frontend.attractor.send_replace(Some(dual()));
    frontend.forwarding.send_replace(Some(true));
    let took = wait("connectivity", || frontend.connected() == Some(true));
    wait("announcement", || net.learnt("20.0.0.1/32") && net.learnt("2000::1/128"));
    println!("connected after {took:?}");
    frontend
}

#[test]
fn attracts_and_withdraws() {
    let mut net = Net::new(true);
    let frontend = up(&mut net, &["--ecmp"]);
    for family in ["-4", "-6"] {
        let routes = net.routes(family);
        assert!(routes.contains("proto bird metric 32") && routes.contains("metric 1000000"), "{routes}");
        assert!(ip(&format!("-n {} {family} route show table 4097", net.fe)).contains("blackhole default"));
        let rules = ip(&format!("-n {} {family} rule", net.fe));
        assert!(rules.contains("100:") && rules.contains("lookup 4096") && rules.contains("101:"), "{rules}");
    }
    // The load balancer stops forwarding: withdrawn, but VIPs still have their way out.
    frontend.forwarding.send_replace(Some(false));
    let took = wait("withdrawal", || !net.learnt("20.0.0.1/32") && !net.learnt("2000::1/128"));
    println!("withdrawn after {took:?}");
    assert_eq!(frontend.connected(), Some(true));
    frontend.forwarding.send_replace(Some(true));
    let took = wait("announcement", || net.learnt("20.0.0.1/32") && net.learnt("2000::1/128"));
    println!("announced after {took:?}");
    // A VIP leaves.
    let mut one = dual();
    one.vips.truncate(1);
    frontend.attractor.send_replace(Some(one));
    wait("one VIP", || net.learnt("20.0.0.1/32") && !net.learnt("2000::1/128"));
    wait("its rules", || !ip(&format!("-n {} -6 rule", net.fe)).contains("2000::1"));
    // In order: withdrawn and BIRD ended, while VIP traffic keeps away from the primary network.
    frontend.stop();
    wait("the end of BIRD", || net.bird_pid().is_none());
    wait("withdrawal", || !net.learnt("20.0.0.1/32"));
    assert!(ip(&format!("-n {} rule", net.fe)).contains("lookup 4097"));
}

#[test]
fn bird_and_frontend_may_die_without_a_lost_packet() {
    let mut net = Net::new(true);
    let frontend = up(&mut net, &[]);
    let echoes = || [Echo::start(&net, "20.0.0.1", "169.254.100.150"), Echo::start(&net, "2000::1", "100:100::150")];
    let finish = |what: &str, running: [Echo; 2]| {
        for echo in running {
            let (sent, lost) = echo.finish();
            println!("{what}: {lost} of {sent} lost");
            assert!(sent > 500 && lost == 0, "{what}: {lost} of {sent} lost");
        }
    };
    std::thread::sleep(Duration::from_millis(200));

    let mut judged = frontend.report.clone();
    judged.mark_unchanged();
    let running = echoes();
    let before = net.bird_pid().expect("BIRD");
    net.kill_bird();
    wait("another BIRD", || net.bird_pid().is_some_and(|pid| pid != before));
    let took = wait("announcement", || net.learnt("20.0.0.1/32") && net.learnt("2000::1/128"));
    wait("BIRD's routes", || net.routes("-4").contains("proto bird") && net.routes("-6").contains("proto bird"));
    std::thread::sleep(Duration::from_millis(300));
    println!("BIRD killed: announced again after {took:?}");
    finish("BIRD killed", running);
    assert_eq!(frontend.connected(), Some(true));

    let running = echoes();
    let before = net.bird_pid();
    frontend.crash();
    std::thread::sleep(Duration::from_millis(300));
    assert!(net.learnt("20.0.0.1/32"), "BIRD goes on without the frontend");
    let frontend = Frontend::start(&net, &[]);
    wait("a look", || !frontend.report.borrow().waits.is_empty());
    // The NSP and the load balancer are still away: nothing is known, nothing changes.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((frontend.connected(), frontend.advertised(), net.bird_pid()), (None, true, before));
    frontend.attractor.send_replace(Some(dual()));
    wait("connectivity", || frontend.connected() == Some(true));
    assert!(frontend.advertised() && net.learnt("2000::1/128"));
    finish("frontend killed", running);
    assert_eq!(net.bird_pid(), before, "adopted, not restarted");

    // Both at once.
    let running = echoes();
    net.kill_bird();
    frontend.crash();
    let frontend = Frontend::start(&net, &[]);
    frontend.attractor.send_replace(Some(dual()));
    frontend.forwarding.send_replace(Some(true));
    wait("connectivity", || frontend.connected() == Some(true));
    wait("announcement", || net.learnt("20.0.0.1/32") && net.learnt("2000::1/128"));
    finish("both killed", running);
    frontend.stop();
}

#[test]
fn what_breaks_is_noticed_at_once() {
    let mut net = Net::new(true);
    let frontend = up(&mut net, &[]);
    std::thread::sleep(Duration::from_millis(200));

    // The cable: the gateway's end goes down, ours loses carrier.
    ip(&format!("-n {} link set ext-gw down", net.gw));
    let took = wait("loss of the link", || frontend.connected() == Some(false));
    println!("link cut: noticed after {took:?}");
    assert!(took < Duration::from_millis(100), "{took:?}");
    wait("the copy's end", || !net.routes("-4").contains("default") && !net.routes("-6").contains("default"));
    ip(&format!("-n {} link set ext-gw up", net.gw));
    ip(&format!("-n {} addr replace 100:100::150/64 dev ext-gw nodad", net.gw));
    let took = wait("return of the link", || frontend.connected() == Some(true));
    println!("link back: connected after {took:?}");
    wait("announcement", || net.learnt("20.0.0.1/32"));
    std::thread::sleep(Duration::from_millis(500));

    // The gateway stands still: BFD.
    net.signal_gateway(Signal::STOP);
    let took = wait("loss of the gateway", || frontend.connected() == Some(false));
    println!("gateway frozen: noticed after {took:?}");
    assert!(took < Duration::from_millis(300), "{took:?}");
    wait("the copy's end", || !net.routes("-4").contains("default"));
    net.signal_gateway(Signal::CONT);
    wait("return of the gateway", || frontend.connected() == Some(true));
    wait("announcement", || net.learnt("20.0.0.1/32"));

    // A faulty configuration changes nothing and is named.
    let mut faulty = dual();
    faulty.vips[0].address = "20.0.0.1".into();
    frontend.attractor.send_replace(Some(faulty));
    wait("the fault's name", || frontend.report.borrow().waits.iter().any(|line| line.contains("vip \"vip-a\"")));
    assert!(frontend.connected() == Some(true) && net.learnt("20.0.0.1/32"));
    frontend.stop();
}

#[test]
fn a_configuration_that_bird_refuses_changes_nothing_and_withdrawing_still_works() {
    let mut net = Net::new(true);
    let frontend = up(&mut net, &[]);
    let mut refused = dual();
    // Its protocol would have the name of another one.
    refused.gateways.push(gateway("BFD", "169.254.100.151", "bgp"));
    refused.vips.remove(1);
    frontend.attractor.send_replace(Some(refused));
    wait("BIRD's word", || frontend.report.borrow().waits.iter().any(|line| line.contains("BIRD refuses")));
    assert!(frontend.connected() == Some(true) && net.learnt("2000::1/128"));
    assert!(ip(&format!("-n {} -6 rule", net.fe)).contains("2000::1"), "the kernel has what BIRD has");
    frontend.forwarding.send_replace(Some(false));
    wait("withdrawal", || !net.learnt("20.0.0.1/32") && !net.learnt("2000::1/128"));
    assert!(frontend.report.borrow().waits.iter().any(|line| line.contains("BIRD refuses")));
    frontend.forwarding.send_replace(Some(true));
    wait("announcement", || net.learnt("20.0.0.1/32") && net.learnt("2000::1/128"));
    frontend.attractor.send_replace(Some(dual()));
    wait("no fault", || frontend.report.borrow().waits.is_empty());
    frontend.stop();
}

#[test]
fn a_family_without_its_gateway_is_withdrawn_and_the_other_stays() {
    let mut net = Net::new(true);
    let frontend = up(&mut net, &[]);
    std::thread::sleep(Duration::from_millis(200));
    // The gateway's IPv6 address goes, and its session with it.
    ip(&format!("-n {} addr del 100:100::150/64 dev ext-gw", net.gw));
    let took = wait("loss of IPv6", || frontend.connected() == Some(false));
    println!("IPv6 lost: noticed after {took:?}");
    wait("withdrawal", || !net.learnt("2000::1/128"));
    for _ in 0..50 {
        assert!(net.learnt("20.0.0.1/32"), "IPv4 has its gateway");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(frontend.report.borrow().advertised, [Family::V4].into());
    ip(&format!("-n {} addr replace 100:100::150/64 dev ext-gw nodad", net.gw));
    wait("announcement", || net.learnt("20.0.0.1/32") && net.learnt("2000::1/128"));
    wait("connectivity", || frontend.connected() == Some(true));
    frontend.stop();
}

#[test]
fn a_pod_without_ipv4_and_a_static_gateway() {
    let mut net = Net::new(false);
    net.start_gateway("");
    let frontend = Frontend::start(&net, &[]);
    frontend.attractor.send_replace(Some(attractor(vec![gateway("gw-v6", "100:100::150", "bgp")])));
    frontend.forwarding.send_replace(Some(true));
    wait("connectivity", || frontend.connected() == Some(true));
    wait("announcement", || net.learnt("2000::1/128"));
    frontend.stop();

    let mut net = Net::new(true);
    net.start_gateway("");
    let frontend = Frontend::start(&net, &[]);
    frontend.attractor.send_replace(Some(attractor(vec![gateway("gw-s", "169.254.100.150", "static")])));
    wait("connectivity", || frontend.connected() == Some(true));
    wait("its route", || net.routes("-4").contains("proto bird"));
    std::thread::sleep(Duration::from_millis(300));
    net.signal_gateway(Signal::STOP);
    let took = wait("loss of the gateway", || frontend.connected() == Some(false));
    println!("static gateway frozen: noticed after {took:?}");
    frontend.stop();
}

#[test]
fn a_session_with_a_password() {
    let mut net = Net::new(true);
    net.start_gateway("password \"s3cret\";");
    let frontend = Frontend::start(&net, &[]);
    let mut with_auth = gateway("gw-v4", "169.254.100.150", "bgp");
    with_auth.bgp_auth = Some(nsp::gateway::BgpAuth { key_name: "gw".into(), key_source: "bgp".into() });
    frontend.attractor.send_replace(Some(attractor(vec![with_auth])));
    wait("the missing password", || frontend.report.borrow().waits.iter().any(|line| line.contains("password file")));
    std::fs::create_dir_all(net.path("secrets/bgp")).expect("secret");
    std::fs::write(net.path("secrets/bgp/gw"), "s3cret").expect("key");
    wait("connectivity", || frontend.connected() == Some(true));
    wait("no fault", || frontend.report.borrow().waits.iter().all(|line| !line.contains("password file")));
    std::fs::remove_file(net.path("secrets/bgp/gw")).expect("removal");
    wait("the missing file", || frontend.report.borrow().waits.iter().any(|line| line.contains("its last password")));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(frontend.connected(), Some(true), "the session goes on");
    frontend.stop();
}

#[test]
fn what_is_decided_while_bird_stands_still_reaches_it_afterwards() {
    let mut net = Net::new(true);
    let frontend = up(&mut net, &[]);
    let pid = net.bird_pid().expect("BIRD");
    assert!(net.bird_announces());
    rustix::process::kill_process(pid, Signal::STOP).expect("stop");
    wait("the missing answer", || frontend.report.borrow().waits.iter().any(|line| line == "BIRD does not answer"));
    frontend.forwarding.send_replace(Some(false));
    wait("the decision", || !frontend.advertised());
    rustix::process::kill_process(pid, Signal::CONT).expect("continue");
    wait("withdrawal", || !net.bird_announces());
    assert_eq!(net.bird_pid(), Some(pid), "the BIRD of before");
    frontend.forwarding.send_replace(Some(true));
    wait("announcement", || net.learnt("20.0.0.1/32") && net.learnt("2000::1/128"));
    frontend.stop();
}

#[test]
fn a_hung_bird_is_replaced_and_a_missing_one_named() {
    let mut net = Net::new(true);
    let frontend = up(&mut net, &[]);
    let pid = net.bird_pid().expect("BIRD");
    rustix::process::kill_process(pid, Signal::STOP).expect("stop");
    let start = Instant::now();
    // Asking a hung BIRD for its number would block, once its backlog is full.
    let old = format!("/proc/{}/exe", pid.as_raw_nonzero());
    wait("the end of the hung BIRD", || std::fs::read_link(&old).is_err());
    wait("another BIRD", || net.bird_pid().is_some_and(|now| now != pid));
    println!("hung BIRD replaced after {:?}", start.elapsed());
    frontend.stop();

    let error = in_ns(&net.fe, || {
        let paths = meridio_frontend::bird::process::Paths {
            binary: "/nowhere/bird".into(),
            config_dir: "/tmp".into(),
            socket: "/tmp/no.ctl".into(),
            log_bird: false,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(paths.version()).expect_err("no BIRD").to_string()
    });
    let error = error.join().expect("thread");
    assert!(error.contains("/nowhere/bird") && error.contains("install bird2"), "{error}");
}
