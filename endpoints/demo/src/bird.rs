//! The gateway's BIRD, asked over its control socket.

use std::io::{BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// A BGP session of the gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// Name of the protocol.
    pub name: String,
    /// Whether it is established.
    pub established: bool,
    /// State in BIRD's words.
    pub info: String,
}

/// Sends one command and returns the lines of its reply, codes cut off.
///
/// # Errors
/// If BIRD is away, does not answer within 2 s, or answers with an error.
pub fn command(socket: &Path, command: &str) -> Result<Vec<String>> {
    let stream = UnixStream::connect(socket).with_context(|| format!("connect to BIRD at {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(2))).context("read timeout")?;
    let mut reader = BufReader::new(stream.try_clone().context("clone the socket")?);
    read_reply(&mut reader).context("BIRD's greeting")?;
    (&stream).write_all(format!("{command}\n").as_bytes()).context("write to BIRD")?;
    read_reply(&mut reader).with_context(|| format!("BIRD: {command}"))
}

fn read_reply(reader: &mut impl std::io::BufRead) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).context("read")? == 0 {
            bail!("closed");
        }
        let line = line.trim_end();
        // `1002-text` goes on, `0000 text` ends, ` text` belongs to the line before.
        match (line.get(..4).filter(|code| code.bytes().all(|byte| byte.is_ascii_digit())), line.get(4..5)) {
            (Some(_), Some("-")) => lines.push(line.get(5..).unwrap_or_default().to_owned()),
            (Some(code), _) => {
                let text = line.get(5..).unwrap_or_default();
                if code.starts_with('8') || code.starts_with('9') {
                    bail!("{text}");
                }
                if !text.is_empty() {
                    lines.push(text.to_owned());
                }
                return Ok(lines);
            }
            (None, _) => lines.push(line.trim_start().to_owned()),
        }
    }
}

/// BGP sessions.
///
/// # Errors
/// Those of [`command`].
pub fn sessions(socket: &Path) -> Result<Vec<Session>> {
    Ok(parse_sessions(&command(socket, "show protocols")?))
}

fn parse_sessions(lines: &[String]) -> Vec<Session> {
    let words = lines.iter().map(|line| line.split_whitespace().collect::<Vec<_>>());
    words
        .filter(|words| words.get(1) == Some(&"BGP"))
        .map(|words| {
            let info = words.get(5..).unwrap_or_default().join(" ");
            Session { name: words[0].to_owned(), established: info.starts_with("Established"), info }
        })
        .collect()
}

/// (address, whether it is up) of BFD sessions.
///
/// # Errors
/// Those of [`command`].
pub fn bfd(socket: &Path) -> Result<Vec<(String, bool)>> {
    Ok(parse_bfd(&command(socket, "show bfd sessions")?))
}

fn parse_bfd(lines: &[String]) -> Vec<(String, bool)> {
    let words = lines.iter().map(|line| line.split_whitespace().collect::<Vec<_>>());
    words
        .filter(|words| words.first().is_some_and(|word| word.parse::<std::net::IpAddr>().is_ok()))
        .map(|words| (words[0].to_owned(), words.get(2) == Some(&"Up")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_of_several_lines_are_read_to_their_end() {
        let text = "2002-Name       Proto      Table      State  Since         Info\n1002-device1    Device     ---        up     22:45:12.049  \n \
                    LB1V4      BGP        ---        up     22:45:12.049  Established   \n LB2V4      BGP        ---        start  22:45:12.049  Passive       \n0000 \n";
        let lines = read_reply(&mut text.as_bytes()).unwrap();
        let sessions = parse_sessions(&lines);
        assert_eq!(sessions.len(), 2);
        assert!(sessions[0].established && !sessions[1].established, "{sessions:?}");
        assert!(read_reply(&mut "9001 syntax error\n".as_bytes()).is_err());
    }

    #[test]
    fn bfd_sessions_have_an_address_and_a_state() {
        let lines = [
            "bfd1:",
            "IP address                Interface  State      Since         Interval  Timeout",
            "169.254.100.2             ext0       Up         22:45:12.049    0.050    0.150",
        ];
        assert_eq!(parse_bfd(&lines.map(str::to_owned)), [("169.254.100.2".to_owned(), true)]);
    }
}
