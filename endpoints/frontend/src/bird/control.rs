//! Client of BIRD's control socket: one command at a time, one connection kept.
//!
//! The kept connection has two uses beside commands. BIRD tells state changes on it (`echo all`), and it breaks in the
//! moment BIRD dies, whoever started it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::reply::{Event, Parser, Reply};
use crate::error::Error;

/// Longest answer taken; a full `show protocols all` of 100 gateways is some 200 KB.
const BUFFER_MAX: usize = 16 << 20;
/// BIRD answers within milliseconds; a longer silence is a hung process.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// An open connection to BIRD.
#[derive(Debug)]
pub struct Control {
    socket: PathBuf,
    stream: UnixStream,
    buffer: Vec<u8>,
    parser: Parser,
    told: bool,
}

impl Control {
    /// Connects and waits for the greeting.
    pub async fn connect(socket: &Path) -> Result<Self, Error> {
        let fail = |cause| Error::Control { socket: socket.to_owned(), cause };
        let stream = UnixStream::connect(socket).await.map_err(fail)?;
        let (buffer, parser) = (Vec::new(), Parser::default());
        let mut control = Self { socket: socket.to_owned(), stream, buffer, parser, told: false };
        let greeting = control.answer().await?;
        if greeting.code() != 1 {
            return Err(Error::Protocol { socket: socket.to_owned(), text: format!("greeted by {greeting:?}") });
        }
        Ok(control)
    }

    /// Process id of BIRD.
    pub fn pid(&self) -> Option<i32> {
        self.stream.peer_cred().ok()?.pid()
    }

    /// Sends one command and reads its reply. A refusal is an error.
    pub async fn command(&mut self, command: &str) -> Result<Reply, Error> {
        let reply = self.ask(command).await?;
        if reply.is_error() {
            return Err(Error::Refused { command: command.to_owned(), text: reply.last_text().to_owned() });
        }
        Ok(reply)
    }

    /// Sends one command and reads its reply, whatever it is.
    pub async fn ask(&mut self, command: &str) -> Result<Reply, Error> {
        let line = format!("{command}\n");
        let sent = tokio::time::timeout(ANSWER_TIMEOUT, self.stream.write_all(line.as_bytes())).await;
        sent.map_err(io::Error::from).flatten().map_err(|cause| self.fail(cause))?;
        self.answer().await
    }

    /// Waits until BIRD tells something on its own. An error means that BIRD is gone. Cancellation loses nothing.
    pub async fn told(&mut self) -> Result<(), Error> {
        loop {
            while let Some(event) = self.next_event()? {
                if let Event::Done(reply) = event {
                    return Err(self.lost_step(&format!("reply without a command: {reply:?}")));
                }
            }
            if std::mem::take(&mut self.told) {
                return Ok(());
            }
            self.fill().await?;
        }
    }

    async fn answer(&mut self) -> Result<Reply, Error> {
        let read = async {
            loop {
                while let Some(event) = self.next_event()? {
                    if let Event::Done(reply) = event {
                        return Ok(reply);
                    }
                }
                self.fill().await?;
            }
        };
        match tokio::time::timeout(ANSWER_TIMEOUT, read).await {
            Ok(answer) => answer,
            Err(elapsed) => Err(self.fail(elapsed.into())),
        }
    }

    fn next_event(&mut self) -> Result<Option<Event>, Error> {
        let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') else { return Ok(None) };
        let line: Vec<u8> = self.buffer.drain(..=end).collect();
        let line = String::from_utf8_lossy(line.get(..end).unwrap_or_default()).into_owned();
        let event = self.parser.line(&line).map_err(|text| self.lost_step(&text))?;
        if let Event::Told(text) = &event {
            tracing::trace!(target: "bird", "{text}");
            self.told = true;
        }
        Ok(Some(event))
    }

    async fn fill(&mut self) -> Result<(), Error> {
        let read = self.stream.read_buf(&mut self.buffer).await;
        match read.map_err(|cause| self.fail(cause))? {
            0 => Err(self.fail(io::ErrorKind::UnexpectedEof.into())),
            _ if self.buffer.len() > BUFFER_MAX => Err(self.lost_step("answer without an end")),
            _ => Ok(()),
        }
    }

    fn fail(&self, cause: io::Error) -> Error {
        Error::Control { socket: self.socket.clone(), cause }
    }

    fn lost_step(&self, text: &str) -> Error {
        Error::Protocol { socket: self.socket.clone(), text: text.to_owned() }
    }
}

/// A path or pattern as BIRD's parser reads it; its strings know no escapes.
pub fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace(['"', '\n'], ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn served(answers: &'static [&'static str]) -> (tempfile::TempDir, Control) {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("bird.ctl");
        let listener = tokio::net::UnixListener::bind(&path).expect("bind");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("accept");
            stream.write_all(b"0001 BIRD 2.0.12 ready.\n").await.expect("greet");
            for answer in answers {
                let mut line = [0; 256];
                let _ = stream.read(&mut line).await.expect("command");
                // In two writes, so that a reply arrives in pieces.
                let (first, second) = answer.as_bytes().split_at(answer.len() / 2);
                stream.write_all(first).await.expect("write");
                tokio::task::yield_now().await;
                stream.write_all(second).await.expect("write");
            }
        });
        let control = Control::connect(&path).await.expect("connect");
        (dir, control)
    }

    #[tokio::test]
    async fn replies_in_pieces_with_news_between() {
        let (_dir, mut control) = served(&["0000 \n", "0002-Reading\n+NBR-a: Down\n0003 Reconfigured\n"]).await;
        assert_eq!(control.command("echo all").await.expect("echo").code(), 0);
        assert_eq!(control.command("configure").await.expect("configure").last_text(), "Reconfigured");
        control.told().await.expect("the news are not lost");
        assert!(matches!(control.told().await, Err(Error::Control { .. })), "the end of BIRD is noticed");
    }

    #[tokio::test]
    async fn refusals_are_errors_of_the_command() {
        let (_dir, mut control) = served(&["9001 syntax error\n"]).await;
        assert!(matches!(control.command("x").await, Err(Error::Refused { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn a_hung_bird_is_an_error_in_time() {
        let (_dir, mut control) = served(&["0002-Reading\n"]).await;
        assert!(matches!(control.command("x").await, Err(Error::Control { .. })));
    }
}
