//! The configuration as `nsp.v1` messages, and back.

use meridio_proto::nsp::v1 as nsp;

use crate::read::from_str;
use crate::values::DEFAULT_MAX_TARGETS;
use crate::{
    Attractor, Conduit, Configuration, Fault, Faults, Flow, Gateway, GatewayProtocol, PortNat, Stream, Trench, Vip,
    canonical_subnet,
};

/// The seven lists that the NSP serves, with all references resolved.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NspLists {
    /// The trench.
    pub trench: nsp::Trench,
    /// Conduits.
    pub conduits: Vec<nsp::Conduit>,
    /// Streams, each with its conduit.
    pub streams: Vec<nsp::Stream>,
    /// Flows, each with its stream and VIPs.
    pub flows: Vec<nsp::Flow>,
    /// VIPs.
    pub vips: Vec<nsp::Vip>,
    /// Attractors, each with its VIPs and gateways.
    pub attractors: Vec<nsp::Attractor>,
    /// Gateways.
    pub gateways: Vec<nsp::Gateway>,
}

impl Configuration {
    /// The messages of this configuration. All references of one that was parsed resolve; others are left out.
    pub fn to_nsp(&self) -> NspLists {
        let trench = nsp::Trench { name: self.trench.name.clone() };
        let vips: Vec<_> = self.vips.iter().map(|vip| vip.to_nsp(&trench)).collect();
        let gateways: Vec<_> = self.gateways.iter().map(|gateway| gateway.to_nsp(&trench)).collect();
        let named_vips =
            |names: &[String]| names.iter().filter_map(|n| vips.iter().find(|v| v.name == *n).cloned()).collect();
        let named_gateways =
            |names: &[String]| names.iter().filter_map(|n| gateways.iter().find(|g| g.name == *n).cloned()).collect();
        let conduits: Vec<_> = self
            .conduits
            .iter()
            .map(|conduit| nsp::Conduit {
                name: conduit.name.clone(),
                trench: Some(trench.clone()),
                destination_port_nats: conduit
                    .port_nats
                    .iter()
                    .map(|nat| nsp::conduit::PortNat {
                        port: nat.port.into(),
                        target_port: nat.target_port.into(),
                        vips: named_vips(&nat.vips),
                        protocol: nat.protocol.to_string(),
                    })
                    .collect(),
            })
            .collect();
        let streams: Vec<_> = self
            .streams
            .iter()
            .map(|stream| nsp::Stream {
                name: stream.name.clone(),
                conduit: conduits.iter().find(|c| c.name == stream.conduit).cloned(),
                max_targets: stream.max_targets,
            })
            .collect();
        let flows = self
            .flows
            .iter()
            .map(|flow| nsp::Flow {
                name: flow.name.clone(),
                source_subnets: texts(&flow.source_subnets),
                destination_port_ranges: texts(&flow.destination_ports),
                source_port_ranges: texts(&flow.source_ports),
                protocols: texts(&flow.protocols),
                priority: flow.priority,
                stream: streams.iter().find(|s| s.name == flow.stream).cloned(),
                vips: named_vips(&flow.vips),
                byte_matches: texts(&flow.byte_matches),
            })
            .collect();
        let attractors = self
            .attractors
            .iter()
            .map(|attractor| nsp::Attractor {
                name: attractor.name.clone(),
                trench: Some(trench.clone()),
                vips: named_vips(&attractor.vips),
                gateways: named_gateways(&attractor.gateways),
            })
            .collect();
        NspLists { trench, conduits, streams, flows, vips, attractors, gateways }
    }
}

pub(crate) fn texts<T: ToString>(values: &[T]) -> Vec<String> {
    values.iter().map(T::to_string).collect()
}

impl Vip {
    /// As a message.
    pub fn to_nsp(&self, trench: &nsp::Trench) -> nsp::Vip {
        nsp::Vip { name: self.name.clone(), address: self.address.to_string(), trench: Some(trench.clone()) }
    }

    /// From a message.
    ///
    /// # Errors
    /// When the address is no canonical CIDR.
    pub fn from_nsp(vip: &nsp::Vip) -> Result<Self, Faults> {
        let mut faults = Collector::new("vip", &vip.name);
        let address = faults.take("address", canonical_subnet(&vip.address));
        faults.finish(address.map(|address| Self { name: vip.name.clone(), address }))
    }
}

