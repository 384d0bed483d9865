//! The ConfigMap layout of the original: read, refused with every fault named, written, and turned into messages.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test states what it expects by unwrapping it")]

use meridio_model::{Configuration, GatewayProtocol, plan};

/// The fixture of the original's end-to-end tests, as its operator writes it.
const FIXTURE: &str = include_str!("fixture.yaml");

fn faults(text: &str) -> Vec<String> {
    Configuration::parse(text).unwrap_err().lines()
}

/// The fixture with one text replaced.
fn broken(from: &str, to: &str) -> Vec<String> {
    assert!(FIXTURE.contains(from), "{from}");
    faults(&FIXTURE.replacen(from, to, 1))
}

#[test]
fn the_fixture_is_read() {
    let configuration = Configuration::parse(FIXTURE).unwrap();
    assert_eq!(configuration.trench.name, "trench-a");
    assert_eq!(configuration.flows[0].destination_ports[0].to_string(), "4000");
    assert_eq!(configuration.flows[0].byte_matches[0].value, 4002);
    let GatewayProtocol::Bgp { remote_asn, hold_time, .. } = configuration.gateways[0].protocol else { panic!("bgp") };
    assert_eq!((remote_asn, hold_time), (4_248_829_953, 24));
    assert_eq!(configuration.gateways[1].protocol, GatewayProtocol::Static);
    assert_eq!(configuration.validate(), []);
    let lists = configuration.to_nsp();
    let flow = &lists.flows[0];
    assert_eq!(flow.stream.as_ref().unwrap().conduit.as_ref().unwrap().trench.as_ref().unwrap().name, "trench-a");
    assert_eq!(flow.vips.len(), 2);
    assert_eq!(lists.attractors[0].gateways.len(), 2);
    assert_eq!(lists.gateways[0].bfd_spec.unwrap().min_tx, 300);
    assert_eq!(meridio_model::Flow::from_nsp(flow).unwrap(), configuration.flows[0]);
    assert_eq!(meridio_model::Conduit::from_nsp(&lists.conduits[0]).unwrap(), configuration.conduits[0]);
}

#[test]
fn what_is_written_is_read_again() {
    let configuration = Configuration::parse(FIXTURE).unwrap();
    let text = configuration.to_config_map("default");
    assert_eq!(Configuration::parse(&text).unwrap(), configuration);
    // The seven keys without the document around them, as texts.
    let bare = serde_yaml_ng::to_string(&configuration.to_data()).unwrap();
    assert_eq!(Configuration::parse(&bare).unwrap(), configuration);
    assert_eq!(
        configuration.to_data()["streams"],
        "items:\n- name: stream-a-i\n  conduit: conduit-a-1\n  max-targets: 100\n- name: stream-a-ii\n  conduit: conduit-a-1\n  max-targets: 100\n"
    );
    assert!(configuration.to_data()["gateways"].starts_with(
        "items:\n- name: gateway-v4-a-1\n  address: 169.254.100.150\n  remote-asn: 4248829953\n  local-asn: 8103\n  remote-port: 10179\n  \
         local-port: 10179\n  ip-family: ipv4\n  bfd: true\n  protocol: bgp\n  hold-time: 24\n  min-tx: 300\n  min-rx: 300\n  multiplier: 5\n  \
         trench: trench-a\n"
    ));
}

