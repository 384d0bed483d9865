//! The one entry of the configuration map, which more than one thread of this process writes.

use std::sync::{Mutex, PoisonError};

use meridio_decision::layout::Config;

use crate::error::Error;
use crate::sys::RawMap;

/// The entry as it was written last, and the way to write it.
#[derive(Debug)]
pub(crate) struct ConfigEntry {
    map: RawMap,
    entry: Mutex<Config>,
}

impl ConfigEntry {
    /// Reads what an earlier process has left.
    pub(crate) fn open(map: &RawMap) -> Result<Self, Error> {
        let failed = |e: std::io::Error| Error::Map { name: map.name, reason: e.to_string() };
        let entry = map.get(&0u32, Config::default()).map_err(failed)?.unwrap_or_default();
        Ok(ConfigEntry { map: map.try_clone().map_err(failed)?, entry: Mutex::new(entry) })
    }

    /// The entry.
    pub(crate) fn get(&self) -> Config {
        *self.entry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes a changed entry.
    ///
    /// # Errors
    /// The kernel refuses; the entry is what it was.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Config)) -> Result<(), Error> {
        let mut entry = self.entry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut changed = *entry;
        change(&mut changed);
        let failed = |e: std::io::Error| Error::Map { name: self.map.name, reason: e.to_string() };
        self.map.set(&0u32, &changed).map_err(failed)?;
        *entry = changed;
        Ok(())
    }
}
