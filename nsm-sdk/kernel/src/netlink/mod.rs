//! Route netlink of one namespace: typed reads (dumps) and single changes. No policy lives here.

mod address;
mod link;
mod neighbour;
mod nsid;
mod route;
mod rule;

use std::io;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use tokio::runtime::Runtime;
use tokio::sync::Mutex;
use tokio::time::Sleep;

use crate::Error;

pub use address::Address;
pub use link::{BRIDGE, Link, LinkChange, Mac, VXLAN, VethEnd, VxlanParameters, mac_from_seed};
pub use neighbour::{Neighbour, NeighbourState};
pub use route::{NextHop, Route, RouteKind, TABLE_MAIN};
pub use rule::{PortRange, Rule};

pub(crate) use link::parse_link;
pub(crate) use neighbour::parse_neighbour;
pub(crate) use route::parse_route;
pub(crate) use rule::any;

const DUMP_INTERRUPTED: u16 = 0x10;
/// A dump that the kernel reports as torn by a concurrent change is repeated, but not for ever.
const DUMP_TRIES: usize = 5;

pub(crate) const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;
pub(crate) const REPLACE: u16 = NLM_F_CREATE | NLM_F_REPLACE;

/// A route netlink socket. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: Handle,
    /// What one exchange may take.
    limit: Duration,
    /// Held for the length of a dump: the kernel refuses a second one on the same socket with EBUSY.
    dumping: Arc<Mutex<()>>,
}

/// What one exchange with the kernel may take: it waits for a lock there that others hold for less than a second together. An
/// acknowledgement that was lost (the socket's buffer was full) never comes.
const LIMIT: Duration = Duration::from_secs(10);

/// Threads that drive the sockets. The kernel does what a message asks for within the call that sends it, and waits there for a lock
/// that the removal of an interface holds for tens of milliseconds: only other messages may wait behind it.
const DRIVERS: usize = 2;

fn driver() -> Result<&'static Runtime, Error> {
    static DRIVER: std::sync::Mutex<Option<&'static Runtime>> = std::sync::Mutex::new(None);
    let mut driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(driver) = *driver {
        return Ok(driver);
    }
    let build = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(DRIVERS)
            .thread_name("netlink")
            .enable_all()
            .build()
            .map_err(|e| Error::io("start the threads of netlink", e))
    };
    // Threads inherit the namespace of the one that starts them, which is a pod's if the first socket is opened there: these stay for
    // ever, and would hold the namespace and all its interfaces.
    let built = crate::netns::in_own(build)??;
    Ok(*driver.insert(Box::leak(Box::new(built))))
}

impl Netlink {
    /// Opens a socket in the namespace of the calling thread; its connection ends with the last clone.
    pub fn open() -> Result<Self, Error> {
        let driver = driver()?;
        let _driving = driver.enter();
        let (connection, handle, _) =
            rtnetlink::new_connection_with_strict_check().map_err(|e| Error::io("open netlink socket", e))?;
        driver.spawn(connection);
        Ok(Netlink { handle, limit: LIMIT, dumping: Arc::default() })
    }

