//! Whether the bridge answers over the interface, and what it means if it does not.

use crate::context;
use futures_util::{StreamExt, stream::FuturesUnordered};
use nsm_chain::{CloseCall, Connection, Element, Error, Next, RequestCall, elements::heal::Liveness};
use nsm_kernel::{Netns, ping::Pinger};
use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// A bridge that has not answered yet may not answer pings at all: it is given this time before that counts.
pub(crate) const PROBE_GRACE: Duration = Duration::from_secs(30);
const PROBE_ECHOES: u32 = 3;

/// Pings the bridge from the target's own addresses. One answer of either family proves the wire: a dead wire is rebuilt, and that
/// takes the interface away, so doubt speaks for leaving it.
#[derive(Default)]
pub(crate) struct BridgeProbe {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    trust: Trust,
    /// Since when this wire is asked.
    first: Option<Instant>,
    /// That no socket can be had was told.
    warned: bool,
}

/// What silence means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Trust {
    /// Nothing has answered yet: for a while, nothing.
    #[default]
    New,
    /// The time was over, and the wire called dead.
    Condemned,
    /// Another wire was made for that reason. If that one is silent as well, it is the bridge that does not answer pings.
    Rebuilt,
    /// It does not: nothing.
    Unusable,
    /// It has answered before: a dead wire.
    Proven,
}

/// What asking the bridge has told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    Answered,
    Silent,
    /// The target's own addresses are not there: they went with the interface.
    Gone,
}

impl State {
    fn judge(&mut self, told: Told) -> bool {
        let first = *self.first.get_or_insert_with(Instant::now);
        let over = first.elapsed() >= PROBE_GRACE;
        self.trust = match (told, self.trust) {
            (Told::Answered, _) => Trust::Proven,
            (Told::Silent, Trust::New) if over => Trust::Condemned,
            (Told::Silent, Trust::Rebuilt) if over => {
                tracing::warn!(
                    "the bridge has never answered a ping, over a new wire either: NSM alone says what works"
                );
                Trust::Unusable
            }
            (_, same) => same,
        };
        match told {
            Told::Answered => true,
            Told::Silent => !matches!(self.trust, Trust::Condemned | Trust::Proven),
            // This needs no answer to be believed, only time for addresses to be set.
            Told::Gone => !over && matches!(self.trust, Trust::New | Trust::Rebuilt),
        }
    }
}

impl BridgeProbe {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the wire is taken for alive, by what asking has told. Who cannot ask does not know.
    fn judge(&self, told: Result<Told, nsm_kernel::Error>) -> bool {
        let mut state = self.state();
        match told {
            Ok(told) => state.judge(told),
            Err(error) => {
                if !std::mem::replace(&mut state.warned, true) {
                    tracing::warn!(%error, "the bridge cannot be pinged: NSM alone says what works");
                }
                true
            }
        }
    }

    /// There is another wire now.
    fn rebuilt(&self) {
        let mut state = self.state();
        if state.trust == Trust::Condemned {
            *state = State { trust: Trust::Rebuilt, first: None, warned: state.warned };
        }
    }
}

#[async_trait::async_trait]
impl Liveness for BridgeProbe {
    async fn alive(&self, connection: &Connection, timeout: Duration) -> bool {
        let ip_context = connection.context.as_ref().and_then(|context| context.ip_context.as_ref());
        let pairs = ip_context.map(context::probe_pairs).unwrap_or_default();
        if pairs.is_empty() {
            return true;
        }
        let told = match Netns::current() {
            Ok(netns) => ask(&netns, &pairs, timeout).await,
            Err(error) => Err(error),
        };
        self.judge(told)
    }
}

