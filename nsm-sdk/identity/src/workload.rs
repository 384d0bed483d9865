//! Client of the SPIFFE Workload API (SPIFFE_Workload_API.md): one stream of X.509-SVIDs.

use crate::{Bundles, Error, Identity, SpiffeId, Svid, split_certificates};
use hyper_util::rt::TokioIo;
use nsm_proto::spiffe::{X509svidRequest, X509svidResponse, spiffe_workload_api_client::SpiffeWorkloadApiClient};
use rustls::pki_types::CertificateDer;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    net::UnixStream,
    sync::watch,
    task::AbortHandle,
    time::{Instant, sleep, timeout_at},
};
use tonic::{Request, metadata::MetadataValue, transport::Endpoint};

const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(3);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Opens the stream, waits for the first identity and keeps the returned sender fed until the task is aborted.
pub(crate) async fn subscribe(
    endpoint: &str,
    timeout: Duration,
) -> Result<(Identity, watch::Sender<Identity>, AbortHandle), Error> {
    let path = socket_path(endpoint)?;
    let deadline = Instant::now() + timeout;
    let (news, mut arrived) = watch::channel(Seen::default());
    let task = tokio::spawn(feed(path, endpoint.to_owned(), news));
    let abort = AbortOnDrop(Some(task.abort_handle()));
    let first = match timeout_at(deadline, arrived.wait_for(|seen| seen.identity.is_some())).await {
        Ok(Ok(seen)) => seen.identity.clone(),
        Ok(Err(_)) | Err(_) => None,
    };
    let Some(first) = first else {
        let cause = arrived.borrow().failure.clone().unwrap_or_else(|| "none".to_owned());
        return Err(Error::NoSvid { endpoint: endpoint.to_owned(), timeout, cause });
    };
    let sender = watch::Sender::new(first.clone());
    let copy = sender.clone();
    // The pump owns the feed: aborting the pump ends both.
    let pump = tokio::spawn(async move {
        let _feed = abort;
        while arrived.changed().await.is_ok() {
            let Some(identity) = arrived.borrow_and_update().identity.clone() else { continue };
            copy.send_if_modified(|current| {
                let changed = !Arc::ptr_eq(&current.svid, &identity.svid);
                *current = identity;
                changed
            });
        }
    });
    Ok((first, sender, pump.abort_handle()))
}

/// What the stream has brought so far.
#[derive(Default)]
struct Seen {
    identity: Option<Identity>,
    failure: Option<String>,
}

struct AbortOnDrop(Option<AbortHandle>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        if let Some(handle) = self.0.take() {
            handle.abort();
        }
    }
}

fn socket_path(endpoint: &str) -> Result<PathBuf, Error> {
    let path = endpoint.strip_prefix("unix://").or_else(|| endpoint.strip_prefix("unix:")).unwrap_or(endpoint);
    if path.is_empty() || path.contains("://") {
        let cause = "it must be unix:///path".to_owned();
        return Err(Error::WorkloadApi { endpoint: endpoint.to_owned(), cause });
    }
    Ok(PathBuf::from(path))
}

/// Opens the stream for ever. A failure is reported, and changes nothing else: the last identity stays in use.
async fn feed(path: PathBuf, endpoint: String, news: watch::Sender<Seen>) {
    let mut backoff = BACKOFF_MIN;
    loop {
        let started = Instant::now();
        let cause = match stream(&path, &news).await {
            Ok(()) => "the stream ended".to_owned(),
            Err(cause) => cause,
        };
        if started.elapsed() > BACKOFF_MAX {
            backoff = BACKOFF_MIN;
        }
        tracing::debug!(%endpoint, %cause, retry_in = ?backoff, "workload API stream lost");
        news.send_modify(|seen| seen.failure = Some(cause));
        sleep(backoff.mul_f64(rand::random_range(0.75..1.25))).await;
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

async fn stream(path: &std::path::Path, news: &watch::Sender<Seen>) -> Result<(), String> {
    let path = path.to_owned();
    let channel = Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
        .map_err(|cause| chain(&cause))?;
    let mut request = Request::new(X509svidRequest {});
    // Proof that the call is meant: a browser tricked into calling the socket cannot set it.
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    let mut stream = SpiffeWorkloadApiClient::new(channel)
        .fetch_x509svid(request)
        .await
        .map_err(|status| format!("{}: {}", status.code(), status.message()))?
        .into_inner();
    while let Some(response) = stream.message().await.map_err(|status| status.message().to_owned())? {
        match identity(&response) {
            Ok(identity) => {
                tracing::debug!(spiffe_id = %identity.svid.id(), "SVID received");
                news.send_modify(|seen| seen.identity = Some(identity));
            }
            Err(cause) => tracing::warn!(%cause, "SVID ignored"),
        }
    }
    Ok(())
}

fn chain(cause: &dyn std::error::Error) -> String {
    let mut text = cause.to_string();
    let mut next = cause.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

/// The first SVID of a response is the default identity.
pub(crate) fn identity(response: &X509svidResponse) -> Result<Identity, Error> {
    let first = response.svids.first().ok_or_else(|| Error::certificate("SVID", "the response has none"))?;
    let svid = Svid::new(split_certificates(&first.x509_svid)?, first.x509_svid_key.clone())?;
    let mut bundles = Bundles::default();
    let own: Vec<CertificateDer<'static>> = split_certificates(&first.bundle)?;
    bundles.insert(svid.id().trust_domain(), &own)?;
    for (name, der) in &response.federated_bundles {
        let domain = format!("spiffe://{}", name.trim_start_matches("spiffe://")).parse::<SpiffeId>()?;
        bundles.insert(domain.trust_domain(), &split_certificates(der)?)?;
    }
    Ok(Identity { svid: Arc::new(svid), bundles: Arc::new(bundles) })
}