impl Gateway {
    /// As a message.
    pub fn to_nsp(&self, trench: &nsp::Trench) -> nsp::Gateway {
        let mut message = nsp::Gateway {
            name: self.name.clone(),
            address: self.address.to_string(),
            ip_family: if self.address.is_ipv4() { "ipv4" } else { "ipv6" }.to_owned(),
            trench: Some(trench.clone()),
            bfd: self.bfd.is_some(),
            bfd_spec: self.bfd.map(|bfd| nsp::gateway::BfdSpec {
                min_tx: bfd.min_tx,
                min_rx: bfd.min_rx,
                multiplier: bfd.multiplier,
            }),
            ..nsp::Gateway::default()
        };
        match &self.protocol {
            GatewayProtocol::Static => "static".clone_into(&mut message.protocol),
            GatewayProtocol::Bgp { remote_asn, local_asn, remote_port, local_port, hold_time, auth } => {
                "bgp".clone_into(&mut message.protocol);
                message.remote_asn = *remote_asn;
                message.local_asn = *local_asn;
                message.remote_port = (*remote_port).into();
                message.local_port = (*local_port).into();
                message.hold_time = *hold_time;
                message.bgp_auth = auth
                    .as_ref()
                    .map(|auth| nsp::gateway::BgpAuth { key_name: auth.key.clone(), key_source: auth.source.clone() });
            }
        }
        message
    }
}

impl Conduit {
    /// From a message; VIPs by name.
    ///
    /// # Errors
    /// When a port or protocol of a translation is out of range.
    pub fn from_nsp(conduit: &nsp::Conduit) -> Result<Self, Faults> {
        let mut faults = Collector::new("conduit", &conduit.name);
        let port = |number: u32| {
            u16::try_from(number)
                .ok()
                .filter(|p| *p != 0)
                .ok_or_else(|| format!("port {number} is not from 1 to 65535"))
        };
        let mut port_nats = Vec::new();
        for nat in &conduit.destination_port_nats {
            let from = faults.take("port", port(nat.port));
            let to = faults.take("target-port", port(nat.target_port));
            let protocol = faults.take("protocol", from_str(&nat.protocol));
            if let (Some(port), Some(target_port), Some(protocol)) = (from, to, protocol) {
                port_nats.push(PortNat {
                    port,
                    target_port,
                    vips: nat.vips.iter().map(|v| v.name.clone()).collect(),
                    protocol,
                });
            }
        }
        faults.finish(Some(Self { name: conduit.name.clone(), port_nats }))
    }
}

impl Stream {
    /// From a message; a `maxTargets` of 0 means the default.
    pub fn from_nsp(stream: &nsp::Stream) -> Self {
        let max_targets = if stream.max_targets == 0 { DEFAULT_MAX_TARGETS } else { stream.max_targets };
        let conduit = stream.conduit.as_ref().map(|c| c.name.clone()).unwrap_or_default();
        Self { name: stream.name.clone(), conduit, max_targets }
    }
}

impl Flow {
    /// From a message; stream and VIPs by name.
    ///
    /// # Errors
    /// All values that cannot be read.
    pub fn from_nsp(flow: &nsp::Flow) -> Result<Self, Faults> {
        let mut faults = Collector::new("flow", &flow.name);
        let value = Self {
            name: flow.name.clone(),
            source_subnets: faults.list("source-subnets", &flow.source_subnets, canonical_subnet),
            destination_ports: faults.list("destination-port-ranges", &flow.destination_port_ranges, from_str),
            source_ports: faults.list("source-port-ranges", &flow.source_port_ranges, from_str),
            protocols: faults.list("protocols", &flow.protocols, from_str),
            vips: flow.vips.iter().map(|vip| vip.name.clone()).collect(),
            priority: flow.priority,
            stream: flow.stream.as_ref().map(|s| s.name.clone()).unwrap_or_default(),
            byte_matches: faults.list("byte-matches", &flow.byte_matches, from_str),
        };
        faults.finish(Some(value))
    }
}

impl Trench {
    /// From a message.
    pub fn from_nsp(trench: &nsp::Trench) -> Self {
        Self { name: trench.name.clone() }
    }
}

impl Attractor {
    /// From a message; VIPs and gateways by name.
    pub fn from_nsp(attractor: &nsp::Attractor) -> Self {
        Self {
            name: attractor.name.clone(),
            vips: attractor.vips.iter().map(|vip| vip.name.clone()).collect(),
            gateways: attractor.gateways.iter().map(|gateway| gateway.name.clone()).collect(),
        }
    }
}

/// Collects the faults of one message.
struct Collector {
    object: String,
    faults: Vec<Fault>,
}

impl Collector {
    fn new(kind: &str, name: &str) -> Self {
        Self { object: format!("{kind} {name}"), faults: Vec::new() }
    }

    fn take<T>(&mut self, field: &str, result: Result<T, String>) -> Option<T> {
        result.map_err(|reason| self.faults.push(Fault::new(self.object.clone(), format!("{field}: {reason}")))).ok()
    }

    fn list<T>(&mut self, field: &str, texts: &[String], parse: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        texts.iter().filter_map(|text| self.take(field, parse(text))).collect()
    }

    fn finish<T>(self, value: Option<T>) -> Result<T, Faults> {
        match value {
            Some(value) if self.faults.is_empty() => Ok(value),
            _ => Err(Faults(self.faults)),
        }
    }
}
