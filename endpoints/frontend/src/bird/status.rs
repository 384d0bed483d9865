//! What BIRD says about its sessions: `show protocols all` and `show bfd sessions` as values.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use super::render::vip_protocol;
use super::reply::Reply;
use crate::gateway::{Family, Gateway, PROTOCOL_PREFIX, Protocol};

/// One protocol of BIRD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    /// `BGP`, `Static`, `BFD` ...
    pub kind: String,
    /// `up`, `start`, `down` ...
    pub state: String,
    /// Time of the last change, as BIRD prints it.
    pub since: String,
    /// The rest: for BGP its state and the last error.
    pub info: String,
    /// Routes imported, exported and preferred, where a channel counts them.
    pub routes: Option<Routes>,
}

/// Route counters of a gateway's channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    /// Learnt from the gateway.
    pub imported: u64,
    /// Told to the gateway.
    pub exported: u64,
    /// Learnt and best.
    pub preferred: u64,
}

/// One BFD session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BfdSession {
    /// The neighbour.
    pub address: IpAddr,
    /// Interface, `---` for multihop.
    pub interface: String,
    /// `Up`, `Down`, `Init`, `AdminDown`.
    pub state: String,
}

/// One look at BIRD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// Protocols by name.
    pub protocols: BTreeMap<String, Row>,
    /// BFD sessions.
    pub bfd: Vec<BfdSession>,
}

impl Status {
    /// Reads the replies to `show protocols all` and `show bfd sessions`.
    pub fn parse(protocols: &Reply, bfd: &Reply) -> Self {
        let mut status = Self { protocols: parse_protocols(protocols), bfd: vec![] };
        status.bfd = bfd.with_code(1020).filter_map(parse_bfd).collect();
        status
    }

    /// Whether a gateway is reachable: BGP established; static route up, and its BFD session too if it has one.
    pub fn gateway_up(&self, gateway: &Gateway, interface: &str) -> bool {
        let Some(row) = self.protocols.get(&gateway.protocol_name()) else { return false };
        if row.state != "up" {
            return false;
        }
        match gateway.protocol {
            Protocol::Bgp(_) => row.info.contains("Established"),
            Protocol::Static if gateway.bfd.is_some() => self.bfd.iter().any(|session| {
                session.address == gateway.address && session.interface == interface && session.state == "Up"
            }),
            Protocol::Static => true,
        }
    }

    /// Families whose VIPs are announced by the running configuration.
    pub fn advertises(&self) -> BTreeSet<Family> {
        Family::BOTH.into_iter().filter(|family| self.protocols.contains_key(&vip_protocol(*family))).collect()
    }

    /// The gateways' lines, for logs: name, state and info of each.
    pub fn gateways(&self) -> impl Iterator<Item = (&str, &Row)> {
        let is_gateway = |row: &Row| row.kind == "BGP" || row.kind == "Static";
        self.protocols
            .iter()
            .filter_map(move |(name, row)| Some((name.strip_prefix(PROTOCOL_PREFIX)?, row)).filter(|_| is_gateway(row)))
    }
}

fn parse_protocols(reply: &Reply) -> BTreeMap<String, Row> {
    let mut rows = BTreeMap::new();
    let mut current: Option<String> = None;
    for (code, text) in &reply.lines {
        match code {
            1002 => {
                let mut words = text.split_whitespace();
                let mut next = || words.next().unwrap_or_default().to_owned();
                let (name, kind, _table, state, since) = (next(), next(), next(), next(), next());
                let info = words.collect::<Vec<_>>().join(" ");
                current = Some(name.clone());
                rows.insert(name, Row { kind, state, since, info, routes: None });
            }
            1006 => {
                let row = current.as_ref().and_then(|name| rows.get_mut(name));
                if let (Some(row), Some(routes)) = (row, text.trim().strip_prefix("Routes:").and_then(parse_routes)) {
                    row.routes = Some(routes);
                }
            }
            _ => {}
        }
    }
    rows
}

/// `  1 imported, 2 exported, 1 preferred`; BIRD adds `filtered` where it keeps those.
fn parse_routes(text: &str) -> Option<Routes> {
    let mut routes = Routes::default();
    for part in text.split(',') {
        let (number, what) = part.trim().split_once(' ')?;
        let number = number.parse().ok()?;
        match what {
            "imported" => routes.imported = number,
            "exported" => routes.exported = number,
            "preferred" => routes.preferred = number,
            _ => {}
        }
    }
    Some(routes)
}

