//! A unix socket whose reads and writes carry descriptors.

use super::FdTransceiver;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::AsFd,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::UnixStream,
};

/// Descriptors that one `recvmsg` has room for. The kernel ends a read at each message with descriptors, so one would do for peers
/// that send them one by one.
const PER_MESSAGE: usize = 64;

/// A unix stream socket that sends queued descriptors with its bytes and files those that arrive. TLS goes on top.
///
/// Every read has to be a `recvmsg`: with a plain `read` the kernel closes what was passed.
#[derive(Debug)]
pub struct FdStream {
    socket: UnixStream,
    fds: FdTransceiver,
}

impl FdStream {
    /// Takes over a connected socket.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, fds: FdTransceiver::default() }
    }

    /// The connection's descriptors.
    pub fn transceiver(&self) -> FdTransceiver {
        self.fds.clone()
    }

    /// The socket below.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PER_MESSAGE))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let message =
            recvmsg(self.socket.as_fd(), &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
        for ancillary in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = ancillary {
                fds.for_each(|fd| self.fds.arrived(fd));
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) {
            // Whoever waits for one of them would wait for nothing; on another connection it can be sent again.
            let text = "descriptors were lost: too many in one message, or too many files are open";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(message.bytes)
    }

    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut control = SendAncillaryBuffer::default();
        Ok(sendmsg(self.socket.as_fd(), &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
    }

    fn send_with_fd(&self, byte: &[u8], fd: impl AsFd) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd.as_fd()];
        control.push(SendAncillaryMessage::ScmRights(&fds));
        Ok(sendmsg(self.socket.as_fd(), &[IoSlice::new(byte)], &mut control, SendFlags::NOSIGNAL)?)
    }

    /// One non-blocking attempt: a byte for each queued descriptor, then the rest. What was sent is reported even if the socket
    /// filled up on the way; descriptors that found no byte stay queued.
    fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut sent = 0;
        while sent < bytes.len()
            && let Some(fd) = self.fds.next_queued()
        {
            match self.send_with_fd(bytes.get(sent..=sent).unwrap_or_default(), &fd) {
                Ok(n) => sent += n,
                Err(cause) => {
                    self.fds.requeue(fd);
                    return if sent > 0 { Ok(sent) } else { Err(cause) };
                }
            }
        }
        match self.send(bytes.get(sent..).unwrap_or_default()) {
            _ if sent == bytes.len() => Ok(sent),
            Ok(n) => Ok(sent + n),
            Err(_) if sent > 0 => Ok(sent),
            Err(cause) => Err(cause),
        }
    }
}

impl Drop for FdStream {
    fn drop(&mut self) {
        self.fds.close();
        self.fds.clear();
    }
}

impl AsyncRead for FdStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            ready!(self.socket.poll_read_ready(cx))?;
            // try_io clears the readiness when the attempt would block; without it the task would never be woken again.
            match self.socket.try_io(Interest::READABLE, || self.receive(buffer.initialize_unfilled())) {
                Ok(n) => {
                    if n == 0 {
                        self.fds.close();
                    }
                    buffer.advance(n);
                    return Poll::Ready(Ok(()));
                }
                Err(cause) if retry(&cause) => {}
                Err(cause) => {
                    self.fds.close();
                    return Poll::Ready(Err(cause));
                }
            }
        }
    }
}

impl AsyncWrite for FdStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        loop {
            ready!(self.socket.poll_write_ready(cx))?;
            match self.socket.try_io(Interest::WRITABLE, || self.try_send(bytes)) {
                Ok(n) => return Poll::Ready(Ok(n)),
                Err(cause) if retry(&cause) => {}
                Err(cause) => return Poll::Ready(Err(cause)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}

fn retry(cause: &io::Error) -> bool {
    matches!(cause.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
