//! Next hops of ready targets, and the tables that the slow path has for them.

use std::collections::BTreeSet;
use std::net::IpAddr;

use meridio_maglev::Engine;

use crate::desired::Ready;
use crate::routing::Wanted;

/// Next hops by the tables of the slow path, of the streams that the engine has.
pub(crate) fn slow_path(engine: &Engine, ready: &Ready) -> Wanted {
    let mut wanted = Wanted::new();
    let limits = engine.limits();
    for (stream, targets) in &ready.targets {
        let (Some(offset), Some(limit)) = (engine.offset(stream), limits.get(stream)) else { continue };
        // Behind the limit are the tables of another stream.
        for (identifier, target) in targets.range(..=limit) {
            if let Some((ip, index)) = target.v4 {
                wanted.insert((false, offset + identifier), (ip.into(), index));
            }
            if let Some((ip, index)) = target.v6 {
                wanted.insert((true, offset + identifier), (ip.into(), index));
            }
        }
    }
    wanted
}

/// Interface and address of each next hop.
pub(crate) fn hops(ready: &Ready) -> BTreeSet<(u32, IpAddr)> {
    let targets = ready.targets.values().flat_map(|t| t.values());
    targets
        .flat_map(|t| [t.v4.map(|(ip, index)| (index, ip.into())), t.v6.map(|(ip, index)| (index, ip.into()))])
        .flatten()
        .collect()
}
