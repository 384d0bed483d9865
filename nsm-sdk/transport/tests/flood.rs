//! What somebody without an identity can make a server keep: a process of its own, as open files are counted.
#![allow(clippy::unwrap_used, reason = "a test states what it expects by unwrapping it")]

use nsm_identity::Authority;
use nsm_transport::{Address, Listener, Transport, raise_open_files};
use std::{io::IoSlice, mem::MaybeUninit, os::fd::AsFd, os::unix::net::UnixStream, time::Duration};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

const HOUR: Duration = Duration::from_secs(3600);

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// One byte and one descriptor a message, as NSM sends them; each pipe is an inode of its own.
fn send(socket: &UnixStream, count: usize) {
    for _ in 0..count {
        let (pipe, _) = rustix::pipe::pipe().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        let fds = [pipe.as_fd()];
        control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds));
        // The beginning of a TLS record that is long enough to never be complete: type, version, length, and anything.
        let byte = [IoSlice::new(&[0x16])];
        if rustix::net::sendmsg(socket, &byte, &mut control, rustix::net::SendFlags::NOSIGNAL).is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_before_the_handshake_do_not_fill_the_table_of_open_files() {
    let authority = Authority::generate("example.org").unwrap();
    let transport = |name: &str| Transport::new(authority.source(name, HOUR).unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("server.sock"));
    let listener = Listener::bind(&address).await.unwrap();
    let (server, stop) = (transport("/server"), CancellationToken::new());
    let stopped = stop.clone();
    let serving = tokio::spawn(async move { server.serve(vec![listener], Routes::default(), stopped).await });

    let Address::Unix(path) = &address else { unreachable!() };
    let flooding: Vec<_> = (0..16).map(|_| UnixStream::connect(path).unwrap()).collect();
    let before = open_files();
    // The header of a record: the server waits for 16,384 bytes more.
    for socket in &flooding {
        std::io::Write::write_all(&mut &*socket, &[0x16, 3, 1, 0x40, 0]).unwrap();
    }
    for _ in 0..8 {
        flooding.iter().for_each(|socket| send(socket, 32));
        // The server has read all of it when nothing is left in its sockets.
        let link = transport("/client").dial(&address, Duration::from_secs(5)).await.unwrap();
        assert!(link.peer.is_some());
    }
    // 4,096 were sent. The server's ends of the connections count, and some that other threads have open for a moment.
    let more = open_files().saturating_sub(before);
    assert!(more < 16 * 8 + 64, "{more} files more are open");

    stop.cancel();
    serving.await.unwrap().unwrap();
}

#[test]
fn the_limit_of_open_files_is_raised_to_what_it_may_be() {
    use rustix::process::{Resource, getrlimit};
    let most = raise_open_files().unwrap();
    let limit = getrlimit(Resource::Nofile);
    assert_eq!((limit.current, limit.current.unwrap_or(u64::MAX)), (limit.maximum, most));
}
