//! Names from a counter, handed out by connection id.

use crate::elements::kernel_mechanism::NAME_LIMIT;
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Which connection has which name. Clones share it. It lives as long as the process, unless it is [kept in a file](Names::kept_in)
/// or saved and restored by its owner.
#[derive(Clone, Debug)]
pub struct Names(Arc<Mutex<Inner>>, String, Duration);

#[derive(Debug, Default)]
struct Inner {
    /// Name by connection id, and since when it waits to be free again.
    names: BTreeMap<String, (String, Option<Instant>)>,
    /// Where they are kept: a line for each, the name and, behind a space, the id.
    file: Option<PathBuf>,
}

impl Inner {
    fn all(&self) -> BTreeMap<String, String> {
        self.names.iter().map(|(id, (name, _))| (id.clone(), name.clone())).collect()
    }

    /// Replaces the file as a whole: who reads it finds the old or the new one.
    fn write(&self, path: &Path) -> io::Result<()> {
        let lines = self.all().into_iter().filter(|(id, _)| !id.contains('\n'));
        let text: String = lines.map(|(id, name)| format!("{name} {id}\n")).collect();
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        fs::write(&new, text)?;
        fs::rename(&new, path)
    }

    fn save(&self) {
        if let Some(path) = &self.file
            && let Err(cause) = self.write(path)
        {
            tracing::warn!(file = %path.display(), %cause, "after a restart interfaces may get other names");
        }
    }

    /// Until their connections come back they wait to be free.
    fn restore(&mut self, saved: impl IntoIterator<Item = (String, String)>) {
        for (id, name) in saved {
            if self.names.values().all(|(taken, _)| *taken != name) {
                self.names.entry(id).or_insert((name, Some(Instant::now())));
            }
        }
    }
}

impl Names {
    /// Names `prefix0`, `prefix1` ... A released name is free again after `delay`.
    pub fn new(prefix: impl Into<String>, delay: Duration) -> Self {
        Self(Arc::default(), prefix.into(), delay)
    }

    /// The same, kept in a file: what an earlier run has left there is taken over, and every change is written. A file that cannot be
    /// written is a warning, not an obstacle.
    ///
    /// # Errors
    /// There is a file, and it cannot be read.
    pub fn kept_in(self, file: impl Into<PathBuf>) -> io::Result<Self> {
        let file = file.into();
        let text = match fs::read_to_string(&file) {
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => String::new(),
            result => result?,
        };
        let saved = text.lines().filter_map(|line| line.split_once(' '));
        let ours = saved.filter(|(name, _)| name.starts_with(&self.1) && name.len() <= NAME_LIMIT);
        let mut inner = self.lock();
        inner.restore(ours.map(|(name, id)| (id.to_owned(), name.to_owned())));
        inner.file = Some(file);
        drop(inner);
        Ok(self)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.names.retain(|_, (_, released)| released.is_none_or(|at| at.elapsed() < self.2));
        inner
    }

    /// The name of a connection: the one it has, else `proposed` if that is of our kind and free, else the smallest
    /// free one. `None` if all names that fit into an interface name are taken.
    pub fn take(&self, id: &str, proposed: Option<&str>) -> Option<String> {
        let mut inner = self.lock();
        if let Some((name, released)) = inner.names.get_mut(id) {
            *released = None;
            return Some(name.clone());
        }
        let free = |inner: &Inner, name: &str| inner.names.values().all(|(taken, _)| taken != name);
        let ours = |name: &&str| name.starts_with(&self.1) && name.len() <= NAME_LIMIT;
        let name = match proposed.filter(ours).filter(|name| free(&inner, name)) {
            Some(name) => name.to_owned(),
            None => (0..=inner.names.len()).map(|n| format!("{}{n}", self.1)).find(|name| free(&inner, name))?,
        };
        if name.len() > NAME_LIMIT {
            return None;
        }
        inner.names.insert(id.to_owned(), (name.clone(), None));
        inner.save();
        Some(name)
    }

    /// Frees a connection's name after the delay, unless the connection takes it again before.
    pub fn release(&self, id: &str) {
        let mut inner = self.lock();
        if let Some((_, released)) = inner.names.get_mut(id) {
            *released = Some(Instant::now());
        }
        // Those whose time is over leave the file here.
        inner.save();
    }

    /// Names by connection id, released ones included.
    pub fn all(&self) -> BTreeMap<String, String> {
        self.lock().all()
    }

    /// Sets names that an earlier run has saved; existing ones win. Those whose connections do not come back are free after the delay.
    pub fn restore(&self, saved: impl IntoIterator<Item = (String, String)>) {
        let mut inner = self.lock();
        inner.restore(saved);
        inner.save();
    }
}
