//! Names interfaces of clients.

mod names;

pub use names::Names;

use super::kernel_mechanism::{KERNEL, NAME as INTERFACE};
use crate::{CloseCall, Connection, Element, Error, Mechanism, Next, RequestCall, State};
use tonic::Code;

/// Gives each connection an interface name of its own, the same over refreshes and, through [`Names::kept_in`], [`Names::restore`] or
/// a name proposed in the request, over restarts.
#[derive(Clone, Debug)]
pub struct InterfaceName(Names);

const NAME: &str = "interfacename";

impl InterfaceName {
    /// An element that takes from `names`.
    pub fn new(names: Names) -> Self {
        Self(names)
    }
}

fn interface(mechanism: &Mechanism) -> Option<&str> {
    mechanism.parameters.get(INTERFACE).map(String::as_str).filter(|name| !name.is_empty())
}

#[async_trait::async_trait]
impl Element for InterfaceName {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn request(&self, mut call: RequestCall, next: Next) -> Result<Connection, Error> {
        let id = call.id().to_owned();
        let request = &mut call.message;
        let connection = request.connection.get_or_insert_default();
        let chosen = connection.mechanism.as_ref().and_then(interface).map(str::to_owned);
        let preferences = &mut request.mechanism_preferences;
        let proposed = chosen.clone().or_else(|| preferences.iter().find_map(interface).map(str::to_owned));
        let name = self
            .0
            .take(&id, proposed.as_deref())
            .ok_or_else(|| Error::new(NAME, &id, "no interface name is free").with_code(Code::ResourceExhausted))?;
        for preference in preferences.iter_mut().filter(|preference| preference.r#type == KERNEL) {
            preference.parameters.insert(INTERFACE.into(), name.clone());
        }
        let first = chosen.is_none();
        if chosen.is_some_and(|chosen| chosen != name) {
            // An interface cannot be renamed under a running connection: it is made anew.
            connection.mechanism = None;
            connection.set_state(State::ReselectRequested);
        }
        let result = next.request(call).await;
        if result.is_err() && first {
            self.0.release(&id);
        }
        result
    }

    async fn close(&self, call: CloseCall, next: Next) -> Result<(), Error> {
        let id = call.id().to_owned();
        let result = next.close(call).await;
        self.0.release(&id);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Chain, Context,
        core::testing::{Spy, close, request_id},
    };
    use std::{sync::Arc, time::Duration};

    const DELAY: Duration = Duration::from_secs(600);

    fn kernel(name: &str) -> Mechanism {
        let parameters = [(INTERFACE.to_owned(), name.to_owned())].into();
        Mechanism { r#type: KERNEL.into(), parameters, ..Default::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn the_smallest_free_name_released_late() {
        let (names, spy) = (Names::new("nsm-", DELAY), Arc::new(Spy::default()));
        let chain = Chain::builder().element(InterfaceName::new(names.clone())).element(spy.clone()).build();
        let run = async |id: &str, proposed: &str| {
            let mut call = request_id(id, Context::new());
            call.message.mechanism_preferences = vec![kernel(proposed)];
            chain.request(call).await.unwrap();
            interface(&spy.last_request().mechanism_preferences[0]).unwrap().to_owned()
        };
        assert_eq!(run("a", "").await, "nsm-0");
        assert_eq!(run("b", "").await, "nsm-1");
        assert_eq!(run("a", "").await, "nsm-0");
        close(&chain, "a").await.unwrap();
        assert_eq!(run("c", "nsm-0").await, "nsm-2", "still reserved");
        assert_eq!(run("a", "").await, "nsm-0", "taken again");
        close(&chain, "a").await.unwrap();
        tokio::time::advance(DELAY).await;
        assert_eq!(run("d", "").await, "nsm-0");
        assert_eq!(run("e", "nsm-7").await, "nsm-7");
        assert_eq!(run("f", "eth0").await, "nsm-3");
        assert_eq!(run("g", "nsm-much-too-long").await, "nsm-4");
        let other = Names::new("nsm-", DELAY);
        other.restore(names.all());
        assert_eq!(other.take("b", None).unwrap(), "nsm-1");
        assert_eq!(Names::new("a-very-long-name", DELAY).take("a", None), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_keeps_names_over_restarts_and_frees_what_does_not_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("names");
        let run = || Names::new("nsm-", DELAY).kept_in(&file).unwrap();
        let names = run();
        for (id, expected) in [("a", "nsm-0"), ("b with a space", "nsm-1"), ("c", "nsm-2"), ("two\nlines", "nsm-3")] {
            assert_eq!(names.take(id, None).unwrap(), expected);
        }
        // Closed just before the end.
        names.release("c");
        drop(names);
        let names = run();
        assert_eq!(names.take("new", None).unwrap(), "nsm-3");
        assert_eq!(names.take("b with a space", None).unwrap(), "nsm-1");
        tokio::time::advance(DELAY).await;
        // Neither the closed one nor one that has not come back keeps its name for ever; one that has does.
        assert_eq!(names.take("d", None).unwrap(), "nsm-0");
        assert_eq!(names.take("e", None).unwrap(), "nsm-2");
        assert_eq!(names.take("f", None).unwrap(), "nsm-4");
        drop(names);
        assert_eq!(run().all().len(), 5);

        // Nonsense is nobody's name, and a folder that is not there is no obstacle.
        std::fs::write(&file, "eth0 a\nnsm-0\nnsm-much-too-long b\nnsm-5 c\n").unwrap();
        assert_eq!(run().all(), [("c".to_owned(), "nsm-5".to_owned())].into());
        let nowhere = Names::new("nsm-", DELAY).kept_in(folder.path().join("no/names")).unwrap();
        assert_eq!(nowhere.take("a", None).unwrap(), "nsm-0");
        assert!(Names::new("nsm-", DELAY).kept_in(folder.path()).is_err(), "a folder cannot be read");
    }

    #[tokio::test]
    async fn another_name_for_a_running_connection_makes_it_anew() {
        let (names, spy) = (Names::new("nsm-", DELAY), Arc::new(Spy::default()));
        let chain = Chain::builder().element(InterfaceName::new(names)).element(spy.clone()).build();
        let mut call = request_id("a", Context::new());
        call.connection_mut().mechanism = Some(kernel("eth0"));
        chain.request(call).await.unwrap();
        let connection = spy.last_request().connection.unwrap();
        assert_eq!((connection.mechanism.is_none(), connection.state()), (true, State::ReselectRequested));
    }
}
