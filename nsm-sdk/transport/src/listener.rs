//! Listening sockets.

use crate::{Address, Error, FdStream, stream::Socket};
use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::Path,
};
use tokio::net::{TcpListener, UnixListener};

/// A bound socket. Dropping it leaves the file of a unix socket behind, as NSM does; the next bind removes it.
#[derive(Debug)]
pub struct Listener {
    socket: Bound,
    address: Address,
}

#[derive(Debug)]
enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Binds. For a unix socket: parent folders are made, a stale socket file is removed, and everybody may connect (mode 0777);
    /// TLS decides who may talk.
    pub async fn bind(address: &Address) -> Result<Self, Error> {
        let fail = |cause| Error::Listen { address: address.to_string(), cause };
        match address {
            Address::Unix(path) => {
                let socket = bind_unix(path).map_err(fail)?;
                Ok(Self { socket: Bound::Unix(socket), address: address.clone() })
            }
            Address::Tcp(host) => {
                let socket = bind_tcp(host).await.map_err(fail)?;
                let port = socket.local_addr().map_err(fail)?.port();
                let name = host.rsplit_once(':').map_or("", |(name, _)| name);
                Ok(Self { socket: Bound::Tcp(socket), address: Address::Tcp(format!("{name}:{port}")) })
            }
        }
    }

    /// Where it listens; a port of 0 is replaced by the real one.
    pub fn address(&self) -> &Address {
        &self.address
    }

    pub(crate) async fn accept(&self) -> io::Result<Socket> {
        match &self.socket {
            Bound::Tcp(listener) => {
                let (socket, _) = listener.accept().await?;
                // tonic's own setting is for listeners it made itself.
                socket.set_nodelay(true)?;
                Ok(Socket::Tcp(socket))
            }
            Bound::Unix(listener) => {
                let (socket, _) = listener.accept().await?;
                Ok(Socket::Unix(FdStream::new(socket)))
            }
        }
    }
}

async fn bind_tcp(host: &str) -> io::Result<TcpListener> {
    match host.strip_prefix(':') {
        // All addresses, both families where the kernel has IPv6.
        Some(port) => {
            let port: u16 = port.parse().map_err(io::Error::other)?;
            match TcpListener::bind(SocketAddr::from(([0u16; 8], port))).await {
                Err(cause) if cause.kind() != io::ErrorKind::AddrInUse => {
                    TcpListener::bind(SocketAddr::from(([0u8; 4], port))).await
                }
                result => result,
            }
        }
        None => TcpListener::bind(host).await,
    }
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent)?;
    }
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => return Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is not a socket is in the way")),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
        Err(cause) => return Err(cause),
    }
    let socket = UnixListener::bind(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o777))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    // Conformance 108
    #[tokio::test]
    async fn folders_are_made_and_stale_sockets_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/nsm.io.sock");
        let address = Address::Unix(path.clone());
        let first = Listener::bind(&address).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o777);
        // A file of an earlier run, whoever still has it open.
        let second = Listener::bind(&address).await.unwrap();
        let (connected, accepted) = tokio::join!(tokio::net::UnixStream::connect(&path), second.accept());
        assert!(connected.is_ok() && accepted.is_ok());
        drop((first, second));
        assert!(path.exists(), "the file stays, as with NSM");
        Listener::bind(&address).await.unwrap();
    }

    // Conformance 108
    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "data").unwrap();
        let error = Listener::bind(&Address::Unix(path.clone())).await.unwrap_err();
        assert!(error.to_string().contains("precious"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"data");
    }

    // Conformance 108
    #[tokio::test]
    async fn port_zero_becomes_the_real_port() {
        let listener = Listener::bind(&Address::parse("tcp://127.0.0.1:0").unwrap()).await.unwrap();
        let Address::Tcp(host) = listener.address().clone() else { panic!("{}", listener.address()) };
        assert!(host.starts_with("127.0.0.1:") && !host.ends_with(":0"), "{host}");
        let (connected, accepted) = tokio::join!(tokio::net::TcpStream::connect(host), listener.accept());
        assert!(connected.is_ok() && accepted.is_ok());
        assert!(Listener::bind(listener.address()).await.is_err(), "taken");
    }
}
