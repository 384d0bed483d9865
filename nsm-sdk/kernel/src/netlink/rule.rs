//! Policy rules.

use std::fmt;

use ipnet::IpNet;
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use rtnetlink::packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};

use super::{CREATE, Netlink};
use crate::Error;

/// Inclusive range of ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortRange {
    /// First port.
    pub start: u16,
    /// Last port.
    pub end: u16,
}

/// A rule that sends what it matches to a routing table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// True for IPv6.
    pub v6: bool,
    /// Evaluation order, lowest first. `None`: the kernel chooses one before all others.
    pub priority: Option<u32>,
    /// Source prefix.
    pub from: Option<IpNet>,
    /// Destination prefix.
    pub to: Option<IpNet>,
    /// Firewall mark.
    pub mark: Option<u32>,
    /// IP protocol number.
    pub protocol: Option<u8>,
    /// Source ports.
    pub sport: Option<PortRange>,
    /// Destination ports.
    pub dport: Option<PortRange>,
    /// Table to look in.
    pub table: u32,
    /// False for rules that do something else than look in a table (blackhole, goto ...); these are read, never written.
    pub lookup: bool,
}

impl Rule {
    /// `from <prefix> lookup <table>`.
    pub fn from_source(from: IpNet, table: u32) -> Self {
        Rule {
            v6: matches!(from, IpNet::V6(_)),
            priority: None,
            from: Some(from),
            to: None,
            mark: None,
            protocol: None,
            sport: None,
            dport: None,
            table,
            lookup: true,
        }
    }

    /// The same rule at an explicit place.
    pub fn with_priority(mut self, priority: u32) -> Self {
        self.priority = Some(priority);
        self
    }

    /// True if both match the same packets, whatever table and priority they have.
    pub fn same_selector(&self, other: &Rule) -> bool {
        let key = |r: &Rule| (r.v6, r.from.map(|n| n.trunc()), r.to, r.mark, r.protocol, r.sport, r.dport);
        key(self) == key(other)
    }

    /// True if `self`, wanted, is served by `existing`: an unset priority accepts any.
    pub fn matches(&self, existing: &Rule) -> bool {
        existing.lookup
            && self.table == existing.table
            && self.same_selector(existing)
            && self.priority.is_none_or(|p| existing.priority == Some(p))
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(priority) = self.priority {
            write!(f, "{priority}: ")?;
        }
        match (self.from, self.mark) {
            (Some(from), _) => write!(f, "from {from} ")?,
            (None, Some(mark)) => write!(f, "fwmark {mark} ")?,
            (None, None) => write!(f, "from all ")?,
        }
        write!(f, "lookup {}", self.table)
    }
}

fn prefix(ip: Option<std::net::IpAddr>, len: u8) -> Option<IpNet> {
    ip.and_then(|ip| IpNet::new(ip, len).ok())
}

fn range(range: &RulePortRange) -> PortRange {
    PortRange { start: range.start, end: range.end }
}

fn parse(message: &RuleMessage) -> Option<Rule> {
    let header = &message.header;
    let v6 = match header.family {
        AddressFamily::Inet => false,
        AddressFamily::Inet6 => true,
        _ => return None,
    };
    let (mut from, mut to) = (None, None);
    let mut rule = Rule {
        v6,
        // The kernel leaves out a priority of 0.
        priority: Some(0),
        from: None,
        to: None,
        mark: None,
        protocol: None,
        sport: None,
        dport: None,
        table: u32::from(header.table),
        lookup: header.action == RuleAction::ToTable,
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(ip) => from = Some(*ip),
            RuleAttribute::Destination(ip) => to = Some(*ip),
            RuleAttribute::Priority(p) => rule.priority = Some(*p),
            RuleAttribute::FwMark(m) => rule.mark = Some(*m),
            RuleAttribute::Table(t) => rule.table = *t,
            RuleAttribute::IpProtocol(p) => rule.protocol = Some(u8::from(*p)),
            RuleAttribute::SourcePortRange(r) => rule.sport = Some(range(r)),
            RuleAttribute::DestinationPortRange(r) => rule.dport = Some(range(r)),
            _ => {}
        }
    }
    rule.from = prefix(from, header.src_len);
    rule.to = prefix(to, header.dst_len);
    Some(rule)
}

