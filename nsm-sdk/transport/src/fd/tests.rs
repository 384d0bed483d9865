use super::*;
use std::{fs::File, io::ErrorKind, os::fd::OwnedFd, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, timeout},
};

fn pair() -> (FdStream, FdStream) {
    let (left, right) = UnixStream::pair().unwrap();
    let pair = (FdStream::new(left), FdStream::new(right));
    pair.1.transceiver().authenticated();
    pair
}

fn files(count: usize) -> (tempfile::TempDir, Vec<OwnedFd>) {
    let dir = tempfile::tempdir().unwrap();
    let open = |n| OwnedFd::from(File::create_new(dir.path().join(format!("{n}"))).unwrap());
    let files = (0..count).map(open).collect();
    (dir, files)
}

fn soon() -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(5))
}

#[tokio::test]
async fn descriptors_arrive_and_the_bytes_are_unchanged() {
    let (mut left, mut right) = pair();
    let (_dir, files) = files(5);
    let inodes: Vec<_> = files.into_iter().map(|fd| left.transceiver().queue(fd).unwrap()).collect();
    left.write_all(b"hello world").await.unwrap();
    let mut text = [0; 11];
    right.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"hello world");
    for (dev, ino) in inodes {
        let fd = right.transceiver().take(dev, ino, soon()).await.unwrap();
        assert_eq!(inode_of(&fd).unwrap(), (dev, ino));
        let flags = rustix::io::fcntl_getfd(&fd).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }
}

#[tokio::test]
async fn a_write_shorter_than_the_queue_keeps_the_rest() {
    let (mut left, mut right) = pair();
    let (_dir, files) = files(150);
    let inodes: Vec<_> = files.into_iter().map(|fd| left.transceiver().queue(fd).unwrap()).collect();
    assert_eq!(left.write(b"ab").await.unwrap(), 2);
    let mut text = [0; 200];
    right.read_exact(&mut text[..2]).await.unwrap();
    let (dev, ino) = inodes[2];
    let early = right.transceiver().take(dev, ino, Some(Instant::now() + Duration::from_millis(20))).await;
    assert_eq!(early.unwrap_err().kind(), ErrorKind::TimedOut);
    left.write_all(&[b'x'; 200]).await.unwrap();
    right.read_exact(&mut text).await.unwrap();
    assert_eq!(text, [b'x'; 200]);
    for (dev, ino) in inodes {
        right.transceiver().take(dev, ino, soon()).await.unwrap();
    }
}

#[tokio::test]
async fn two_descriptors_of_one_inode_are_one() {
    let (mut left, mut right) = pair();
    let (_dir, mut files) = files(1);
    let fd = files.remove(0);
    let first = left.transceiver().queue(fd.try_clone().unwrap()).unwrap();
    assert_eq!(left.transceiver().queue(fd).unwrap(), first);
    left.write_all(b"xy").await.unwrap();
    right.read_exact(&mut [0; 2]).await.unwrap();
    let fds = right.transceiver();
    let (one, two) =
        (fds.take(first.0, first.1, soon()).await.unwrap(), fds.take(first.0, first.1, soon()).await.unwrap());
    assert_eq!(inode_of(&one).unwrap(), inode_of(&two).unwrap());
    assert!(fds.release(first.0, first.1));
    assert!(!fds.release(first.0, first.1), "kept once only");
}

#[tokio::test]
async fn a_waiting_taker_is_woken_by_arrival_and_by_the_end() {
    let (mut left, mut right) = pair();
    let (_dir, mut files) = files(1);
    let (dev, ino) = inode_of(&files[0]).unwrap();
    let fds = right.transceiver();
    let waiting = tokio::spawn(async move { fds.take(dev, ino, None).await });
    tokio::task::yield_now().await;
    left.transceiver().queue(files.remove(0)).unwrap();
    left.write_all(b"x").await.unwrap();
    right.read_exact(&mut [0; 1]).await.unwrap();
    timeout(Duration::from_secs(5), waiting).await.unwrap().unwrap().unwrap();

    let fds = right.transceiver();
    let waiting = tokio::spawn(async move { fds.take(dev, ino + 1, None).await });
    tokio::task::yield_now().await;
    drop(left);
    assert_eq!(right.read(&mut [0; 1]).await.unwrap(), 0);
    let ended = timeout(Duration::from_secs(5), waiting).await.unwrap().unwrap();
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::ConnectionAborted);
}

#[tokio::test]
async fn a_full_socket_loses_neither_bytes_nor_descriptors() {
    let (mut left, mut right) = pair();
    let (_dir, files) = files(300);
    let fds = left.transceiver();
    let inodes: Vec<_> = files.into_iter().map(|fd| fds.queue(fd).unwrap()).collect();
    let sent: Vec<u8> = (0..2_000_000u32).map(|n| n as u8).collect();
    let expected = sent.clone();
    let writing = tokio::spawn(async move {
        left.write_all(&sent).await.unwrap();
        left
    });
    let mut received = vec![0; expected.len()];
    timeout(Duration::from_secs(20), right.read_exact(&mut received)).await.unwrap().unwrap();
    assert!(received == expected);
    writing.await.unwrap();
    for (dev, ino) in inodes {
        right.transceiver().take(dev, ino, soon()).await.unwrap();
    }
}

/// More descriptors in one message than a reader has room for: the kernel drops what is too much.
#[tokio::test]
async fn a_message_that_has_lost_descriptors_ends_the_connection() {
    let (left, mut right) = pair();
    let (_dir, files) = files(100);
    let fds: Vec<_> = files.iter().map(std::os::fd::AsFd::as_fd).collect();
    let missing = inode_of(&files[99]).unwrap();
    let waiting = {
        let fds = right.transceiver();
        tokio::spawn(async move { fds.take(missing.0, missing.1, soon()).await })
    };
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(100))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
    let bytes = [std::io::IoSlice::new(b"x")];
    rustix::net::sendmsg(left.socket(), &bytes, &mut control, rustix::net::SendFlags::NOSIGNAL).unwrap();
    let error = right.read(&mut [0; 1]).await.unwrap_err();
    assert!(error.to_string().contains("descriptors were lost"), "{error}");
    // Who waits for one of them hears at once that it will not come.
    let ended = timeout(Duration::from_secs(2), waiting).await.unwrap().unwrap();
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::ConnectionAborted);
}