#[test]
fn one_line_for_each_fault() {
    for (from, to, line) in [
        (
            "20.0.0.1/32",
            "20.0.0.1",
            "vip vip-a-1-v4: address \"20.0.0.1\" is not a CIDR (address/prefix length, e.g. 20.0.0.1/32)",
        ),
        (
            "20.0.0.1/32",
            "20.0.0.1/24",
            "vip vip-a-1-v4: address \"20.0.0.1/24\" has host bits set, did you mean 20.0.0.0/24?",
        ),
        (
            "priority: 1",
            "priority: -1",
            "flow flow-a-z-tcp: priority has to be a number from 0 to 2147483647, it is -1",
        ),
        (
            "priority: 1",
            "prio: 1\n      priority: 1",
            "flow flow-a-z-tcp: unknown field \"prio\" (key \"flows\", item 1)",
        ),
        (
            "- 4000\n",
            "- 4000-3000\n",
            "flow flow-a-z-tcp: destination-port-ranges: port range 4000-3000: the first port is larger than the last",
        ),
        (
            "- 4000\n",
            "- 4000\n      - 3999-4001\n",
            "flow flow-a-z-tcp: destination-port-ranges overlap: 4000 and 3999-4001",
        ),
        (
            "tcp[2:2] = 4002",
            "tcp[2:3] = 4002",
            "flow flow-a-z-tcp: byte-matches: byte match \"tcp[2:3] = 4002\" is not <tcp|udp|sctp>[<offset>:<1|2|4>] [& 0x<mask>] = <value>",
        ),
        (
            "max-targets: 100",
            "max-targets: 10001",
            "stream stream-a-i: max-targets has to be a number from 1 to 10000, it is 10001",
        ),
        ("name: trench-a\\n", "nam: trench-a\\n", "trench (key \"trench\"): name is missing"),
        (
            "hold-time: 24",
            "hold-time: 2",
            "gateway gateway-v4-a-1: hold-time has to be a number from 3 to 65535, it is 2",
        ),
        (
            "address: 169.254.100.150",
            "address: 169.254.100.150/24",
            "gateway gateway-v4-a-1: address \"169.254.100.150/24\" is not an IPv4 or IPv6 address (without prefix length)",
        ),
        (
            "ip-family: ipv4",
            "ip-family: ipv6",
            "gateway gateway-v4-a-1: ip-family \"ipv6\" does not fit the address, which is ipv4",
        ),
        (
            "protocol: static",
            "protocol: static\n      local-asn: 5",
            "gateway gateway-v6-a-1: local-asn must not be set when protocol is static",
        ),
        (
            "name: stream-a-ii",
            "name: Stream_A",
            "stream Stream_A: name \"Stream_A\" is not a valid name (lower-case letters, digits, '-' and '.', at most 253)",
        ),
        ("name: stream-a-ii", "name: stream-a-i", "stream stream-a-i: the name is used by more than one stream"),
        (
            "target-port: 4000",
            "target-port: 0",
            "conduit conduit-a-1, destination-port-nats[0]: target-port has to be a number from 1 to 65535, it is 0",
        ),
        (
            "  vips: |",
            "  vip: |",
            "configuration: unknown key \"vip\" (known: trench, conduits, streams, flows, vips, attractors, gateways)",
        ),
    ] {
        let lines = broken(from, to);
        assert!(lines.contains(&line.to_owned()), "{line}\n{lines:#?}");
    }
}

#[test]
fn one_fault_is_one_line() {
    assert_eq!(broken("20.0.0.1/32", "20.0.0.1").len(), 1);
    assert_eq!(broken("protocol: bgp", "protocol: ospf").len(), 1);
    assert_eq!(broken("      stream: stream-a-i\n", "").len(), 1);
    assert_eq!(broken("priority: 1", "priority: one").len(), 1);
}

#[test]
fn all_faults_at_once() {
    let text = FIXTURE
        .replace("20.0.0.1/32", "20.0.0.1")
        .replace("stream: stream-a-ii", "streams: stream-a-ii")
        .replacen("max-targets: 100", "max-targets: 0", 1);
    let lines = faults(&text);
    assert_eq!(lines.len(), 4, "{lines:#?}");
}

#[test]
fn colliding_port_nats() {
    let nats = |second: &str| {
        broken(
            "protocol: tcp\n        vips:",
            &format!("protocol: tcp\n        vips: [vip-a-1-v4]\n      - {second}\n        vips:"),
        )
    };
    let same = nats("port: 80\n        target-port: 4000\n        protocol: tcp");
    assert_eq!(
        same,
        ["conduit conduit-a-1: destination-port-nats[0] and [1] must be merged: both translate tcp port 80 to 4000"]
    );
    let port = nats("port: 80\n        target-port: 4001\n        protocol: tcp");
    assert_eq!(
        port,
        [
            "conduit conduit-a-1: destination-port-nats[0] and [1] are colliding for tcp on vip vip-a-1-v4: both translate port 80"
        ]
    );
    let chain = nats("port: 4000\n        target-port: 4001\n        protocol: tcp");
    assert!(chain[0].ends_with("port 4000 of the second is the target-port of the first"), "{chain:?}");
}

