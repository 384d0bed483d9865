//! What an application sees of its connection.

use crate::Connection;
use tokio::sync::watch;

/// State of a connection for the application that asked for it.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum ConnectionStatus {
    /// Not established yet.
    #[default]
    New,
    /// Established, with its current value.
    Up(Box<Connection>),
    /// Lost; healing is under way. The data path may work all the same.
    Down(Box<Connection>),
    /// Closed.
    Closed,
}

impl ConnectionStatus {
    /// The last value, up or down.
    pub fn connection(&self) -> Option<&Connection> {
        match self {
            Self::Up(connection) | Self::Down(connection) => Some(connection),
            Self::New | Self::Closed => None,
        }
    }

    /// Whether it is established and not known to be lost.
    pub fn is_up(&self) -> bool {
        matches!(self, Self::Up(_))
    }
}

/// Put into a request's context by the application: `observe` and `heal` report there.
#[derive(Clone, Debug)]
pub struct StatusSender(pub watch::Sender<ConnectionStatus>);

impl StatusSender {
    /// Sets the status; receivers are told only of changes.
    pub fn set(&self, status: ConnectionStatus) {
        self.0.send_if_modified(|current| {
            let changed = *current != status;
            *current = status;
            changed
        });
    }
}
