//! Lists that a server begins with although it may merely have lost them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What one watch tells, in the order in which it tells it.
///
/// An empty list as the first word of a session is not believed for a while if there is something to lose: a server that has lost its
/// storage, or has not read it yet, says the same. Once it has been held for long enough it is believed, unless something else was told,
/// or the session has ended.
#[derive(Debug)]
pub struct EmptyHold {
    name: &'static str,
    hold: Duration,
    version: Arc<AtomicU64>,
    fresh: bool,
}

/// Something that was told.
#[derive(Debug)]
pub struct Word {
    version: Arc<AtomicU64>,
    mine: u64,
}

impl Word {
    /// Whether it is the last word of a session that goes on. To be asked where nobody else can take a newer one meanwhile.
    pub fn stands(&self) -> bool {
        self.version.load(Ordering::Relaxed) == self.mine
    }
}

impl EmptyHold {
    /// Before the first session. `name`: of the watch, for the log; `hold`: how long an empty list is doubted.
    pub fn new(name: &'static str, hold: Duration) -> Self {
        EmptyHold { name, hold, version: Arc::default(), fresh: true }
    }

    /// The session is over; what the next one begins with is to be doubted, and what is held is no longer believed.
    pub fn lost(&mut self) {
        self.fresh = true;
        self.version.fetch_add(1, Ordering::Relaxed);
    }

    /// Something was told: `take` is called now, or after the hold or `sooner`, whichever is first. `empty`: an empty list; `to_lose`:
    /// more than that is known.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn take(
        &mut self,
        empty: bool,
        to_lose: bool,
        take: impl FnOnce(&Word) + Send + 'static,
        sooner: impl Future<Output = ()> + Send + 'static,
    ) {
        let mine = self.version.fetch_add(1, Ordering::Relaxed) + 1;
        let word = Word { version: self.version.clone(), mine };
        let fresh = std::mem::replace(&mut self.fresh, false);
        if !(fresh && empty && to_lose) {
            return take(&word);
        }
        let (watch, hold) = (self.name, self.hold);
        tracing::warn!(watch, ?hold, "a server that begins with an empty list: held back");
        tokio::spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(hold) => {}
                () = sooner => {}
            }
            take(&word);
        });
    }
}
