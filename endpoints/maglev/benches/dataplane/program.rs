//! Nanoseconds per packet of the program alone (`BPF_PROG_TEST_RUN`), beside a program that only parses.

use serde_json::json;

use crate::Effort;
use crate::lanes::{Balancer, FIRST_PORT, Kind, Load};
use crate::programs::{Programs, packet};
use crate::report::{Samples, Section, median};
use crate::topology::{Topology, Way};

/// Runs on one packet: its TTL of 64 must not run out, else another path is measured.
const REPEAT: u32 = 50;
/// Where it is measured what the trace costs while it is off.
const LARGE: Load = Load { flows: 1_000, targets: 1_000, kind: Kind::Plain };
/// TC_ACT_REDIRECT.
const REDIRECT: u32 = 7;

/// Median time of many packets, of flows and sources all over the range.
fn ours(balancer: &mut Balancer, load: Load, packets: u16) -> f64 {
    let times: Vec<f64> = (0..packets)
        .map(|n| {
            let flow = (n as u32 * 7_919) % load.flows;
            let p = packet([0; 6], [0; 6], Way::Balancer.fan_vip().into(), (20_000 + n, FIRST_PORT + flow as u16));
            let run = balancer.engine.test_run(true, &p, REPEAT).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(run.result, REDIRECT, "not the fast path");
            run.nanoseconds as f64
        })
        .collect();
    median(&times)
}

fn parse_only(programs: &Programs, packets: u16) -> f64 {
    let times: Vec<f64> = (0..packets)
        .map(|n| {
            let p = packet([0; 6], [0; 6], Way::Balancer.fan_vip().into(), (20_000 + n, FIRST_PORT));
            programs.parse(&p, REPEAT)
        })
        .collect();
    median(&times)
}

pub(crate) fn measure(effort: &Effort, topology: &Topology, balancer: &mut Balancer, programs: &Programs) -> Section {
    let mut loads = Load::all(effort.quick);
    if effort.quick {
        loads.extend([Load::new(10, 1_000), Load::new(2_000, 1_000)]);
    }
    loads.push(Load { flows: 2_048, targets: 4, kind: Kind::Adversarial });
    let packets = if effort.quick { 50 } else { 300 };
    let mut parse = Samples::default();
    let mut hits: Vec<Samples> = loads.iter().map(|_| Samples::default()).collect();
    let (mut untraced, mut without) = (Balancer::open(topology, false), Samples::default());
    for _ in 0..effort.rounds {
        for (load, samples) in loads.iter().zip(&mut hits) {
            balancer.configure(*load, true);
            let least = parse_only(programs, packets);
            parse.add(least);
            // The program asks for interfaces of the namespace that it runs in.
            samples.add(topology.within("middle", || ours(balancer, *load, packets)));
            samples.relate(least);
        }
        untraced.configure(LARGE, true);
        without.add(topology.within("middle", || ours(&mut untraced, LARGE, packets)));
        without.relate(parse_only(programs, packets));
    }
    let (size, verified) = balancer.engine.program_size().unwrap_or((0, 0));
    let mut section =
        Section::new("One decision in the program alone", &["program", "ns/packet", "x parse-only", "range"]);
    parse.relate_to_itself();
    let mut row = |name: &str, s: &Samples, aim: bool| {
        section.row(
            &[name.to_owned(), format!("{:.0}", s.median()), format!("{:.2}", s.ratio()), s.range()],
            json!({"program": name, "nanoseconds": s.median(), "ratio": s.ratio(), "ratios": s.ratios, "aim": aim}),
        );
    };
    row("parse-only", &parse, false);
    for (load, samples) in loads.iter().zip(&hits) {
        row(&load.name(), samples, matches!(load.kind, Kind::Plain | Kind::Everything));
    }
    row(&format!("{}, without the trace in the program", LARGE.name()), &without, false);
    section.note(format!("{size} instructions, {verified} walked by the verifier"));
    section
}
