//! Owning a handle is owning the task.

use std::future::Future;
use tokio::task::JoinHandle;

/// A background task that ends when its handle is dropped.
#[derive(Debug)]
pub struct Task(Option<JoinHandle<()>>);

impl Task {
    /// Starts a task.
    pub fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(Some(tokio::spawn(future)))
    }

    /// Lets the task live on without an owner; it has to end by itself.
    pub fn detach(mut self) {
        self.0 = None;
    }

    /// Whether the task has come to its end.
    pub fn is_finished(&self) -> bool {
        self.0.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if let Some(handle) = self.0.take() {
            handle.abort();
        }
    }
}
