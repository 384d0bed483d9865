//! The VXLAN mechanism on the endpoint's node: own underlay address and the network identifier.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use nsm_chain::{CloseCall, Connection, Element, Error, Key, Mechanism, Next, RequestCall, Side};

use super::{VXLAN, address, failed, parameter};

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
fn choose(source: IpAddr, destination: IpAddr, random: u32, taken: impl Fn(u32) -> bool) -> Option<u32> {
    let parity = u32::from(!even(source, destination));
    let start = (random & VNI_MAX & !1) | parity;
    let step = |n: u32| (start + 2 * n) & VNI_MAX;
    (0..=VNI_MAX / 2).map(step).find(|vni| *vni != 0 && !taken(*vni))
}

/// Server element for VXLAN mechanisms: `dst_ip`, `dst_port` and `vni`. It stands in the `mechanisms` element under VXLAN.
#[derive(Debug)]
pub struct VxlanServer {
    tunnel_ip: IpAddr,
    key: Key<u32>,
    /// Which connection has which identifier.
    used: Mutex<HashMap<u32, String>>,
}

impl VxlanServer {
    /// An element with this underlay address.
    pub fn new(tunnel_ip: IpAddr) -> Self {
        VxlanServer { tunnel_ip, key: Key::new(Side::Server), used: Mutex::default() }
    }

    fn used(&self) -> std::sync::MutexGuard<'_, HashMap<u32, String>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Agrees on an identifier for the connection `id`: the one that the other node names or the one it has, as long as no other
    /// connection has it. Otherwise its packets would be the other connection's.
    fn complete(&self, id: &str, mechanism: &mut Mechanism, stored: Option<u32>) -> Result<u32, crate::Error> {
        let source = address(mechanism, "src_ip")?;
        let given = parameter(mechanism, "vni").parse().ok().filter(|v| (1..=VNI_MAX).contains(v));
        let mut used = self.used();
        let taken = |vni: u32| used.get(&vni).is_some_and(|owner| owner != id);
        let free = |vni: &u32| !taken(*vni);
        let known = given.filter(free).or(stored.filter(free));
        let chosen = known.or_else(|| choose(source, self.tunnel_ip, rand::random(), taken));
        let vni = chosen.ok_or_else(|| crate::Error::Invalid("no unused VXLAN network identifier".into()))?;
        used.insert(vni, id.to_owned());
        let parameters = &mut mechanism.parameters;
        parameters.insert("dst_ip".into(), self.tunnel_ip.to_string());
        parameters.insert("dst_port".into(), PORT.to_string());
        parameters.insert("vni".into(), vni.to_string());
        Ok(vni)
    }

    /// The connection does without this identifier.
    fn free(&self, id: &str, vni: u32) {
        let mut used = self.used();
        if used.get(&vni).is_some_and(|owner| owner == id) {
            used.remove(&vni);
        }
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
            let vni = self.complete(&id, mechanism, stored);
            chosen = Some(vni.map_err(|cause| failed(NAME, &id, "tunnel cannot be agreed on", cause))?);
        }
        let result = next.request(call).await;
        let now = if result.is_ok() { chosen } else { stored };
        for vni in [chosen, stored].into_iter().flatten().filter(|vni| chosen.is_some() && Some(*vni) != now) {
            self.free(&id, vni);
        }
        if let (Some(vni), Ok(_)) = (chosen, &result) {
            metadata.insert(&self.key, vni);
        }
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let (stored, id) = (call.ctx.metadata(NAME, call.id())?.remove(&self.key), call.id().to_owned());
        let result = next.close(call).await;
        if let Some(vni) = stored {
            self.free(&id, vni);
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
            let (there, back) = (choose(a, b, random, |_| false), choose(b, a, random, |_| false));
            assert_eq!(there.unwrap() % 2, 0);
            assert_eq!(back.unwrap() % 2, 1);
            assert_ne!(there, Some(0));
        }
        assert_eq!(choose(a, b, 4, |vni| [4, 6].contains(&vni)), Some(8));
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
        // One that another connection has is not given again, and a failure of the second one does not take it from the first.
        assert_ne!(request("x", VXLAN, &given).await.unwrap()["vni"], "77");
        fails.store(true, SeqCst);
        request("y", VXLAN, &given).await.unwrap_err();
        fails.store(false, SeqCst);
        assert_ne!(request("y", VXLAN, &given).await.unwrap()["vni"], "77");
        assert_eq!(server.used().get(&77).map(String::as_str), Some("b"));
        // Whoever changes gives the former one back.
        let other = [source[0], source[1], ("vni", "78")];
        for vni in ["78", "79", "78"] {
            let given = [source[0], source[1], ("vni", vni)];
            assert_eq!(request("z", VXLAN, &given).await.unwrap()["vni"], vni);
        }
        assert_ne!(request("x", VXLAN, &other).await.unwrap()["vni"], "78");
        assert_eq!(server.used().len(), 5);
        for id in ["x", "y", "z"] {
            let connection = Connection { id: id.into(), ..Default::default() };
            chain.close(CloseCall::new(connection, Context::new())).await.unwrap();
        }
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
