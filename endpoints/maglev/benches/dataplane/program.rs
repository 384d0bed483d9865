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

/// Median times of many packets, of flows and sources all over the range, and of parsing them alone; and the median of how many times one
/// is the other. Each packet is measured both ways at once, because a shared machine is not of one speed for long.
fn both(balancer: &mut Balancer, programs: &Programs, load: Load, packets: u16) -> [f64; 3] {
    let mut times = [vec![], vec![], vec![]];
    for n in 0..packets {
        let flow = (n as u32 * 7_919) % load.flows;
        let p = packet([0; 6], [0; 6], Way::Balancer.fan_vip().into(), (20_000 + n, FIRST_PORT + flow as u16));
        let least = programs.parse(&p, REPEAT);
        let run = balancer.engine.test_run(true, &p, REPEAT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(run.result, REDIRECT, "not the fast path");
        let took = run.nanoseconds as f64;
        for (times, value) in times.iter_mut().zip([took, least, took / least]) {
            times.push(value);
        }
    }
    times.map(|times| median(&times))
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
            // The program asks for interfaces of the namespace that it runs in.
            let [took, least, ratio] = topology.within("middle", || both(balancer, programs, *load, packets));
            parse.add(least);
            samples.pair(took, ratio);
        }
        untraced.configure(LARGE, true);
        let [took, _, ratio] = topology.within("middle", || both(&mut untraced, programs, LARGE, packets));
        without.pair(took, ratio);
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
