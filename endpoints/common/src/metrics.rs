//! Metrics in Prometheus' text format, over plain HTTP as its scrapers expect.

use std::future::Future;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::Error;

/// Content type of the text format.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Time for scrapes under way at the end.
const LAST_SCRAPES: Duration = Duration::from_millis(500);

/// A bound server of `/metrics`.
#[derive(Debug)]
pub struct MetricsServer {
    listener: TcpListener,
    address: SocketAddr,
}

impl MetricsServer {
    /// Binds a port on all addresses of both families; 0 takes any.
    ///
    /// # Errors
    /// The port is in use.
    pub async fn bind(port: u16) -> Result<Self, Error> {
        let fault =
            |e: std::io::Error| Error::Transport { object: format!("metrics port {port}"), reason: e.to_string() };
        let listener = match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            // A kernel without IPv6.
            Err(e) if e.kind() != std::io::ErrorKind::AddrInUse => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await
            }
            result => result,
        };
        let listener = listener.map_err(fault)?;
        let address = listener.local_addr().map_err(fault)?;
        Ok(Self { listener, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers each `GET /metrics` with a text of `render`, or 500 with its fault, until `stop`.
    ///
    /// # Errors
    /// The server fails.
    pub async fn serve<R, F>(self, render: R, stop: CancellationToken) -> Result<(), Error>
    where
        R: Fn() -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<String, String>> + Send,
    {
        let scrape = move || {
            let text = render();
            async move { answer(text.await) }
        };
        let router = Router::new().route("/metrics", get(scrape));
        let serving = axum::serve(self.listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
        let late = async {
            stop.cancelled().await;
            tokio::time::sleep(LAST_SCRAPES).await;
        };
        tokio::select! {
            result = std::future::IntoFuture::into_future(serving) => result.map_err(|e| Error::Transport {
                object: format!("metrics at {}", self.address),
                reason: e.to_string(),
            }),
            () = late => Ok(()),
        }
    }
}

fn answer(text: Result<String, String>) -> Response {
    match text {
        Ok(text) => ([(header::CONTENT_TYPE, TEXT)], text).into_response(),
        Err(fault) => {
            tracing::warn!(fault, "metrics cannot be read");
            (StatusCode::INTERNAL_SERVER_ERROR, format!("{fault}\n")).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    async fn get(port: u16, path: &str) -> String {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_scrape_gets_the_text_or_the_fault() {
        let server = MetricsServer::bind(0).await.unwrap();
        let port = server.address().port();
        assert!(MetricsServer::bind(port).await.unwrap_err().to_string().contains(&port.to_string()));
        let faulty = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let flag = faulty.clone();
        let render = move || {
            let faulty = flag.load(std::sync::atomic::Ordering::Relaxed);
            async move { if faulty { Err("map GONE".to_owned()) } else { Ok("up_total 1\n".to_owned()) } }
        };
        let stop = CancellationToken::new();
        let serving = tokio::spawn(server.serve(render, stop.clone()));
        let text = get(port, "/metrics").await;
        assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("\r\n\r\nup_total 1\n"), "{text}");
        assert!(text.to_ascii_lowercase().contains(&format!("content-type: {TEXT}")), "{text}");
        assert!(get(port, "/").await.starts_with("HTTP/1.1 404"));
        faulty.store(true, std::sync::atomic::Ordering::Relaxed);
        let fault = get(port, "/metrics").await;
        assert!(fault.starts_with("HTTP/1.1 500") && fault.ends_with("map GONE\n"), "{fault}");
        // A scraper that keeps its connection does not hold the end up.
        let _idle = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(5), serving).await.unwrap().unwrap().unwrap();
    }
}
