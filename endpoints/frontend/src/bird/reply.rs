//! Reader of the reply codes on BIRD's control socket.
//!
//! `NNNN-text` continues, `NNNN text` ends a reply, a leading space repeats the last code, `+text` is told at any
//! time and belongs to no reply. 8xxx are run-time errors, 9xxx the parser's. The text may be empty, the blank before
//! it is always there.

/// One line of a reply: code and text.
pub type Line = (u16, String);

/// A complete reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// Its lines; the last one decides.
    pub lines: Vec<Line>,
}

impl Reply {
    /// Code of the closing line.
    pub fn code(&self) -> u16 {
        self.lines.last().map_or(0, |line| line.0)
    }

    /// Whether BIRD refused.
    pub fn is_error(&self) -> bool {
        self.code() >= 8000
    }

    /// Texts of all lines with this code.
    pub fn with_code(&self, code: u16) -> impl Iterator<Item = &str> {
        self.lines.iter().filter(move |line| line.0 == code).map(|line| line.1.as_str())
    }

    /// Text of the closing line.
    pub fn last_text(&self) -> &str {
        self.lines.last().map_or("", |line| line.1.as_str())
    }
}

/// What one line means.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// Part of a reply that goes on.
    More,
    /// A reply is complete.
    Done(Reply),
    /// Something BIRD told on its own.
    Told(String),
}

/// Collects lines into replies.
#[derive(Debug, Default)]
pub struct Parser {
    partial: Reply,
}

impl Parser {
    /// Takes one line without its line feed. A line that follows no rule is an error: the two sides lost step.
    pub fn line(&mut self, line: &str) -> Result<Event, String> {
        if let Some(told) = line.strip_prefix('+') {
            return Ok(Event::Told(told.to_owned()));
        }
        if let Some(text) = line.strip_prefix(' ') {
            let code = self.partial.code();
            self.partial.lines.push((code, text.to_owned()));
            return Ok(Event::More);
        }
        if line.is_empty() {
            return Ok(Event::More);
        }
        let (Some(code), Some(kind)) = (line.get(..4).and_then(|code| code.parse().ok()), line.as_bytes().get(4))
        else {
            return Err(format!("unexpected line {line:?}"));
        };
        let text = line.get(5..).unwrap_or_default().to_owned();
        self.partial.lines.push((code, text));
        match kind {
            b'-' => Ok(Event::More),
            b' ' => Ok(Event::Done(std::mem::take(&mut self.partial))),
            _ => Err(format!("unexpected line {line:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(text: &str) -> (Vec<Reply>, Vec<String>) {
        let (mut parser, mut replies, mut told) = (Parser::default(), vec![], vec![]);
        for line in text.split('\n') {
            match parser.line(line).expect("line") {
                Event::More => {}
                Event::Done(reply) => replies.push(reply),
                Event::Told(text) => told.push(text),
            }
        }
        (replies, told)
    }

    #[test]
    fn a_told_line_may_come_in_the_middle() {
        let (replies, told) = feed(
            "0002-Reading configuration from /x\n+Reconfiguring\n0003 Reconfigured\n+NBR-a: Down\n8003 No protocols match",
        );
        assert_eq!(told, ["Reconfiguring", "NBR-a: Down"]);
        assert_eq!(replies[0].code(), 3);
        assert_eq!(replies[0].lines.len(), 2);
        assert!(!replies[0].is_error());
        assert!(replies[1].is_error());
        assert_eq!(replies[1].last_text(), "No protocols match");
    }

    #[test]
    fn repeated_codes_and_an_empty_end() {
        let (replies, _) = feed("2002-Name\n1002-a BGP\n b BGP\n1006-\n0000 ");
        assert_eq!(replies[0].with_code(1002).collect::<Vec<_>>(), ["a BGP", "b BGP"]);
        assert_eq!(replies[0].code(), 0);
        assert_eq!(replies[0].last_text(), "");
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        for bad in ["12", "abcd text", "0001?x", "ééé x"] {
            assert!(Parser::default().line(bad).is_err(), "{bad}");
        }
    }
}