    /// The library's own handle, for requests that this crate has no method for.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Sends a change and waits for the kernel's acknowledgement.
    pub(crate) async fn change(
        &self,
        what: impl FnOnce() -> String,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), Error> {
        match self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags).await {
            Ok(_) => Ok(()),
            Err(failure) => Err(failure.describe(what())),
        }
    }

    /// Asks for one object.
    pub(crate) async fn get(
        &self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let answer = self.exchange(message, NLM_F_REQUEST | NLM_F_ACK).await;
        answer.map(|(messages, _)| messages).map_err(|failure| failure.describe(what.to_string()))
    }

    /// Reads all objects that match `message`.
    pub(crate) async fn dump(
        &self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let mut found = Vec::new();
        for _ in 0..DUMP_TRIES {
            let (netlink, message) = (self.clone(), message.clone());
            let turn = self.dumping.clone().lock_owned().await;
            // A task of its own: the kernel goes on with a dump that its caller has given up, and so does the turn.
            let dump = tokio::spawn(async move {
                let answer = netlink.exchange(message, NLM_F_REQUEST | NLM_F_DUMP).await;
                drop(turn);
                answer
            });
            let answer = dump.await.unwrap_or_else(|error| Err(Failure::Connection(error.to_string())));
            let (messages, torn) = answer.map_err(|failure| failure.describe(what.to_string()))?;
            found = messages;
            if !torn {
                return Ok(found);
            }
        }
        Ok(found)
    }

    async fn exchange(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(Vec<RouteNetlinkMessage>, bool), Failure> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = flags;
        let mut handle = self.handle.clone();
        let late = sleep(self.limit).map_err(|e| Failure::Connection(e.to_string()))?;
        tokio::pin!(late);
        let mut answers = handle.request(request).map_err(|e| Failure::Connection(e.to_string()))?;
        let (mut found, mut torn) = (Vec::new(), false);
        loop {
            let answer = tokio::select! {
                biased;
                answer = answers.next() => answer,
                () = &mut late => return Err(Failure::Late(self.limit)),
            };
            let Some(answer) = answer else { break };
            torn |= answer.header.flags & DUMP_INTERRUPTED != 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(inner) => found.push(inner),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(Failure::Kernel(error.to_io())),
                NetlinkPayload::Overrun(_) => torn = true,
                _ => {}
            }
        }
        Ok((found, torn))
    }
}

/// A pause by the clock of the drivers: a caller's may stand still.
pub(crate) fn sleep(time: Duration) -> Result<Sleep, Error> {
    let _driving = driver()?.enter();
    Ok(tokio::time::sleep(time))
}

enum Failure {
    Late(Duration),
    Kernel(io::Error),
    Connection(String),
}

impl Failure {
    fn describe(self, what: String) -> Error {
        match self {
            Failure::Late(limit) => Error::Timeout { what, limit },
            Failure::Kernel(source) => Error::Netlink { what, source },
            Failure::Connection(cause) => Error::Connection { what, cause },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Error, Netlink, sleep};
    use crate::Netns;
    use std::time::Duration;

    impl Netlink {
        /// One whose requests nobody sends on, so that no answer ever comes.
        pub(crate) fn deaf(limit: Duration) -> Self {
            let _driving = super::driver().unwrap().enter();
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            std::mem::forget(connection);
            Self { handle, limit, dumping: Default::default() }
        }
    }

    /// With a clock that stands still, as the caller's may in a test: what is waited for is time of the kernel.
    #[tokio::test(start_paused = true)]
    async fn an_answer_that_does_not_come_is_not_waited_for_for_ever() {
        let netlink = Netlink::deaf(Duration::from_millis(200));
        let late = |error: Error| {
            assert!(matches!(error, Error::Timeout { .. }) && error.to_string().contains("no answer"), "{error}");
            assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
        };
        // The second dump is not held up by the turn of the first one.
        for _ in 0..2 {
            late(netlink.links().await.unwrap_err());
        }
        late(netlink.link_by_name("lo").await.unwrap_err());
        late(netlink.link_up(1).await.unwrap_err());
        let begin = std::time::Instant::now();
        sleep(Duration::from_millis(100)).unwrap().await;
        assert!(begin.elapsed() >= Duration::from_millis(100));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn dumps_of_one_namespace_at_the_same_time_all_succeed() {
        let netns = Netns::anonymous().unwrap();
        netns.netlink().await.unwrap().link_up(1).await.unwrap();
        let tasks: Vec<_> = (0..200)
            .map(|n| {
                let netns = netns.clone();
                tokio::spawn(async move {
                    let netlink = netns.netlink().await.unwrap();
                    match n % 4 {
                        // One who leaves in the middle does not spoil it for the others.
                        0 => {
                            drop(tokio::time::timeout(std::time::Duration::from_micros(n), netlink.routes(None)).await)
                        }
                        1 => assert!(!netlink.routes(None).await.unwrap().is_empty()),
                        2 => assert!(!netlink.addresses(None).await.unwrap().is_empty()),
                        _ => assert_eq!(netlink.links().await.unwrap().len(), 1),
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    }
}
