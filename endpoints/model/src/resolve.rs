//! References that lead nowhere, and objects that exclude each other.
//!
//! Objects come and go one by one, so both are states that a trench passes through and no faults of the one who changed something
//! else: as in the original, the name or the object is left out and the rest is served. Unlike there, a warning says so.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Configuration, Fault};

type Names = BTreeSet<String>;

impl Configuration {
    /// Leaves out what cannot be served, and returns a warning for each. The outcome depends on the configuration alone, not on
    /// the order of its lists: of two objects that exclude each other the one whose name comes first stays.
    pub fn resolve(&mut self) -> Vec<Fault> {
        self.sort();
        let vips: Names = self.vips.iter().map(|vip| vip.name.clone()).collect();
        let gateways: Names = self.gateways.iter().map(|gateway| gateway.name.clone()).collect();
        let mut warnings = Warnings::default();
        for conduit in &mut self.conduits {
            let object = format!("conduit {}", conduit.name);
            for nat in &mut conduit.port_nats {
                warnings.retain_known(&object, "vip", &mut nat.vips, &vips);
            }
        }
        for flow in &mut self.flows {
            warnings.retain_known(&format!("flow {}", flow.name), "vip", &mut flow.vips, &vips);
        }
        for attractor in &mut self.attractors {
            let object = format!("attractor {}", attractor.name);
            warnings.retain_known(&object, "vip", &mut attractor.vips, &vips);
            warnings.retain_known(&object, "gateway", &mut attractor.gateways, &gateways);
        }
        self.resolve_streams(&mut warnings);
        self.resolve_flows(&mut warnings);
        self.share_no_vip_over_conduits(&mut warnings);
        self.share_no_vip_over_attractors(&mut warnings);
        warnings.0
    }

    fn resolve_streams(&mut self, warnings: &mut Warnings) {
        let conduits: Names = self.conduits.iter().map(|conduit| conduit.name.clone()).collect();
        self.streams.retain(|stream| {
            let known = conduits.contains(&stream.conduit);
            if !known {
                let reason = format!("names conduit {:?}, which does not exist: it is left out", stream.conduit);
                warnings.add(format!("stream {}", stream.name), reason);
            }
            known
        });
    }

    /// Without its stream nobody knows which conduit's load balancers and targets a flow is for.
    fn resolve_flows(&mut self, warnings: &mut Warnings) {
        let streams: Names = self.streams.iter().map(|stream| stream.name.clone()).collect();
        self.flows.retain(|flow| {
            let known = streams.contains(&flow.stream);
            if !known {
                let reason =
                    format!("names stream {:?}, which does not exist or is left out: it is left out", flow.stream);
                warnings.add(format!("flow {}", flow.name), reason);
            }
            known
        });
    }

    /// Flows of streams in different conduits must not share a VIP: the packet could only go one way.
    fn share_no_vip_over_conduits(&mut self, warnings: &mut Warnings) {
        let conduits: BTreeMap<_, _> = self.streams.iter().map(|s| (s.name.as_str(), s.conduit.as_str())).collect();
        // Flow and conduit that a VIP belongs to.
        let mut owners: BTreeMap<String, (String, &str)> = BTreeMap::new();
        self.flows.retain(|flow| {
            let conduit = conduits.get(flow.stream.as_str()).copied().unwrap_or_default();
            let taken = flow.vips.iter().find_map(|vip| {
                let (owner, other) = owners.get(vip).filter(|(_, other)| *other != conduit)?;
                Some(format!(
                    "shares vip {vip} with flow {owner}, whose stream is in conduit {other} and not in {conduit}: it is left out"
                ))
            });
            if let Some(reason) = taken {
                warnings.add(format!("flow {}", flow.name), reason);
                return false;
            }
            for vip in &flow.vips {
                owners.entry(vip.clone()).or_insert_with(|| (flow.name.clone(), conduit));
            }
            true
        });
    }

    /// The whole attractor would be too much to leave out: its other VIPs and its gateways are nobody else's.
    fn share_no_vip_over_attractors(&mut self, warnings: &mut Warnings) {
        let mut owners: BTreeMap<String, String> = BTreeMap::new();
        for attractor in &mut self.attractors {
            let name = &attractor.name;
            attractor.vips.retain(|vip| {
                let owner = owners.entry(vip.clone()).or_insert_with(|| name.clone());
                if owner != name {
                    let reason = format!("vip {vip} is also listed by attractor {owner}: it goes without");
                    warnings.add(format!("attractor {name}"), reason);
                }
                owner == name
            });
        }
    }
}

#[derive(Default)]
struct Warnings(Vec<Fault>);

impl Warnings {
    /// Once, however often an object gives cause for it.
    fn add(&mut self, object: String, reason: String) {
        let warning = Fault { object, reason };
        if !self.0.contains(&warning) {
            self.0.push(warning);
        }
    }

    fn retain_known(&mut self, object: &str, kind: &str, list: &mut Vec<String>, known: &Names) {
        list.retain(|name| {
            let exists = known.contains(name);
            if !exists {
                let reason = format!("names {kind} {name:?}, which does not exist: it goes without");
                self.add(object.to_owned(), reason);
            }
            exists
        });
    }
}
