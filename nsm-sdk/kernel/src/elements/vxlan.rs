//! The VXLAN mechanism on the endpoint's node: own underlay address and the network identifier.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use nsm_chain::{CloseCall, Connection, Element, Error, Key, Mechanism, Next, RequestCall, Side};

use super::{VXLAN, address, parameter};

/// UDP port of VXLAN (RFC 7348).
pub const PORT: u16 = 4789;
const VNI_MAX: u32 = 0x00ff_ffff;
const NAME: &str = "vxlan";

/// True if the identifier has to be even: it is when source <= destination, so that two nodes that choose at the same time,
/// one for each direction, do not choose the same one.
fn even(source: IpAddr, destination: IpAddr) -> bool {
    let bytes = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    };
    bytes(source) <= bytes(destination)
}

/// Picks an unused identifier of the right parity; `random` gives the starting point.
fn choose(source: IpAddr, destination: IpAddr, random: u32, used: &HashSet<u32>) -> Option<u32> {
    let parity = u32::from(!even(source, destination));
    let start = (random & VNI_MAX & !1) | parity;
    let step = |n: u32| (start + 2 * n) & VNI_MAX;
    (0..=VNI_MAX / 2).map(step).find(|vni| *vni != 0 && !used.contains(vni))
}

/// Server element for VXLAN mechanisms: `dst_ip`, `dst_port` and `vni`. It stands in the `mechanisms` element under VXLAN.
#[derive(Debug)]
pub struct VxlanServer {
    tunnel_ip: IpAddr,
    key: Key<u32>,
    used: Mutex<HashSet<u32>>,
}

impl VxlanServer {
    /// An element with this underlay address.
    pub fn new(tunnel_ip: IpAddr) -> Self {
        VxlanServer { tunnel_ip, key: Key::new(Side::Server), used: Mutex::default() }
    }

    fn used(&self) -> std::sync::MutexGuard<'_, HashSet<u32>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complete(&self, mechanism: &mut Mechanism, stored: Option<u32>) -> Result<u32, crate::Error> {
        let source = address(mechanism, "src_ip")?;
        let given = parameter(mechanism, "vni").parse().ok().filter(|v| (1..=VNI_MAX).contains(v));
        let mut used = self.used();
        let chosen = given.or(stored).or_else(|| choose(source, self.tunnel_ip, rand::random(), &used));
        let vni = chosen.ok_or_else(|| crate::Error::Invalid("no unused VXLAN network identifier".into()))?;
        used.insert(vni);
        let parameters = &mut mechanism.parameters;
        parameters.insert("dst_ip".into(), self.tunnel_ip.to_string());
        parameters.insert("dst_port".into(), PORT.to_string());
        parameters.insert("vni".into(), vni.to_string());
        Ok(vni)
    }
}

#[async_trait::async_trait]
impl Element for VxlanServer {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let id = call.id().to_owned();
        let metadata = call.ctx.metadata(NAME, &id)?.clone();
        let stored = metadata.get(&self.key);
        let mut chosen = None;
        if let Some(mechanism) = call.connection_mut().mechanism.as_mut().filter(|m| m.r#type == VXLAN) {
            let vni = self.complete(mechanism, stored);
            chosen = Some(vni.map_err(|e| Error::new(NAME, &id, "tunnel cannot be agreed on").with_cause(e))?);
        }
        let result = next.request(call).await;
        match (chosen, &result) {
            (Some(vni), Ok(_)) => {
                metadata.insert(&self.key, vni);
            }
            (Some(vni), Err(_)) if stored.is_none() => {
                self.used().remove(&vni);
            }
            _ => {}
        }
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let stored = call.ctx.metadata(NAME, call.id())?.remove(&self.key);
        let result = next.close(call).await;
        if let Some(vni) = stored {
            self.used().remove(&vni);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elements::KERNEL;
    use nsm_chain::{Chain, Context, NetworkServiceRequest, elements::metadata::MetadataElement};
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    };

    #[test]
    fn parity_keeps_the_two_directions_apart() {
        let (a, b) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        for random in [0, 1, 2, 0xffff_ffff] {
            let (there, back) = (choose(a, b, random, &HashSet::new()), choose(b, a, random, &HashSet::new()));
            assert_eq!(there.unwrap() % 2, 0);
            assert_eq!(back.unwrap() % 2, 1);
            assert_ne!(there, Some(0));
        }
        assert_eq!(choose(a, b, 4, &HashSet::from([4, 6])), Some(8));
    }

    /// Fails on demand.
    struct Fails(Arc<AtomicBool>);

    #[async_trait::async_trait]
    impl Element for Fails {
        fn name(&self) -> &'static str {
            "fails"
        }

        async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
            match self.0.load(SeqCst) {
                true => Err(Error::new("fails", call.id(), "told to fail")),
                false => next.request(call).await,
            }
        }
    }

    // Conformance 87
    #[tokio::test]
    async fn identifiers_are_chosen_kept_and_freed() {
        let (server, fails) =
            (Arc::new(VxlanServer::new("10.0.0.2".parse().unwrap())), Arc::new(AtomicBool::new(false)));
        let chain = Chain::builder()
            .element(MetadataElement::new())
            .element(server.clone())
            .element(Fails(fails.clone()))
            .build();
        let request = async |id: &str, kind: &str, parameters: &[(&str, &str)]| {
            let parameters = parameters.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            let mechanism = Mechanism { cls: "REMOTE".into(), r#type: kind.into(), parameters };
            let connection = Connection { id: id.into(), mechanism: Some(mechanism), ..Default::default() };
            let request = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
            let connection = chain.request(RequestCall::new(request, Context::new())).await?;
            Ok::<_, Error>(connection.mechanism.unwrap_or_default().parameters)
        };
        let source = [("src_ip", "10.0.0.1"), ("src_port", "4789")];
        let first = request("a", VXLAN, &source).await.unwrap();
        assert_eq!((first["dst_ip"].as_str(), first["dst_port"].as_str()), ("10.0.0.2", "4789"));
        assert_eq!(first["vni"].parse::<u32>().unwrap() % 2, 0);
        // A refresh that does not say which keeps it; one that says which is obeyed.
        assert_eq!(request("a", VXLAN, &source).await.unwrap()["vni"], first["vni"]);
        let given = [source[0], source[1], ("vni", "77")];
        assert_eq!(request("b", VXLAN, &given).await.unwrap()["vni"], "77");
        assert_eq!(server.used().len(), 2);
        // What is no VXLAN passes; what is none that can be is an error.
        assert!(request("c", KERNEL, &[]).await.unwrap().is_empty());
        request("d", VXLAN, &[]).await.unwrap_err();
        request("d", VXLAN, &[("src_ip", "nowhere")]).await.unwrap_err();
        // A first request that fails frees its identifier, a refresh that fails does not.
        fails.store(true, SeqCst);
        request("e", VXLAN, &source).await.unwrap_err();
        request("a", VXLAN, &source).await.unwrap_err();
        assert_eq!(server.used().len(), 2);
        for id in ["a", "b", "c"] {
            let connection = Connection { id: id.into(), ..Default::default() };
            chain.close(CloseCall::new(connection, Context::new())).await.unwrap();
        }
        assert!(server.used().is_empty());
    }
}
