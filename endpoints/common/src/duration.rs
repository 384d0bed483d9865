//! Durations in the syntax of Go's `time.ParseDuration`, which the settings of the original use.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Error;

/// A non-negative duration written as in Go: `10m`, `500ms`, `1m30s`, `1.5h`, `0`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GoDuration(pub Duration);

impl GoDuration {
    /// The duration itself.
    pub fn get(self) -> Duration {
        self.0
    }
}

impl From<Duration> for GoDuration {
    fn from(value: Duration) -> Self {
        Self(value)
    }
}

impl From<GoDuration> for Duration {
    fn from(value: GoDuration) -> Self {
        value.0
    }
}

impl std::ops::Deref for GoDuration {
    type Target = Duration;

    fn deref(&self) -> &Duration {
        &self.0
    }
}

const UNITS: [(&str, u128); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// Nanoseconds of one `<decimal><unit>` at the start of `text`, and what follows it.
fn element(text: &str) -> Result<(u128, &str), &'static str> {
    let number_len =
        text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or("missing unit (ns, us, ms, s, m, h)")?;
    let (number, rest) = text.split_at(number_len);
    let unit_len = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(unit_len);
    let scale = UNITS.iter().find(|(name, _)| *name == unit).ok_or("unknown unit (use ns, us, ms, s, m, h)")?.1;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err("not a number");
    }
    let mut nanos = 0u128;
    for digit in whole.bytes() {
        nanos = nanos.checked_mul(10).and_then(|n| n.checked_add(u128::from(digit - b'0'))).ok_or("too large")?;
    }
    nanos = nanos.checked_mul(scale).ok_or("too large")?;
    let mut part = scale;
    for digit in fraction.bytes() {
        // 20 digits are below a nanosecond for every unit.
        nanos += part * u128::from(digit - b'0') / 10;
        part /= 10;
    }
    Ok((nanos, rest))
}

fn parse(text: &str) -> Result<Duration, &'static str> {
    let mut rest = text.trim();
    if rest.starts_with('-') {
        return Err("must not be negative");
    }
    rest = rest.strip_prefix('+').unwrap_or(rest);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err("is empty");
    }
    let mut total = 0u128;
    while !rest.is_empty() {
        let (nanos, after) = element(rest)?;
        total = total.checked_add(nanos).ok_or("too large")?;
        rest = after;
    }
    // Go's limit: a signed 64-bit count of nanoseconds, about 292 years.
    let total = u64::try_from(total).ok().filter(|n| *n <= i64::MAX as u64).ok_or("too large")?;
    Ok(Duration::from_nanos(total))
}

impl FromStr for GoDuration {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map(Self).map_err(|reason| Error::Duration { text: text.to_owned(), reason })
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = self.0.as_nanos();
        if left == 0 {
            return f.write_str("0s");
        }
        for (unit, scale) in [
            ("h", 3_600_000_000_000),
            ("m", 60_000_000_000),
            ("s", 1_000_000_000),
            ("ms", 1_000_000),
            ("us", 1_000),
            ("ns", 1),
        ] {
            let count = left / scale;
            if count > 0 {
                write!(f, "{count}{unit}")?;
                left -= count * scale;
            }
        }
        Ok(())
    }
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_syntax() {
        for (text, millis) in [
            ("10m", 600_000),
            ("500ms", 500),
            ("1m30s", 90_000),
            ("1.5h", 5_400_000),
            ("0", 0),
            ("0s", 0),
            (".5s", 500),
            ("+2s", 2000),
            ("24h", 86_400_000),
        ] {
            assert_eq!(text.parse::<GoDuration>().unwrap().get(), Duration::from_millis(millis), "{text}");
        }
        assert_eq!("3us7ns".parse::<GoDuration>().unwrap().get(), Duration::from_nanos(3007));
        for text in ["", "10", "-1s", "1x", "s", ".s", "1..2s", "1 s", "99999999999h", "300y"] {
            assert!(text.parse::<GoDuration>().is_err(), "{text}");
        }
    }

    #[test]
    fn text_form_reads_back() {
        for text in ["10m", "1m30s", "500ms", "1h1us", "0s"] {
            assert_eq!(text.parse::<GoDuration>().unwrap().to_string(), text);
        }
        assert_eq!("1.5h".parse::<GoDuration>().unwrap().to_string(), "1h30m");
    }
}