#[test]
fn garbage_is_refused_in_one_line() {
    for text in ["", "- a", "data: 5", "\u{0}", "a: b: c", "{", "trench: {name: trench-a}\nflows: [1"] {
        for line in faults(text) {
            assert!(!line.contains('\n') && !line.is_empty(), "{line}");
        }
    }
    assert_eq!(faults("trench: ''"), ["key \"trench\": is missing"]);
    assert_eq!(faults("trench: {name: t}\nvips: {items: 5}"), ["key \"vips\": \"items\" has to be a list"]);
    assert!(Configuration::parse("trench: {name: t}").is_ok());
}

/// What is left of a text, and the warnings.
fn resolved(text: &str) -> (Configuration, Vec<String>) {
    let (configuration, warnings) = Configuration::parse_with_warnings(text).unwrap();
    assert_eq!(Configuration::parse(text).unwrap(), configuration);
    assert_eq!(configuration.clone().resolve(), [], "nothing is left to be left out");
    (configuration, warnings.iter().map(ToString::to_string).collect())
}

fn names<'a>(objects: impl IntoIterator<Item = &'a String>) -> Vec<&'a str> {
    objects.into_iter().map(String::as_str).collect()
}

#[test]
fn names_that_lead_nowhere_are_left_out_with_a_warning() {
    assert_eq!(resolved(FIXTURE).1, [""; 0]);
    let text = FIXTURE
        .replacen("gateways:\n      - gateway-v4-a-1", "gateways:\n      - gateway-x\n      - gateway-v4-a-1", 1)
        .replace("        - vip-a-1-v4", "        - vip-x\n        - vip-a-1-v4")
        .replace("      - vip-a-1-v6", "      - vip-a-1-v6\n      - vip-y");
    let (configuration, warnings) = resolved(&text);
    assert_eq!(
        warnings,
        [
            "conduit conduit-a-1: names vip \"vip-x\", which does not exist: it goes without",
            "flow flow-a-z-tcp: names vip \"vip-y\", which does not exist: it goes without",
            "flow flow-a-z-udp: names vip \"vip-y\", which does not exist: it goes without",
            "attractor attractor-a-1: names vip \"vip-y\", which does not exist: it goes without",
            "attractor attractor-a-1: names gateway \"gateway-x\", which does not exist: it goes without",
        ]
    );
    assert_eq!(configuration, Configuration::parse(FIXTURE).unwrap(), "nothing else is touched");
}

#[test]
fn streams_and_flows_that_lead_nowhere_are_left_out_with_a_warning() {
    let (configuration, warnings) = resolved(&FIXTURE.replace("stream: stream-a-ii", "stream: stream-x"));
    assert_eq!(
        warnings,
        ["flow flow-a-z-udp: names stream \"stream-x\", which does not exist or is left out: it is left out"]
    );
    assert_eq!(names(configuration.flows.iter().map(|f| &f.name)), ["flow-a-z-tcp"]);
    assert_eq!(configuration.streams.len(), 2);

    let nowhere = FIXTURE.replacen("conduit: conduit-a-1", "conduit: conduit-x", 1);
    let (configuration, warnings) = resolved(&nowhere);
    assert_eq!(
        warnings,
        [
            "stream stream-a-i: names conduit \"conduit-x\", which does not exist: it is left out",
            "flow flow-a-z-tcp: names stream \"stream-a-i\", which does not exist or is left out: it is left out"
        ]
    );
    assert_eq!(names(configuration.streams.iter().map(|s| &s.name)), ["stream-a-ii"]);
    let lists = configuration.to_nsp();
    assert!(lists.streams.iter().all(|s| s.conduit.is_some()) && lists.flows.iter().all(|f| f.stream.is_some()));
    assert_eq!((lists.streams.len(), lists.flows.len()), (1, 1));

    // A trench in which nothing but the trench is there yet.
    let empty = "trench: {name: t}\nstreams: {items: [{name: s, conduit: c}]}\n\
                 attractors: {items: [{name: a, trench: t, vips: [v], gateways: [g]}]}\n";
    let (configuration, warnings) = resolved(empty);
    assert_eq!(warnings.len(), 3, "{warnings:#?}");
    assert!(configuration.streams.is_empty() && configuration.attractors[0].gateways.is_empty());
}