fn message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = if rule.v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    message.header.action = RuleAction::ToTable;
    message.header.table = u8::try_from(rule.table).unwrap_or(0);
    let attributes = &mut message.attributes;
    attributes.push(RuleAttribute::Table(rule.table));
    if let Some(from) = rule.from {
        message.header.src_len = from.prefix_len();
        attributes.push(RuleAttribute::Source(from.network()));
    }
    if let Some(to) = rule.to {
        message.header.dst_len = to.prefix_len();
        attributes.push(RuleAttribute::Destination(to.network()));
    }
    if let Some(priority) = rule.priority {
        attributes.push(RuleAttribute::Priority(priority));
    }
    if let Some(mark) = rule.mark {
        attributes.push(RuleAttribute::FwMark(mark));
    }
    if let Some(protocol) = rule.protocol {
        attributes.push(RuleAttribute::IpProtocol(IpProtocol::from(protocol)));
    }
    if let Some(PortRange { start, end }) = rule.sport {
        attributes.push(RuleAttribute::SourcePortRange(RulePortRange { start, end }));
    }
    if let Some(PortRange { start, end }) = rule.dport {
        attributes.push(RuleAttribute::DestinationPortRange(RulePortRange { start, end }));
    }
    message
}

impl Netlink {
    /// All rules of both families.
    pub async fn rules(&self) -> Result<Vec<Rule>, Error> {
        // Without a family the kernel lists all of them in one go.
        let mut message = RuleMessage::default();
        message.header.action = RuleAction::Unspec;
        let answer = self.dump("list rules", RouteNetlinkMessage::GetRule(message)).await?;
        let ip = |m: &&RuleMessage| matches!(m.header.family, AddressFamily::Inet | AddressFamily::Inet6);
        let rules = answer.iter().filter_map(|m| match m {
            RouteNetlinkMessage::NewRule(r) => Some(r),
            _ => None,
        });
        Ok(rules.filter(ip).filter_map(parse).collect())
    }

    /// Adds a rule. The kernel refuses an equal one of the same priority; without a priority it would add a second one.
    pub async fn rule_add(&self, rule: &Rule) -> Result<(), Error> {
        let what = || format!("add rule {rule}");
        self.change(what, RouteNetlinkMessage::NewRule(message(rule)), CREATE).await
    }

    /// Deletes the first rule that matches.
    pub async fn rule_delete(&self, rule: &Rule) -> Result<(), Error> {
        let what = || format!("delete rule {rule}");
        self.change(what, RouteNetlinkMessage::DelRule(message(rule)), 0).await
    }
}

/// The unspecified prefix of a family, `0.0.0.0/0` or `::/0`.
pub(crate) fn any(v6: bool) -> IpNet {
    match v6 {
        false => IpNet::V4(ipnet::Ipv4Net::default()),
        true => IpNet::V6(ipnet::Ipv6Net::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::address::family;
    use super::*;

    #[test]
    fn message_and_parse_agree() {
        let rule = Rule {
            priority: Some(100),
            protocol: Some(6),
            sport: Some(PortRange { start: 1, end: 2 }),
            dport: Some(PortRange { start: 80, end: 80 }),
            ..Rule::from_source("20.0.0.1/32".parse().unwrap(), 4096)
        };
        assert_eq!(parse(&message(&rule)), Some(rule.clone()));
        assert!(Rule { priority: None, ..rule.clone() }.matches(&rule));
        assert!(!rule.matches(&Rule { priority: Some(1), ..rule.clone() }));
        assert_eq!(family(&any(true).addr()), AddressFamily::Inet6);
    }
}
