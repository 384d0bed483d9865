use super::*;

const BOTH: Families = Families { v4: true, v6: true };

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn balancer(addresses: &[&str], interface: &str) -> Balancer {
    Balancer {
        addresses: addresses.iter().map(|text| ip(text)).collect(),
        interface: Some(interface.to_owned()),
        registered: true,
        up: true,
    }
}

fn two() -> (Inputs, BTreeSet<String>) {
    let mut inputs =
        Inputs { vips: Some(["20.0.0.1/32", "2000::1/128"].map(|v| v.parse().unwrap()).into()), ..Inputs::default() };
    inputs.balancers.insert("lb-1".into(), balancer(&["172.16.0.4", "fd00::4"], "if-1"));
    inputs.balancers.insert("lb-2".into(), balancer(&["172.16.0.6", "fd00::6"], "if-2"));
    (inputs, ["if-1", "if-2"].map(String::from).into())
}

fn hops(inputs: &Inputs, links: &BTreeSet<String>) -> Vec<IpAddr> {
    next_hops(inputs, links, false).into_iter().collect()
}

#[test]
fn all_load_balancers_that_are_well_are_next_hops() {
    let (inputs, links) = two();
    assert_eq!(hops(&inputs, &links), [ip("172.16.0.4"), ip("172.16.0.6")]);
    assert_eq!(next_hops(&inputs, &links, true), [ip("fd00::4"), ip("fd00::6")].into());
}

#[test]
fn a_load_balancer_goes_when_unregistered_down_silent_or_without_link() {
    let (well, links) = two();
    let faults: [fn(&mut Inputs, &mut BTreeSet<String>); 4] = [
        |inputs, _| inputs.balancers.get_mut("lb-2").unwrap().registered = false,
        |inputs, _| inputs.balancers.get_mut("lb-2").unwrap().up = false,
        |inputs, _| _ = inputs.silent.insert(ip("172.16.0.6")),
        |_, links| _ = links.remove("if-2"),
    ];
    for fault in faults {
        let (mut inputs, mut links) = (well.clone(), links.clone());
        fault(&mut inputs, &mut links);
        assert_eq!(hops(&inputs, &links), [ip("172.16.0.4")]);
    }
}

#[test]
fn control_plane_loss_alone_never_takes_the_last_one() {
    let (mut inputs, mut links) = two();
    for balancer in inputs.balancers.values_mut() {
        (balancer.registered, balancer.up) = (false, false);
    }
    assert_eq!(hops(&inputs, &links).len(), 2);
    inputs.silent.insert(ip("172.16.0.4"));
    assert_eq!(hops(&inputs, &links), [ip("172.16.0.6")]);
    inputs.silent.insert(ip("172.16.0.6"));
    assert_eq!(hops(&inputs, &links).len(), 2, "probes that all fail are not believed");
    links.clear();
    assert!(hops(&inputs, &links).is_empty());
}

#[test]
fn next_hops_found_at_start_serve_until_all_are_known() {
    let (full, links) = two();
    let mut inputs = Inputs { inherited: [ip("172.16.0.4"), ip("172.16.0.6")].into(), ..Inputs::default() };
    assert_eq!(hops(&inputs, &links).len(), 2);
    inputs.silent.insert(ip("172.16.0.6"));
    assert_eq!(hops(&inputs, &links), [ip("172.16.0.4")]);
    inputs.silent.clear();
    inputs.judge(ip("172.16.0.4"), true);
    inputs.balancers = full.balancers.clone();
    inputs.balancers.get_mut("lb-1").unwrap().interface = None;
    inputs.balancers.get_mut("lb-1").unwrap().addresses.clear();
    assert_eq!(hops(&inputs, &links).len(), 2, "lb-2 has a name, and has not answered yet");
    inputs.judge(ip("172.16.0.6"), true);
    assert!(!inputs.all_connected());
    assert_eq!(hops(&inputs, &links).len(), 2, "the other one answers as well, and may be connected to any moment");
    inputs.settled = true;
    assert_eq!(hops(&inputs, &links), [ip("172.16.0.6")], "nobody has vouched for it");
    inputs.settled = false;
    inputs.answering.remove(&ip("172.16.0.4"));
    assert_eq!(hops(&inputs, &links), [ip("172.16.0.6")], "it does not answer");
    inputs.balancers = full.balancers;
    assert!(inputs.all_connected() && !Inputs::default().all_connected());
}