#[test]
fn of_flows_that_share_a_vip_over_conduits_the_first_by_name_stays() {
    let text = FIXTURE
        .replace(
            "    - name: conduit-a-1\n",
            "    - name: conduit-a-2\n      trench: trench-a\n    - name: conduit-a-1\n",
        )
        .replace("name: stream-a-ii\n      conduit: conduit-a-1", "name: stream-a-ii\n      conduit: conduit-a-2");
    let (configuration, warnings) = resolved(&text);
    assert_eq!(
        warnings,
        [
            "flow flow-a-z-udp: shares vip vip-a-1-v4 with flow flow-a-z-tcp, whose stream is in conduit conduit-a-1 and not in conduit-a-2: \
             it is left out"
        ]
    );
    assert_eq!(names(configuration.flows.iter().map(|f| &f.name)), ["flow-a-z-tcp"]);
    // Whichever comes first in the text.
    let renamed = text.replace("flow-a-z-tcp", "flow-b");
    assert_eq!(names(resolved(&renamed).0.flows.iter().map(|f| &f.name)), ["flow-a-z-udp"]);
    // A flow that is left out takes no VIP away from others.
    let nowhere = text.replace("stream: stream-a-i\n", "stream: stream-x\n");
    assert_eq!(names(resolved(&nowhere).0.flows.iter().map(|f| &f.name)), ["flow-a-z-udp"]);
}

#[test]
fn of_attractors_that_list_a_vip_the_first_by_name_has_it() {
    let text = FIXTURE.replace(
        "  attractors: |\n    items:\n",
        "  attractors: |\n    items:\n    - name: attractor-b\n      trench: trench-a\n      vips: [vip-a-1-v6]\n      gateways: [gateway-v6-a-1]\n",
    );
    let (configuration, warnings) = resolved(&text);
    assert_eq!(
        warnings,
        ["attractor attractor-b: vip vip-a-1-v6 is also listed by attractor attractor-a-1: it goes without"]
    );
    let [first, second] = configuration.attractors.as_slice() else { panic!("{configuration:?}") };
    assert_eq!((names(&first.vips), names(&second.vips)), (vec!["vip-a-1-v4", "vip-a-1-v6"], vec![]));
    assert_eq!(names(&second.gateways), ["gateway-v6-a-1"]);
}

#[test]
fn warnings_name_what_has_no_effect() {
    let configuration = Configuration::parse(FIXTURE).unwrap();
    let clean: Vec<_> = plan::warnings(&configuration).iter().map(ToString::to_string).collect();
    assert_eq!(
        clean,
        [
            "conduit conduit-a-1: destination-port-nats[0] has no effect on vip vip-a-1-v4: no flow of the conduit matches tcp port 80 there"
        ]
    );

    let mut configuration = configuration;
    let mut shadow = configuration.flows[0].clone();
    shadow.name = "flow-shadow".to_owned();
    shadow.priority = 9;
    shadow.stream = "stream-a-ii".to_owned();
    shadow.byte_matches.clear();
    configuration.flows.push(shadow);
    let lines: Vec<_> = plan::warnings(&configuration).iter().map(ToString::to_string).collect();
    assert!(
        lines.contains(&"flow flow-a-z-tcp: never matches: flow flow-shadow with priority 9 takes all its packets to stream stream-a-ii".to_owned()),
        "{lines:#?}"
    );

    // Sources of length 0 are no constraint, of whichever IP version.
    configuration.flows[0].source_subnets = vec!["fd00::/8".parse().unwrap()];
    if let Some(shadow) = configuration.flows.last_mut() {
        shadow.source_subnets = vec!["0.0.0.0/0".parse().unwrap()];
    }
    let again: Vec<_> = plan::warnings(&configuration).iter().map(ToString::to_string).collect();
    let narrow =
        "flow flow-a-z-tcp: its source-subnets have none of the family of vip vip-a-1-v4: it matches nothing there";
    assert_eq!(again, [&[narrow.to_owned()], lines.as_slice()].concat());
}