fn parse_bfd(text: &str) -> Option<BfdSession> {
    let mut words = text.split_whitespace();
    let address = words.next()?.parse().ok()?;
    Some(BfdSession { address, interface: words.next()?.to_owned(), state: words.next()?.to_owned() })
}

/// The router id in the reply to `show status`.
pub fn router_id(reply: &Reply) -> Option<Ipv4Addr> {
    reply.lines.iter().find_map(|(_, text)| text.trim().strip_prefix("Router ID is ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bird::reply::{Event, Parser};
    use crate::gateway::Bfd;

    /// As BIRD 2.0.12 told it, shortened.
    const PROTOCOLS: &str = "2002-Name       Proto      Table      State  Since         Info
1002-NBR-gw-a.1 BGP        ---        up     22:35:10.868  Established   
1006-  BGP state:          Established
     Neighbor address: 169.254.100.150%ext-vlan0
   Channel ipv4
     Routes:         1 imported, 2 exported, 3 preferred
 
1002-NBR-gw6    BGP        ---        start  22:35:15.955  Active        Socket: Connection closed
 NBR-st     Static     master4    up     22:35:09.990  
1006-
0000 ";
    const BFD: &str = "1020-NBR-BFD:
 IP address                Interface  State      Since         Interval  Timeout
 169.254.100.151           ext-vlan0  Up         22:35:10.744    0.050    0.150
 100:100::150              ext-vlan0  Down       22:35:15.950    1.000    0.000
0000 ";

    fn reply(text: &str) -> Reply {
        let mut parser = Parser::default();
        for line in text.split('\n') {
            if let Event::Done(reply) = parser.line(line).expect("line") {
                return reply;
            }
        }
        panic!("no reply in {text:?}");
    }

    fn gateway(name: &str, address: &str, bfd: bool, protocol: Protocol) -> Gateway {
        let address = address.parse().expect("address");
        Gateway { name: name.into(), address, protocol, bfd: bfd.then_some(Bfd::default()) }
    }

    #[test]
    fn sessions_are_up_only_when_established() {
        let status = Status::parse(&reply(PROTOCOLS), &reply(BFD));
        let bgp = || {
            Protocol::Bgp(crate::gateway::Bgp {
                remote_asn: 1,
                local_asn: 1,
                remote_port: 1,
                local_port: 1,
                hold_time: 3,
                auth: None,
            })
        };
        assert!(status.gateway_up(&gateway("gw-a.1", "169.254.100.150", true, bgp()), "ext-vlan0"));
        assert!(!status.gateway_up(&gateway("gw6", "100:100::150", true, bgp()), "ext-vlan0"));
        assert!(!status.gateway_up(&gateway("unknown", "100:100::150", true, bgp()), "ext-vlan0"));
        assert_eq!(status.protocols["NBR-gw-a.1"].routes, Some(Routes { imported: 1, exported: 2, preferred: 3 }));
        assert_eq!(status.protocols["NBR-gw6"].info, "Active Socket: Connection closed");
        assert_eq!(status.gateways().count(), 3);
        assert_eq!(status.advertises(), BTreeSet::new());
        let one = "1002-VIP6       Static     master6    up     22:35:09.990  \n0000 ";
        assert_eq!(Status::parse(&reply(one), &reply(BFD)).advertises(), [Family::V6].into());
    }

    #[test]
    fn a_static_gateway_with_bfd_needs_its_session() {
        let status = Status::parse(&reply(PROTOCOLS), &reply(BFD));
        assert!(status.gateway_up(&gateway("st", "169.254.100.151", true, Protocol::Static), "ext-vlan0"));
        assert!(!status.gateway_up(&gateway("st", "169.254.100.151", true, Protocol::Static), "ext-vlan1"));
        assert!(!status.gateway_up(&gateway("st", "100:100::150", true, Protocol::Static), "ext-vlan0"));
        assert!(status.gateway_up(&gateway("st", "100:100::150", false, Protocol::Static), "ext-vlan0"));
    }

    #[test]
    fn the_router_id_is_read() {
        let text = "1000-BIRD 2.0.12\n1011-Router ID is 1.2.3.4\n Hostname is vm\n0013 Daemon is up and running";
        assert_eq!(router_id(&reply(text)), Some(Ipv4Addr::new(1, 2, 3, 4)));
    }
}
