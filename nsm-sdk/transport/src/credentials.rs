//! Per-RPC credentials: the path token in gRPC metadata.

use nsm_identity::{Peer, Svid, X509Source};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataMap, MetadataValue},
    service::Interceptor,
};

/// Metadata key of the token.
pub const TOKEN_HEADER: &str = "nsm-client-token";
/// Metadata key of the token's end, RFC 3339.
pub const TOKEN_EXPIRES_HEADER: &str = "nsm-client-token-expires";

/// The token a client sent with a call. Not verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientToken {
    /// The JWT.
    pub jwt: String,
    /// When it ends, as the client says.
    pub expires: SystemTime,
}

/// The token of a call. `None` unless both keys are there exactly once and can be read.
pub fn client_token(metadata: &MetadataMap) -> Option<ClientToken> {
    let single = |key: &str| {
        let mut values = metadata.get_all(key).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => value.to_str().ok(),
            _ => None,
        }
    };
    let expires = parse_rfc3339(single(TOKEN_EXPIRES_HEADER)?)?;
    Some(ClientToken { jwt: single(TOKEN_HEADER)?.to_owned(), expires })
}

/// Adds a token for one peer to each call.
#[derive(Clone, Debug)]
pub struct PerRpcToken {
    source: X509Source,
    svid: Arc<Svid>,
    peer: Peer,
    max_lifetime: Duration,
}

impl PerRpcToken {
    /// Tokens for `peer` that end after `max_lifetime`, or with the own or the peer's certificate. They are signed by `svid`, the
    /// one that the connection was made with: the peer checks them with the certificate that it was shown then.
    pub fn new(source: X509Source, svid: Arc<Svid>, peer: Peer, max_lifetime: Duration) -> Self {
        Self { source, svid, peer, max_lifetime }
    }

    /// Whether the connection was made with the newest SVID.
    pub fn is_current(&self) -> bool {
        Arc::ptr_eq(&self.svid, &self.source.svid())
    }

    fn values(&self) -> Result<(MetadataValue<Ascii>, MetadataValue<Ascii>), Status> {
        let fail = |cause: String| Status::unauthenticated(format!("no token for {}: {cause}", self.peer.spiffe_id));
        let token = self
            .source
            .token_by(&self.svid, Some(&self.peer.spiffe_id), self.max_lifetime)
            .map_err(|cause| fail(cause.to_string()))?;
        let expires = format_rfc3339(token.expires.min(self.peer.not_after));
        let value = |text: &str| MetadataValue::try_from(text).map_err(|cause| fail(cause.to_string()));
        Ok((value(&token.jwt)?, value(&expires)?))
    }
}

impl Interceptor for PerRpcToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let (token, expires) = self.values()?;
        request.metadata_mut().insert(TOKEN_HEADER, token);
        request.metadata_mut().insert(TOKEN_EXPIRES_HEADER, expires);
        Ok(request)
    }
}

/// RFC 3339 in UTC, with nanoseconds only if there are any, as Go writes it.
pub fn format_rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86400, since.as_secs() % 86400);
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let fraction = match since.subsec_nanos() {
        0 => String::new(),
        nanos => format!(".{nanos:09}").trim_end_matches('0').to_owned(),
    };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// Reads RFC 3339 with any offset and fraction. `None` for times before 1970 and for what is not RFC 3339.
pub fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    let number = |range: std::ops::Range<usize>| -> Option<u64> {
        let digits = text.get(range)?;
        digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())?
    };
    let separator = |at: usize, allowed: &[u8]| text.as_bytes().get(at).is_some_and(|b| allowed.contains(b));
    if !(separator(4, b"-") && separator(7, b"-") && separator(10, b"Tt") && separator(13, b":") && separator(16, b":"))
    {
        return None;
    }
    let (year, month, day) = (number(0..4)?, number(5..7)?, number(8..10)?);
    let (hour, minute, second) = (number(11..13)?, number(14..16)?, number(17..19)?);
    if year < 1970 || !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60
    {
        return None;
    }
    let rest = text.get(19..)?;
    let (nanos, zone) = match rest.strip_prefix('.') {
        None => (0, rest),
        Some(rest) => {
            let end = rest.find(|c: char| !c.is_ascii_digit())?;
            let digits = rest.get(..end.min(9)).filter(|digits| !digits.is_empty())?;
            (format!("{digits:0<9}").parse::<u32>().ok()?, rest.get(end..)?)
        }
    };
    let local = days_from_civil(year, month, day) * 86400 + hour * 3600 + minute * 60 + second;
    let seconds = local.checked_add_signed(-offset(zone)?)?;
    Some(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos))
}

