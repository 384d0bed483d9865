//! Which services of a client may share addresses.

use crate::Connection;
use std::{collections::BTreeMap, str::FromStr};

/// Services in groups. Connections to services of one group know of each other and may have the same addresses.
///
/// Read from `[kernel://a,kernel://b?color=red],[kernel://c]`: lists of service URLs, in which labels are those that a
/// connection has to have. The scheme does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AwarenessGroups(Vec<Vec<Member>>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    service: String,
    labels: BTreeMap<String, String>,
}

/// A text that is no list of lists of service URLs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("awareness groups {text:?}: {fault}")]
pub struct GroupError {
    text: String,
    fault: &'static str,
}

impl Member {
    fn parse(url: &str) -> Option<Self> {
        let (_, rest) = url.split_once("://")?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let service = path.split('/').next().filter(|service| !service.is_empty())?;
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        let labels = pairs.map(|pair| pair.split_once('=')).collect::<Option<Vec<_>>>()?;
        let labels = labels.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        Some(Self { service: service.to_owned(), labels })
    }

    fn covers(&self, service: &str, labels: &BTreeMap<String, String>) -> bool {
        self.service == service && self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

impl AwarenessGroups {
    /// Whether two connections may have the same addresses.
    pub fn together(&self, a: &Connection, b: &Connection) -> bool {
        let covers = |group: &[Member], connection: &Connection| {
            group.iter().any(|member| member.covers(&connection.network_service, &connection.labels))
        };
        self.0.iter().any(|group| covers(group, a) && covers(group, b))
    }
}

impl FromStr for AwarenessGroups {
    type Err = GroupError;

    fn from_str(text: &str) -> Result<Self, GroupError> {
        let fail = |fault| GroupError { text: text.to_owned(), fault };
        let mut groups = Vec::new();
        let mut rest = text.trim();
        while !rest.is_empty() {
            let inner = rest.strip_prefix('[').ok_or(fail("a group begins with a bracket"))?;
            let (group, after) = inner.split_once(']').ok_or(fail("a bracket is not closed"))?;
            let members = group.split(',').map(str::trim).map(Member::parse).collect::<Option<Vec<_>>>();
            groups.push(members.ok_or(fail("a member is not of the form scheme://service?label=value"))?);
            rest = after.trim_start();
            rest = match rest.strip_prefix(',') {
                Some(more) if !more.trim().is_empty() => more.trim_start(),
                Some(_) => return Err(fail("it ends with a comma")),
                None if rest.is_empty() => rest,
                None => return Err(fail("groups are separated by commas")),
            };
        }
        Ok(Self(groups))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(service: &str, labels: &[(&str, &str)]) -> Connection {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Connection { network_service: service.into(), labels, ..Default::default() }
    }

    // Conformance 71, 109
    #[test]
    fn members_of_a_group_belong_together() {
        let groups: AwarenessGroups = "[kernel://a, memif://b/nsm-1?color=red],[kernel://c]".parse().unwrap();
        let (a, c, red) =
            (connection("a", &[]), connection("c", &[]), connection("b", &[("color", "red"), ("x", "y")]));
        assert!(groups.together(&a, &red) && groups.together(&red, &a) && groups.together(&c, &c));
        assert!(!groups.together(&a, &c) && !groups.together(&a, &connection("b", &[])));
        assert!(!AwarenessGroups::default().together(&a, &a));
    }

    // Conformance 109
    #[test]
    fn what_is_no_list_of_groups_is_refused() {
        assert_eq!("".parse::<AwarenessGroups>().unwrap(), AwarenessGroups::default());
        for text in
            ["a", "[a]", "[kernel://a", "[kernel://a],", "[kernel://a][kernel://b]", "[]", "[kernel://]", "[k://a?b]"]
        {
            assert!(text.parse::<AwarenessGroups>().is_err(), "{text}");
        }
    }
}
