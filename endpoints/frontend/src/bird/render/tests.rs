//! Golden files: `UPDATE_GOLDEN=1 cargo test -p meridio-frontend` writes them anew. BIRD itself reads each of them.

use std::path::Path;

use super::*;
use crate::gateway::AuthRef;

fn base() -> Base {
    Base {
        interface: "ext-vlan0".into(),
        router_id: Ipv4Addr::new(169, 254, 100, 2),
        table: 4096,
        kernel_scan: 10,
        ecmp: true,
        log_file: Some(("/var/log/bird.log".into(), 20_000)),
        log_all: false,
        hold_time: 3,
        local_as: 8103,
        remote_as: 4_248_829_953,
        local_port: 10_179,
        remote_port: 10_179,
        vrrps: vec![],
    }
}

fn bgp(name: &str, address: &str) -> Gateway {
    let bgp = Bgp { remote_asn: 0, local_asn: 0, remote_port: 0, local_port: 0, hold_time: 0, auth: None };
    Gateway {
        name: name.into(),
        address: address.parse().expect("address"),
        protocol: Protocol::Bgp(bgp),
        bfd: Some(Bfd { min_tx: 50, min_rx: 50, multiplier: 3 }),
    }
}

fn fixed(name: &str, address: &str, bfd: Option<Bfd>) -> Gateway {
    Gateway { protocol: Protocol::Static, bfd, ..bgp(name, address) }
}

fn check(name: &str, base: &Base, attraction: &Attraction, passwords: &[Password], advertise: &[Family]) -> String {
    let advertise = advertise.iter().copied().collect();
    let text = render(base, &Inputs { attraction, passwords, advertise: &advertise });
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, &text).expect("write golden file");
    }
    assert_eq!(text, std::fs::read_to_string(&golden).expect("golden file"), "{name}");
    let bird = std::process::Command::new("bird").args(["-p", "-c"]).arg(&golden).output();
    if let Ok(bird) = bird {
        assert!(bird.status.success(), "{name}: {}", String::from_utf8_lossy(&bird.stderr));
    }
    text
}

fn dual() -> Attraction {
    Attraction {
        vips: vec!["20.0.0.1/32".parse().expect("vip"), "2000::1/128".parse().expect("vip")],
        gateways: vec![bgp("gateway-v4-a", "169.254.100.150"), bgp("gateway-v6-a", "100:100::150")],
    }
}

#[test]
fn at_first_there_is_nothing_to_attract() {
    check("initial.conf", &base(), &Attraction::default(), &[], &[]);
}

#[test]
fn dual_stack_announces_only_when_told() {
    let passwords = [Password::None, Password::None];
    let on = check("dual-on.conf", &base(), &dual(), &passwords, &Family::BOTH);
    let off = check("dual-off.conf", &base(), &dual(), &passwords, &[]);
    assert!(on.contains("VIP4") && on.contains("VIP6"));
    assert!(!off.contains("VIP4") && !off.contains("VIP6"));
    assert!(off.contains("export filter cluster_breakout"), "egress does not depend on announcing");
}

#[test]
fn one_family_is_announced_without_the_other() {
    for (family, has, lacks) in [(Family::V4, "VIP4", "VIP6"), (Family::V6, "VIP6", "VIP4")] {
        let passwords = [Password::None, Password::None];
        let inputs = Inputs { attraction: &dual(), passwords: &passwords, advertise: &[family].into() };
        let text = render(&base(), &inputs);
        assert!(text.contains(has) && !text.contains(lacks), "{text}");
    }
}

#[test]
fn own_numbers_static_routes_and_passwords() {
    let mut attraction = dual();
    if let Protocol::Bgp(bgp) = &mut attraction.gateways[0].protocol {
        *bgp = Bgp {
            remote_asn: 65_001,
            local_asn: 65_002,
            remote_port: 179,
            local_port: 1179,
            hold_time: 24,
            auth: Some(AuthRef { source: "bgp".into(), key: "a".into() }),
        };
    }
    attraction.gateways.push(fixed("s1", "169.254.100.151", Some(Bfd { min_tx: 200, min_rx: 300, multiplier: 5 })));
    attraction.gateways.push(fixed("s2.with.dots", "100:100::151", None));
    let passwords = [Password::Known("pass word".into()), Password::Missing, Password::None, Password::None];
    let text = check(
        "mixed.conf",
        &Base { ecmp: false, log_file: None, log_all: true, ..base() },
        &attraction,
        &passwords,
        &Family::BOTH,
    );
    assert!(!text.contains("neighbor 100:100::150"), "no session without its password");
    assert!(!masked(&text).contains("pass word"));
}

#[test]
fn the_whole_has_what_waits_too() {
    let mut attraction = dual();
    if let Protocol::Bgp(bgp) = &mut attraction.gateways[1].protocol {
        bgp.auth = Some(AuthRef { source: "bgp".into(), key: "a".into() });
    }
    let text = render_whole(&base(), &attraction);
    for part in ["VIP4", "VIP6", "neighbor 169.254.100.150", "neighbor 100:100::150", "password"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(text.matches("password").count(), 1, "only where one is wanted");
}

#[test]
fn vrrp_next_hops_replace_what_gateways_tell() {
    let vrrps = vec!["169.254.100.1".parse().expect("ip"), "100:100::1".parse().expect("ip")];
    check("vrrp.conf", &Base { vrrps, ..base() }, &dual(), &[Password::None, Password::None], &Family::BOTH);
}

#[test]
fn router_ids_differ_and_are_never_zero() {
    assert_ne!(router_id_of("lb-1"), router_id_of("lb-2"));
    assert_eq!(router_id_of("lb-1"), router_id_of("lb-1"));
    assert_ne!(router_id_of(""), Ipv4Addr::UNSPECIFIED);
}