/// Seconds east of Greenwich.
fn offset(zone: &str) -> Option<i64> {
    if zone.eq_ignore_ascii_case("z") {
        return Some(0);
    }
    let sign = match zone.as_bytes().first()? {
        b'+' => 1,
        b'-' => -1,
        _ => return None,
    };
    let (hours, minutes) = zone.get(1..)?.split_once(':')?;
    let part = |text: &str, max: i64| -> Option<i64> {
        (text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit()))
            .then(|| text.parse::<i64>().ok())?
            .filter(|v| *v <= max)
    };
    Some(sign * (part(hours, 23)? * 3600 + part(minutes, 59)? * 60))
}

/// Days since 1970-01-01 (H. Hinnant, chrono-compatible low-level date algorithms), for years from 1970 on.
fn days_from_civil(year: u64, month: u64, day: u64) -> u64 {
    let shifted = if month <= 2 { year - 1 } else { year };
    let (era, of_era) = (shifted / 400, shifted % 400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// The inverse of [`days_from_civil`].
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, of_year - (153 * shifted_month + 2) / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64, nanos: u32) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos)
    }

    #[test]
    fn rfc3339() {
        assert_eq!(format_rfc3339(at(0, 0)), "1970-01-01T00:00:00Z");
        assert_eq!(format_rfc3339(at(951_782_400, 0)), "2000-02-29T00:00:00Z");
        assert_eq!(format_rfc3339(at(1_700_000_000, 120_000_000)), "2023-11-14T22:13:20.12Z");
        assert_eq!(parse_rfc3339("2023-11-14T22:13:20.12Z"), Some(at(1_700_000_000, 120_000_000)));
        assert_eq!(parse_rfc3339("2023-11-14T23:13:20+01:00"), Some(at(1_700_000_000, 0)));
        assert_eq!(parse_rfc3339("2023-11-14T20:43:20.5-01:30"), Some(at(1_700_000_000, 500_000_000)));
        for seconds in (0..4_102_444_800u64).step_by(86_399 * 7) {
            assert_eq!(parse_rfc3339(&format_rfc3339(at(seconds, 1))), Some(at(seconds, 1)));
        }
    }

    #[test]
    fn garbage_is_none() {
        for text in [
            "",
            "Z",
            "2023-11-14",
            "2023-11-14T22:13:20",
            "2023-11-14 22:13:20Z",
            "2023-13-14T22:13:20Z",
            "2023-11-14T22:13:20.Z",
            "2023-11-14T22:13:20+1:00",
            "2023-11-14T22:13:20.123",
            "é023-11-14T22:13:20Z",
            "1969-12-31T23:59:59Z",
            "1970-01-01T00:00:00+01:00",
        ] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
        }
    }

    #[test]
    fn a_token_needs_both_keys_once() {
        let mut metadata = MetadataMap::new();
        metadata.insert(TOKEN_HEADER, MetadataValue::from_static("a.b.c"));
        assert_eq!(client_token(&metadata), None);
        metadata.insert(TOKEN_EXPIRES_HEADER, MetadataValue::from_static("2023-11-14T22:13:20Z"));
        assert_eq!(client_token(&metadata).unwrap().jwt, "a.b.c");
        metadata.append(TOKEN_HEADER, MetadataValue::from_static("d.e.f"));
        assert_eq!(client_token(&metadata), None);
    }
}
