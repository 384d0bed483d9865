//! Namespace ids: weak names of other namespaces, that do not keep them alive.

use std::os::fd::AsRawFd;

use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::nsid::{NsidAttribute, NsidMessage};

use super::{CREATE, Netlink};
use crate::{Error, Netns};

/// Value that asks the kernel to choose an id (`NETNSA_NSID_NOT_ASSIGNED`).
const CHOOSE: i32 = -1;

fn id_in(messages: &[RouteNetlinkMessage]) -> Option<i32> {
    messages.iter().find_map(|m| match m {
        RouteNetlinkMessage::NewNsId(n) => n.attributes.iter().find_map(|a| match a {
            NsidAttribute::Id(id) if *id >= 0 => Some(*id),
            _ => None,
        }),
        _ => None,
    })
}

impl Netlink {
    /// The id by which this namespace knows `other`; one is assigned if there is none yet.
    pub async fn nsid_of(&self, other: &Netns) -> Result<i32, Error> {
        let fd = other.fd().as_raw_fd() as u32;
        let what = || format!("name {}", other.id());
        for _ in 0..2 {
            let mut ask = NsidMessage::default();
            ask.attributes = vec![NsidAttribute::Fd(fd)];
            let found = self.get("read namespace id", RouteNetlinkMessage::GetNsId(ask)).await?;
            if let Some(id) = id_in(&found) {
                return Ok(id);
            }
            let mut assign = NsidMessage::default();
            assign.attributes = vec![NsidAttribute::Fd(fd), NsidAttribute::Id(CHOOSE)];
            crate::error::ignore_exists(self.change(what, RouteNetlinkMessage::NewNsId(assign), CREATE).await)?;
        }
        Err(Error::Invalid(format!("{}: the kernel assigned no id", other.id())))
    }

    /// True while the namespace with this id exists. Ids are given again to other namespaces after its end.
    pub async fn nsid_alive(&self, id: i32) -> Result<bool, Error> {
        let mut ask = NsidMessage::default();
        ask.attributes = vec![NsidAttribute::Id(id)];
        match self.get("read namespace id", RouteNetlinkMessage::GetNsId(ask)).await {
            Ok(found) => Ok(id_in(&found).is_some()),
            Err(e) if e.is_missing() || e.errno() == Some(libc::EINVAL) => Ok(false),
            Err(e) => Err(e),
        }
    }
}