/// An answer of one counts more than silence of others, and that more than one that could not be asked.
async fn ask(netns: &Netns, pairs: &[(IpAddr, IpAddr)], timeout: Duration) -> Result<Told, nsm_kernel::Error> {
    let mut asked: FuturesUnordered<_> =
        pairs.iter().map(|&(source, bridge)| ask_one(netns, source, bridge, timeout)).collect();
    let (mut silent, mut failed) = (false, None);
    while let Some(told) = asked.next().await {
        match told {
            Ok(Told::Answered) => return told,
            Ok(Told::Silent) => silent = true,
            Ok(Told::Gone) => {}
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        _ if silent => Ok(Told::Silent),
        Some(error) => Err(error),
        None => Ok(Told::Gone),
    }
}

async fn ask_one(netns: &Netns, source: IpAddr, bridge: IpAddr, timeout: Duration) -> Result<Told, nsm_kernel::Error> {
    let pinger = match Pinger::open(netns, source.is_ipv6(), Some(source)).await {
        Err(error) if error.is_missing() => return Ok(Told::Gone),
        opened => opened?,
    };
    for _ in 0..PROBE_ECHOES {
        if pinger.probe(bridge, timeout / PROBE_ECHOES).await {
            return Ok(Told::Answered);
        }
    }
    Ok(Told::Silent)
}

/// Tells the probe of wires that are new: those of connections that are requested without a mechanism.
pub(crate) struct Rebuilt(pub(crate) Arc<BridgeProbe>);

#[async_trait::async_trait]
impl Element for Rebuilt {
    fn name(&self) -> &'static str {
        "rebuilt"
    }

    async fn request(&self, call: RequestCall, next: Next) -> Result<Connection, Error> {
        let new = call.connection().mechanism.is_none();
        let connection = next.request(call).await?;
        if new {
            self.0.rebuilt();
        }
        Ok(connection)
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        next.close(call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nsm_chain::{Chain, Context, Mechanism, NetworkServiceRequest};

    #[tokio::test(start_paused = true)]
    async fn a_bridge_that_never_answered_gets_time() {
        let probe = BridgeProbe::default();
        assert!(probe.judge(Ok(Told::Silent)));
        tokio::time::advance(PROBE_GRACE).await;
        assert!(!probe.judge(Ok(Told::Silent)));
        assert!(!probe.judge(Ok(Told::Silent)), "until it is rebuilt");
        assert!(probe.judge(Ok(Told::Answered)));
        assert!(!probe.judge(Ok(Told::Silent)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_bridge_that_never_answers_costs_one_rebuild() {
        let probe = BridgeProbe::default();
        probe.rebuilt();
        assert!(probe.judge(Ok(Told::Silent)));
        tokio::time::advance(PROBE_GRACE).await;
        assert!(!probe.judge(Ok(Told::Silent)));
        for _ in 0..3 {
            probe.rebuilt();
            assert!(probe.judge(Ok(Told::Silent)));
            tokio::time::advance(PROBE_GRACE).await;
            assert!(probe.judge(Ok(Told::Silent)));
        }
        assert!(probe.judge(Ok(Told::Answered)));
        assert!(!probe.judge(Ok(Told::Silent)), "it can answer");
        probe.rebuilt();
        assert!(!probe.judge(Ok(Told::Silent)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_cannot_ask_does_not_know() {
        let probe = BridgeProbe::default();
        let denied = || Err(nsm_kernel::Error::Invalid("no socket".into()));
        assert!(probe.judge(denied()));
        tokio::time::advance(2 * PROBE_GRACE).await;
        assert!(probe.judge(denied()));
        assert!(probe.judge(Ok(Told::Silent)), "time begins when it is asked");
        probe.judge(Ok(Told::Answered));
        assert!(probe.judge(denied()));
        assert!(!probe.judge(Ok(Told::Silent)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_interface_that_is_gone_is_dead_whatever_the_bridge_answers() {
        let probe = BridgeProbe::default();
        assert!(probe.judge(Ok(Told::Gone)), "it may be under way");
        tokio::time::advance(PROBE_GRACE).await;
        assert!(!probe.judge(Ok(Told::Gone)));
        assert!(!probe.judge(Ok(Told::Silent)));
        probe.rebuilt();
        assert!(probe.judge(Ok(Told::Gone)));
        tokio::time::advance(PROBE_GRACE).await;
        assert!(probe.judge(Ok(Told::Silent)));
        assert!(!probe.judge(Ok(Told::Gone)));
        assert!(probe.judge(Ok(Told::Silent)));
    }

    #[tokio::test]
    async fn an_address_that_is_not_there_is_gone() {
        let netns = Netns::current().unwrap();
        let pair = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        assert_eq!(ask(&netns, &[pair], Duration::from_millis(30)).await.unwrap(), Told::Gone);
    }

    /// Answers every request.
    struct End;

    #[async_trait::async_trait]
    impl Element for End {
        fn name(&self) -> &'static str {
            "end"
        }

        async fn request(&self, call: RequestCall, _: Next) -> Result<Connection, Error> {
            Ok(call.connection().into_owned())
        }

        async fn close(&self, _: CloseCall, _: Next) -> Result<(), Error> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_without_a_mechanism_makes_another_wire() {
        let probe = Arc::new(BridgeProbe::default());
        let chain = Chain::builder().element(Rebuilt(probe.clone())).element(End).build();
        probe.judge(Ok(Told::Silent));
        tokio::time::advance(PROBE_GRACE).await;
        assert!(!probe.judge(Ok(Told::Silent)));
        for (mechanism, alive) in [(Some(Mechanism::default()), false), (None, true)] {
            let connection = Connection { id: "c".into(), mechanism, ..Connection::default() };
            let request = NetworkServiceRequest { connection: Some(connection), ..Default::default() };
            chain.request(RequestCall::new(request, Context::new())).await.unwrap();
            assert_eq!(probe.judge(Ok(Told::Silent)), alive);
        }
    }
}
