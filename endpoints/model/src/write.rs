//! Writes the ConfigMap that the operator of the original writes: fields in its order, lists sorted by name.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::nsp::texts;
use crate::{Configuration, GatewayProtocol};

#[derive(Serialize)]
struct Document<'a> {
    #[serde(rename = "apiVersion")]
    api_version: &'a str,
    kind: &'a str,
    metadata: Metadata<'a>,
    data: BTreeMap<&'static str, String>,
}

#[derive(Serialize)]
struct Metadata<'a> {
    name: String,
    namespace: &'a str,
}

#[derive(Serialize)]
struct TrenchOut<'a> {
    name: &'a str,
}

#[derive(Serialize)]
struct Items<T> {
    items: Vec<T>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ConduitOut<'a> {
    name: &'a str,
    trench: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    destination_port_nats: Vec<NatOut<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct NatOut<'a> {
    port: u16,
    target_port: u16,
    vips: &'a [String],
    protocol: &'a str,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct StreamOut<'a> {
    name: &'a str,
    conduit: &'a str,
    max_targets: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct FlowOut<'a> {
    name: &'a str,
    source_subnets: Vec<String>,
    destination_port_ranges: Vec<String>,
    source_port_ranges: Vec<String>,
    protocols: Vec<String>,
    vips: &'a [String],
    priority: i32,
    stream: &'a str,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    byte_matches: Vec<String>,
}

#[derive(Serialize)]
struct VipOut<'a> {
    name: &'a str,
    address: String,
    trench: &'a str,
}

#[derive(Serialize)]
struct AttractorOut<'a> {
    name: &'a str,
    vips: &'a [String],
    gateways: &'a [String],
    trench: &'a str,
}

#[derive(Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct GatewayOut<'a> {
    name: &'a str,
    address: String,
    #[serde(skip_serializing_if = "is_zero")]
    remote_asn: u32,
    #[serde(skip_serializing_if = "is_zero")]
    local_asn: u32,
    #[serde(skip_serializing_if = "is_zero")]
    remote_port: u32,
    #[serde(skip_serializing_if = "is_zero")]
    local_port: u32,
    ip_family: &'a str,
    bfd: bool,
    protocol: &'a str,
    #[serde(skip_serializing_if = "is_zero")]
    hold_time: u32,
    #[serde(skip_serializing_if = "is_zero")]
    min_tx: u32,
    #[serde(skip_serializing_if = "is_zero")]
    min_rx: u32,
    #[serde(skip_serializing_if = "is_zero")]
    multiplier: u32,
    trench: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    bgp_auth: Option<AuthOut<'a>>,
}

#[derive(Serialize)]
struct AuthOut<'a> {
    key: &'a str,
    source: &'a str,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // the signature that serde calls
fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn yaml(value: &impl Serialize) -> String {
    // Plain structs of texts and numbers have no way to fail; an empty text would be refused by every reader.
    serde_yaml_ng::to_string(value).unwrap_or_default()
}

impl Configuration {
    /// The value of each of the seven keys.
    pub fn to_data(&self) -> BTreeMap<&'static str, String> {
        let mut sorted = self.clone();
        sorted.sort();
        let trench = sorted.trench.name.as_str();
        let conduits = sorted.conduits.iter().map(|conduit| ConduitOut {
            name: &conduit.name,
            trench,
            destination_port_nats: conduit
                .port_nats
                .iter()
                .map(|nat| NatOut {
                    port: nat.port,
                    target_port: nat.target_port,
                    vips: &nat.vips,
                    protocol: nat.protocol.as_str(),
                })
                .collect(),
        });
        let streams = sorted.streams.iter().map(|stream| StreamOut {
            name: &stream.name,
            conduit: &stream.conduit,
            max_targets: stream.max_targets,
        });
        let flows = sorted.flows.iter().map(|flow| FlowOut {
            name: &flow.name,
            source_subnets: texts(&flow.source_subnets),
            destination_port_ranges: texts(&flow.destination_ports),
            source_port_ranges: texts(&flow.source_ports),
            protocols: texts(&flow.protocols),
            vips: &flow.vips,
            priority: flow.priority,
            stream: &flow.stream,
            byte_matches: texts(&flow.byte_matches),
        });
        let vips = sorted.vips.iter().map(|vip| VipOut { name: &vip.name, address: vip.address.to_string(), trench });
        let attractors = sorted.attractors.iter().map(|attractor| AttractorOut {
            name: &attractor.name,
            vips: &attractor.vips,
            gateways: &attractor.gateways,
            trench,
        });
        let gateways = sorted.gateways.iter().map(|gateway| gateway_out(gateway, trench));
        BTreeMap::from([
            ("trench", yaml(&TrenchOut { name: trench })),
            ("conduits", yaml(&Items { items: conduits.collect() })),
            ("streams", yaml(&Items { items: streams.collect() })),
            ("flows", yaml(&Items { items: flows.collect() })),
            ("vips", yaml(&Items { items: vips.collect() })),
            ("attractors", yaml(&Items { items: attractors.collect() })),
            ("gateways", yaml(&Items { items: gateways.collect() })),
        ])
    }

    /// The ConfigMap document, as [`Configuration::parse`] and the NSP of the original read it.
    pub fn to_config_map(&self, namespace: &str) -> String {
        yaml(&Document {
            api_version: "v1",
            kind: "ConfigMap",
            metadata: Metadata { name: format!("meridio-configuration-{}", self.trench.name), namespace },
            data: self.to_data(),
        })
    }
}

fn gateway_out<'a>(gateway: &'a crate::Gateway, trench: &'a str) -> GatewayOut<'a> {
    let bfd = gateway.bfd.unwrap_or_default();
    let out = GatewayOut {
        name: &gateway.name,
        address: gateway.address.to_string(),
        ip_family: if gateway.address.is_ipv4() { "ipv4" } else { "ipv6" },
        bfd: gateway.bfd.is_some(),
        protocol: "static",
        min_tx: bfd.min_tx,
        min_rx: bfd.min_rx,
        multiplier: bfd.multiplier,
        trench,
        ..GatewayOut::default()
    };
    match &gateway.protocol {
        GatewayProtocol::Static => out,
        GatewayProtocol::Bgp { remote_asn, local_asn, remote_port, local_port, hold_time, auth } => GatewayOut {
            protocol: "bgp",
            remote_asn: *remote_asn,
            local_asn: *local_asn,
            remote_port: (*remote_port).into(),
            local_port: (*local_port).into(),
            hold_time: *hold_time,
            bgp_auth: auth.as_ref().map(|auth| AuthOut { key: &auth.key, source: &auth.source }),
            ..out
        },
    }
}
