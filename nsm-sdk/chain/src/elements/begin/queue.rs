//! First come, first served, one at a time.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};
use tokio::sync::{Mutex, OwnedMutexGuard};

/// The line in front of one connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Queue(Arc<Mutex<()>>);

/// A place in the line, held from the moment [`Queue::enter`] was called.
pub(super) struct Ticket(Pin<Box<dyn Future<Output = OwnedMutexGuard<()>> + Send>>, Option<OwnedMutexGuard<()>>);

/// It is this operation's turn until the guard is dropped.
pub(super) struct Turn(#[allow(dead_code)] OwnedMutexGuard<()>);

impl Queue {
    /// Takes the last place. Returns at once; the order of calls is the order of turns.
    pub(super) fn enter(&self) -> Ticket {
        let mut lock: Pin<Box<dyn Future<Output = _> + Send>> = Box::pin(self.0.clone().lock_owned());
        // Polling once puts us into the mutex' fair wait list.
        let turn = match lock.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(turn) => Some(turn),
            Poll::Pending => None,
        };
        Ticket(lock, turn)
    }
}

impl Ticket {
    /// Waits for the turn.
    pub(super) async fn turn(self) -> Turn {
        match self {
            Self(_, Some(turn)) => Turn(turn),
            Self(lock, None) => Turn(lock.await),
        }
    }
}