#[test]
fn silence_alone_takes_nothing_that_was_found_at_start() {
    let (full, links) = two();
    let all = ["172.16.0.4", "172.16.0.6", "fd00::4", "fd00::6"].map(ip);
    let mut inputs = Inputs { inherited: all.into(), ..Inputs::default() };
    all.iter().for_each(|address| inputs.judge(*address, false));
    assert_eq!(hops(&inputs, &links).len(), 2, "a proxy that has just begun may hear nothing");
    assert_eq!(inputs.probed(), all.into(), "and goes on asking");
    // One comes back by name, and answers over IPv4.
    inputs.balancers.insert("lb-2".into(), full.balancers["lb-2"].clone());
    inputs.outgrow();
    assert_eq!(inputs.inherited, ["172.16.0.4", "fd00::4"].map(ip).into());
    inputs.judge(ip("172.16.0.6"), true);
    assert_eq!(inputs.inherited, [ip("fd00::4")].into(), "what is silent beside it is dead");
    assert_eq!(hops(&inputs, &links), [ip("172.16.0.6")]);
    assert_eq!(next_hops(&inputs, &links, true), [ip("fd00::4"), ip("fd00::6")].into());
}

#[test]
fn plan_of_a_fresh_start_then_nothing() {
    let (inputs, links) = two();
    let wanted = desired(&inputs, BOTH, 7, &links);
    let todo = plan(&wanted, &[], &[]);
    assert_eq!((todo.replace_routes.len(), todo.add_rules.len()), (4, 2));
    assert!(todo.replace_routes.iter().any(|route| route.kind == RouteKind::Blackhole));
    let done = plan(&wanted, wanted.rules.as_ref().unwrap(), &wanted.routes);
    assert!(done.is_empty(), "{done:?}");
}

#[test]
fn unknown_vips_leave_the_rules_alone() {
    let (mut inputs, links) = two();
    let before = desired(&inputs, BOTH, 7, &links);
    inputs.vips = None;
    let todo = plan(&desired(&inputs, BOTH, 7, &links), before.rules.as_ref().unwrap(), &before.routes);
    assert!(todo.is_empty(), "{todo:?}");
    inputs.vips = Some(["20.0.0.1/32".parse().unwrap()].into());
    let todo = plan(&desired(&inputs, BOTH, 7, &links), before.rules.as_ref().unwrap(), &before.routes);
    assert_eq!((todo.delete_rules.len(), todo.add_rules.len()), (1, 0));
}

#[test]
fn the_last_next_hop_leaves_a_blackhole() {
    let (mut inputs, links) = two();
    let before = desired(&inputs, BOTH, 7, &links);
    inputs.balancers.clear();
    let after = desired(&inputs, BOTH, 7, &links);
    assert!(after.routes.iter().all(|route| route.kind == RouteKind::Blackhole));
    let todo = plan(&after, before.rules.as_ref().unwrap(), &before.routes);
    assert_eq!(todo.delete_routes.len(), 2);
    assert_eq!(inherited(&before.routes).len(), 4);
}

#[test]
fn a_rule_for_every_address_is_known_again_and_somebody_elses_left_alone() {
    let (mut inputs, links) = two();
    let every = ["0.0.0.0/0", "::/0"].map(|text| text.parse().unwrap());
    inputs.vips = Some(every.into());
    let wanted = desired(&inputs, BOTH, 7, &links);
    // As the kernel tells them.
    let mut told = wanted.rules.clone().unwrap();
    told.iter_mut().for_each(|rule| rule.from = None);
    let todo = plan(&wanted, &told, &wanted.routes);
    assert!(todo.is_empty(), "{todo:?}");
    inputs.vips = Some(BTreeSet::new());
    told.push(Rule { mark: Some(1), ..told[0].clone() });
    let todo = plan(&desired(&inputs, BOTH, 7, &links), &told, &wanted.routes);
    assert_eq!(todo.delete_rules, wanted.rules.unwrap());
    assert!(todo.add_rules.is_empty());
}
