//! How long a caller waits.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status, TimeoutExpired, codegen::http, metadata::MetadataMap};
use tower::{Layer, Service};

/// The `grpc-timeout` header (gRPC over HTTP/2): at most eight digits and a unit. `None` without one, or if it is
/// something else: nothing that a client sends there makes a point in time overflow.
pub fn grpc_timeout(metadata: &MetadataMap) -> Option<Duration> {
    parse(metadata.get(HEADER)?.to_str().ok()?)
}

const HEADER: &str = "grpc-timeout";

fn parse(text: &str) -> Option<Duration> {
    let unit = text.chars().next_back()?;
    let digits = text.strip_suffix(unit).filter(|digits| digits.len() <= 8)?;
    let value: u64 = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())??;
    Some(match unit {
        'H' => Duration::from_secs(value * 3600),
        'M' => Duration::from_secs(value * 60),
        'S' => Duration::from_secs(value),
        'm' => Duration::from_millis(value),
        'u' => Duration::from_micros(value),
        'n' => Duration::from_nanos(value),
        _ => return None,
    })
}

/// What became of a call, with the code that gRPC has for a deadline that has passed: tonic calls its own end of waiting
/// CANCELLED, which means that the caller has left.
pub fn with_deadline_code<T>(result: Result<T, Status>) -> Result<T, Status> {
    result.map_err(|status| {
        let mut cause = std::error::Error::source(&status);
        while let Some(error) = cause {
            if error.is::<TimeoutExpired>() {
                return late();
            }
            cause = error.source();
        }
        status
    })
}

fn late() -> Status {
    Status::new(Code::DeadlineExceeded, "context deadline exceeded")
}

/// Answers DEADLINE_EXCEEDED when the caller's time is over, where tonic would say CANCELLED. Stands inside tonic's own
/// time-out and is called before it, so that it is the first of the two.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeadlineLayer;

#[derive(Clone, Debug)]
pub(crate) struct Deadline<S>(S);

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline(inner)
    }
}

impl<S, B, R> Service<http::Request<B>> for Deadline<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
    R: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, ctx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(ctx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let timeout = request.headers().get(HEADER).and_then(|text| parse(text.to_str().ok()?));
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let answer = self.0.call(request);
        Box::pin(async move {
            match deadline {
                Some(deadline) => timeout_at(deadline, answer).await.unwrap_or_else(|_| Ok(late().into_http())),
                None => answer.await,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts() {
        let timeout = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            grpc_timeout(&metadata)
        };
        assert_eq!(timeout("15S"), Some(Duration::from_secs(15)));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(timeout("250m"), Some(Duration::from_millis(250)));
        for bad in ["", "S", "15", "1.5S", "-1S", "+1S", "123456789S", "18446744073709551615S", "5s", "5 S"] {
            assert_eq!(timeout(bad), None, "{bad}");
        }
        assert_eq!(grpc_timeout(&MetadataMap::new()), None);
    }
}
