//! Configuration texts: the trench as the operator would write it, and the gateway's BIRD.

use std::fmt::Write as _;

use crate::topology::{GATEWAY_INTERFACE, Trench, gateway_address, lb_address};

/// The trench's ConfigMap, seven keys, with the layout of the original.
pub fn config_map(trench: &Trench) -> String {
    let letter = trench.letter;
    let (name, conduit, stream, attractor) = (trench.name(), trench.conduit(), trench.stream(), trench.attractor());
    let (gateway4, gateway6) = gateway_address();
    let mut gateways = String::new();
    for (family, address) in [("v4", gateway4.to_string()), ("v6", format!("\"{gateway6}\""))] {
        let _ = write!(
            gateways,
            "    - name: gateway-{family}-{letter}-1\n      address: {address}\n      remote-asn: 4248829953\n      local-asn: 8103\n      \
             remote-port: 10179\n      local-port: 10179\n      ip-family: ip{family}\n      bfd: true\n      protocol: bgp\n      hold-time: 3\n      \
             min-tx: 50\n      min-rx: 50\n      multiplier: 3\n      trench: {name}\n"
        );
    }
    let (vip4, vip6) = (format!("vip-{letter}-1-v4"), format!("vip-{letter}-1-v6"));
    let mut flows = String::new();
    for (kind, protocol, port) in [("tcp", "tcp", 4000), ("udp", "udp", 4003)] {
        let _ = write!(
            flows,
            "    - name: flow-{letter}-z-{kind}\n      source-subnets:\n      - 0.0.0.0/0\n      - ::/0\n      destination-port-ranges:\n      \
             - {port}-{port}\n      source-port-ranges:\n      - 0-65535\n      protocols:\n      - {protocol}\n      vips:\n      - {vip4}\n      \
             - {vip6}\n      priority: 1\n      stream: {stream}\n"
        );
    }
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: meridio-configuration-{name}\n  namespace: default\ndata:\n  \
         trench: |\n    name: {name}\n  \
         conduits: |\n    items:\n    - name: {conduit}\n      trench: {name}\n  \
         streams: |\n    items:\n    - name: {stream}\n      conduit: {conduit}\n      max-targets: 100\n  \
         flows: |\n    items:\n{flows}  \
         vips: |\n    items:\n    - name: {vip4}\n      address: {}/32\n      trench: {name}\n    - name: {vip6}\n      address: {}/128\n      trench: {name}\n  \
         attractors: |\n    items:\n    - name: {attractor}\n      vips:\n      - {vip4}\n      - {vip6}\n      gateways:\n      \
         - gateway-v4-{letter}-1\n      - gateway-v6-{letter}-1\n      trench: {name}\n  \
         gateways: |\n    items:\n{gateways}",
        trench.vip4, trench.vip6
    )
}

/// BIRD of the gateway: passive BGP with BFD towards both load balancers, equal-cost routes into the kernel, default routes announced.
pub fn gateway_bird(bfd_interval_ms: u32, bfd_multiplier: u32) -> String {
    let (gateway4, gateway6) = gateway_address();
    let mut text = format!(
        "log stderr all;\nrouter id {gateway4};\nprotocol device {{ scan time 10; }}\n\
         protocol kernel kernel4 {{ ipv4 {{ import none; export where source = RTS_BGP; }}; merge paths on limit 16; scan time 10; }}\n\
         protocol kernel kernel6 {{ ipv6 {{ import none; export where source = RTS_BGP; }}; merge paths on limit 16; scan time 10; }}\n\
         protocol static default4 {{ ipv4; route 0.0.0.0/0 blackhole; }}\n\
         protocol static default6 {{ ipv6; route ::/0 blackhole; }}\n\
         protocol bfd bfd1 {{ interface \"{GATEWAY_INTERFACE}\" {{ min rx interval {bfd_interval_ms} ms; min tx interval {bfd_interval_ms} ms; \
         multiplier {bfd_multiplier}; }}; }}\n"
    );
    for (family, address, table) in [(4, gateway4.to_string(), "ipv4"), (6, gateway6.to_string(), "ipv6")] {
        let _ = write!(
            text,
            "template bgp LINK{family} {{\n  local {address} port 10179 as 4248829953;\n  passive yes; direct; hold time 3; keepalive time 1; bfd on;\n  \
             connect delay time 1; connect retry time 1; error wait time 1, 1; error forget time 1; startup hold time 5;\n  \
             {table} {{ import all; export where source = RTS_STATIC; next hop self; }};\n}}\n"
        );
    }
    for number in [1, 2] {
        let (v4, v6) = lb_address(number);
        let _ = writeln!(text, "protocol bgp LB{number}V4 from LINK4 {{ neighbor {v4} port 10179 as 8103; }}");
        let _ = writeln!(text, "protocol bgp LB{number}V6 from LINK6 {{ neighbor {v6} port 10179 as 8103; }}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_map_has_the_seven_keys_each_a_document() {
        let document: serde_yaml_ng::Value = serde_yaml_ng::from_str(&config_map(&Trench::fixture('a', 0))).unwrap();
        for key in ["trench", "conduits", "streams", "flows", "vips", "attractors", "gateways"] {
            let text = document["data"][key].as_str().unwrap_or_else(|| panic!("key {key}"));
            let _: serde_yaml_ng::Value = serde_yaml_ng::from_str(text).unwrap();
        }
        let gateways: serde_yaml_ng::Value =
            serde_yaml_ng::from_str(document["data"]["gateways"].as_str().unwrap()).unwrap();
        assert_eq!(gateways["items"][1]["address"].as_str(), Some("100:100::150"));
        assert_eq!(gateways["items"][0]["bfd"].as_bool(), Some(true));
    }
}
