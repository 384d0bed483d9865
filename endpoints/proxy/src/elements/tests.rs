use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use nsm_chain::elements::authorize::Policies;
use nsm_chain::elements::kernel_mechanism;
use nsm_chain::token::Token;
use nsm_chain::{
    Call, Chain, Context, Endpoint, Mechanism, NetworkServiceRequest, Path, PathSegment, Peer, State, clock,
};

use super::*;
use crate::settings::{self, Families};
use crate::testing::Ipam;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
/// The release of addresses is due after 20 s.
const RELEASED: Duration = Duration::from_secs(25);

/// Both the end of the chain that fails and the target that answers when it is told to.
struct Told(AtomicBool);

#[async_trait::async_trait]
impl Answers for Told {
    async fn answers(&self, address: IpAddr) -> bool {
        assert_eq!(address.to_string(), "172.16.1.6", "not a VIP");
        self.0.load(SeqCst)
    }
}

#[async_trait::async_trait]
impl Element for Told {
    fn name(&self) -> &'static str {
        "told"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        if self.0.load(SeqCst) { next.request(call).await } else { Err(Error::new("told", call.id(), "told to fail")) }
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        next.close(call).await
    }
}

struct Fixture {
    ipam: Ipam,
    shared: Shared,
    targets: Arc<TargetAddresses>,
    told: Arc<Told>,
}

impl Fixture {
    fn new() -> Self {
        let (ipam, shared, told) = (Ipam::default(), Shared::new(), Arc::new(Told(true.into())));
        shared.change(|inputs| inputs.bridge = ["172.16.1.1/24".parse().unwrap()].into());
        let families = Families { v4: true, v6: false };
        let addresses = Addresses::new(ipam.channel(), &settings::tests::defaults(), families);
        let targets = Arc::new(TargetAddresses::new(addresses, shared.clone(), told.clone()));
        Self { ipam, shared, targets, told }
    }

    fn chain(&self) -> Chain {
        let elements: [Arc<dyn Element>; 2] = [self.targets.clone(), self.told.clone()];
        Chain::new(elements)
    }

    /// What has been released by the time that a release is due.
    async fn released(&self) -> Vec<String> {
        tokio::time::sleep(RELEASED).await;
        self.ipam.released()
    }

    fn interfaces(&self) -> Vec<String> {
        self.shared.look(|inputs| inputs.targets.values().map(|(name, _)| name.clone()).collect())
    }
}

/// The connection `own` of the target `tapa`, by the interface `if-<own>`.
fn connection(own: &str) -> Connection {
    let expires = Some(clock::to_timestamp(clock::now() + MINUTE));
    let segment = |id: &str| PathSegment { id: id.into(), name: id.into(), expires, ..PathSegment::default() };
    let parameters = [(kernel_mechanism::NAME.to_owned(), format!("if-{own}"))].into();
    Connection {
        id: own.into(),
        path: Some(Path { index: 1, path_segments: vec![segment("tapa"), segment(own)] }),
        mechanism: Some(Mechanism { r#type: "NOOP".into(), parameters, ..Mechanism::default() }),
        ..Connection::default()
    }
}

fn request(connection: Connection) -> RequestCall {
    Call::new(NetworkServiceRequest { connection: Some(connection), ..Default::default() }, Context::new())
}

#[tokio::test(start_paused = true)]
async fn addresses_are_released_by_who_served_last() {
    let this = Fixture::new();
    let chain = this.chain();
    let close = async |own| chain.close(Call::new(connection(own), Context::new())).await.unwrap();
    chain.request(request(connection("old"))).await.unwrap();
    chain.request(request(connection("new"))).await.unwrap();
    close("old").await;
    assert!(this.released().await.is_empty(), "the new one has them");
    assert_eq!(this.interfaces(), ["if-new"]);
    // A third one that fails takes nothing either.
    this.told.0.store(false, SeqCst);
    chain.request(request(connection("third"))).await.unwrap_err();
    chain.request(request(connection("new"))).await.unwrap_err();
    assert!(this.released().await.is_empty());
    assert_eq!(this.interfaces(), ["if-new"]);
    close("new").await;
    assert_eq!(this.released().await, ["tapa-src", "tapa-dst"]);
    assert!(this.interfaces().is_empty());
    chain.request(request(connection("fourth"))).await.unwrap_err();
    assert_eq!(this.released().await, ["tapa-src", "tapa-dst"], "nobody is served");
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_made_while_the_old_one_closes_keeps_its_addresses() {
    /// Closes the old connection while the new one is on its way.
    struct Meanwhile(Arc<TargetAddresses>);

    #[async_trait::async_trait]
    impl Element for Meanwhile {
        fn name(&self) -> &'static str {
            "meanwhile"
        }

        async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
            self.0.close(Call::new(connection("old"), Context::new()), Next::tail()).await?;
            next.request(call).await
        }

        async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
            next.close(call).await
        }
    }

    let this = Fixture::new();
    this.chain().request(request(connection("old"))).await.unwrap();
    let elements: [Arc<dyn Element>; 2] = [this.targets.clone(), Arc::new(Meanwhile(this.targets.clone()))];
    Chain::new(elements).request(request(connection("new"))).await.unwrap();
    assert!(this.released().await.is_empty());
    assert_eq!(this.interfaces(), ["if-new"]);
}

#[tokio::test(start_paused = true)]
async fn a_silent_target_keeps_its_addresses_while_it_answers() {
    let this = Fixture::new();
    let tokens = |_: Option<&Peer>| Ok(Token { jwt: "proxy".into(), expires: clock::now() + MINUTE });
    let builder = Endpoint::builder("proxy", Arc::new(tokens)).policies(Policies::any());
    let endpoint = crate::for_targets(builder, this.targets.clone(), 1500);
    let mut asked = Connection { id: "tapa".into(), ..connection("tapa") };
    asked.path = asked.path.map(|path| Path { index: 0, path_segments: path.path_segments[..1].to_vec() });
    let vip = IpContext { src_ip_addrs: vec!["20.0.0.1/32".into()], ..IpContext::default() };
    asked.context.get_or_insert_default().ip_context = Some(vip);
    let got = endpoint.chain().request(request(asked.clone())).await.unwrap();
    assert_eq!(got.state(), State::Up);
    let before = this.ipam.allocations();
    tokio::time::sleep(10 * MINUTE).await;
    assert!(this.ipam.released().is_empty());
    assert!(this.ipam.allocations() >= before + 2 * 8, "the lease is renewed");
    assert_eq!(this.interfaces().len(), 1);
    this.told.0.store(false, SeqCst);
    let closed = async {
        while !this.interfaces().is_empty() {
            tokio::time::sleep(SECOND).await;
        }
    };
    tokio::time::timeout(crate::KEEP_INTERVAL + SECOND, closed).await.unwrap();
    tokio::time::sleep(RELEASED - 10 * SECOND).await;
    assert!(this.ipam.released().is_empty(), "not at once");
    assert_eq!(this.released().await, ["tapa-src", "tapa-dst"]);
    let done = this.ipam.allocations();
    tokio::time::sleep(10 * MINUTE).await;
    assert_eq!(this.ipam.allocations(), done);
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_target_has_another_one_is_not_kept() {
    let this = Fixture::new();
    let chain = this.chain();
    let old = chain.request(request(connection("old"))).await.unwrap();
    assert!(this.targets.keep(&old).await);
    let new = chain.request(request(connection("new"))).await.unwrap();
    assert!(!this.targets.keep(&old).await && this.targets.keep(&new).await);
}
