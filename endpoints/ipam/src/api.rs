//! The gRPC service `ipam.v1.Ipam`.

use std::time::Duration;

use meridio_proto::ipam::v1::ipam_server::Ipam;
use meridio_proto::ipam::v1::{Child, IpFamily, Prefix};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::Error;
use crate::service::Service;
use crate::store::Name;

/// How long an unknown conduit is waited for when the caller names no deadline.
const PATIENCE: Duration = Duration::from_secs(10);
/// The answer has to leave before the caller's deadline.
const MARGIN: Duration = Duration::from_millis(200);

/// Answers from the trees.
#[derive(Debug)]
pub(crate) struct Api {
    service: Service,
    trench: String,
}

impl Api {
    pub(crate) fn new(service: Service, trench: String) -> Self {
        Self { service, trench }
    }

    /// Family and name of what is asked for.
    fn name(&self, child: Child) -> Result<(u8, Name), Error> {
        let subnet = child.subnet.ok_or(Error::Missing("subnet"))?;
        let family = u8::from(subnet.ip_family() == IpFamily::Ipv6);
        let conduit = subnet.conduit.ok_or(Error::Missing("conduit"))?;
        let trench = conduit.trench.ok_or(Error::Missing("trench"))?;
        if trench.name != self.trench {
            return Err(Error::Trench { found: trench.name, own: self.trench.clone() });
        }
        if child.name.is_empty() {
            return Err(Error::Missing("name"));
        }
        Ok((family, Name { conduit: conduit.name, node: subnet.node, child: child.name }))
    }
}

/// What is left of the caller's deadline.
fn patience(metadata: &MetadataMap) -> Duration {
    let left = metadata.get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(grpc_timeout);
    left.map_or(PATIENCE, |left| left.saturating_sub(MARGIN))
}

/// `<up to 8 digits><H|M|S|m|u|n>` (gRPC over HTTP/2, "Timeout").
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return None,
    })
}

fn refused(error: Error) -> Status {
    tracing::warn!(%error, "request refused");
    Status::from(error)
}

#[tonic::async_trait]
impl Ipam for Api {
    async fn allocate(&self, request: Request<Child>) -> Result<Response<Prefix>, Status> {
        let patience = patience(request.metadata());
        let (family, name) = self.name(request.into_inner()).map_err(refused)?;
        let (address, length) = self.service.allocate(family, name, patience).await.map_err(refused)?;
        Ok(Response::new(Prefix { address: address.to_string(), prefix_length: length.into() }))
    }

    async fn release(&self, request: Request<Child>) -> Result<Response<()>, Status> {
        // What cannot be held is released.
        if let Ok((family, name)) = self.name(request.into_inner()) {
            self.service.release(family, name).await.map_err(refused)?;
        }
        Ok(Response::new(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines() {
        for (text, millis) in [("5S", 5000), ("100m", 100), ("99999999u", 99_999), ("1H", 3_600_000), ("2M", 120_000)] {
            assert_eq!(grpc_timeout(text).unwrap().as_millis(), millis, "{text}");
        }
        for bad in ["", "S", "5", "999999999S", "5x", "-1S", "é"] {
            assert_eq!(grpc_timeout(bad), None, "{bad}");
        }
    }
}
