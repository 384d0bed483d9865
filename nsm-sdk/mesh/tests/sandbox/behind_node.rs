//! A node with interfaces, and an endpoint behind it that is registered.

use super::*;
use nsm_chain::IpContext;
use std::os::fd::AsRawFd;

pub struct BehindNode {
    pub world: World,
    pub nse_ns: Netns,
    pub endpoint: Endpoint,
    _processes: (Process, Manager, Process),
}

impl BehindNode {
    /// `serve` makes what the endpoint does about an interface, from the endpoint's namespace.
    pub async fn new<Serve: Element + 'static>(serve: impl FnOnce(Netns) -> Serve) -> Self {
        let world = World::new();
        let (node_ns, nse_ns) = (Netns::anonymous().unwrap(), Netns::anonymous().unwrap());
        let registry = world.registry().await;
        let node = world.kernel_node("nsmgr", &node_ns).await;
        world.service(&node, service()).await;
        let endpoint = Endpoint::builder("nse", token::from_source(world.source("nse"), HOUR))
            .element(Mechanisms::new(Side::Server).with(KERNEL, serve(nse_ns.clone())))
            .element(SendFdServer)
            .build();
        let process = world.serve("nse", &endpoint).await;
        let registration = NetworkServiceEndpoint {
            name: "nse".into(),
            network_service_names: vec![SERVICE.into()],
            url: world.url("nse"),
            ..Default::default()
        };
        let registering = RegistryClient::builder(world.url("nsmgr"), world.source("nse")).build().unwrap();
        registering.register_nse(registration).await.unwrap();
        Self { world, nse_ns, endpoint, _processes: (registry, node, process) }
    }

    /// A client of the node that tries once.
    pub fn client(&self, identity: &str) -> Client {
        Client::builder("nsc", Arc::new(Grpc::new(self.world.transport(identity))))
            .url(self.world.url("nsmgr"))
            .element(SendFdClient)
            .build()
    }
}

/// Gives a connection the interface `svc-<n>` at the endpoint, and network 172.16.n.0/24.
pub fn give(connection: &mut Connection, nse_ns: &Netns, n: usize) {
    connection.mechanism = Some(kernel(netns_url(nse_ns), &format!("svc-{n}")));
    connection.context.get_or_insert_default().ip_context = Some(IpContext {
        src_ip_addrs: vec![format!("172.16.{n}.2/24")],
        dst_ip_addrs: vec![format!("172.16.{n}.1/24")],
        ..Default::default()
    });
}

/// Kernel interface `name` in the namespace at `url`.
pub fn kernel(url: String, name: &str) -> Mechanism {
    let parameters = [("inodeURL".to_owned(), url), ("name".to_owned(), name.to_owned())].into();
    Mechanism { cls: "LOCAL".into(), r#type: KERNEL.into(), parameters }
}

/// URL of a namespace that is open here.
pub fn netns_url(netns: &Netns) -> String {
    format!("file:///proc/self/fd/{}", netns.fd().as_raw_fd())
}

/// A request for a connection that offers this mechanism.
pub fn asking(id: &str, mechanism: Mechanism) -> NetworkServiceRequest {
    NetworkServiceRequest { mechanism_preferences: vec![mechanism], ..request(id) }
}
