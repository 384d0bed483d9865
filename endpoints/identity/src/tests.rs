use super::*;
use meridio_proto::spiffe::{
    JwtBundlesRequest, JwtsvidRequest, ValidateJwtsvidRequest, X509svidRequest,
    spiffe_workload_api_client::SpiffeWorkloadApiClient,
};
use nsm_identity::X509Source;
use nsm_transport::{Address, Transport};
use std::{path::Path, time::SystemTime};
use tokio::{task::JoinHandle, time::timeout};
use tonic::{Code, Request, metadata::MetadataValue};

const LIMIT: Duration = Duration::from_secs(20);

struct Running {
    stop: CancellationToken,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    async fn stop(self) {
        self.stop.cancel();
        timeout(LIMIT, self.task).await.unwrap().unwrap().unwrap();
    }
}

fn start(root: &Path, ttl: Duration) -> Running {
    let settings = Settings {
        state_dir: root.join("state"),
        trust_domain: "example.org".into(),
        workloads: root.join("workloads"),
        svid_ttl: ttl.into(),
        health_socket: String::new(),
    };
    assert!(settings.validate().is_empty());
    let stop = CancellationToken::new();
    let task = tokio::spawn(run(settings, stop.clone()));
    Running { stop, task }
}

fn socket(root: &Path, name: &str) -> String {
    std::fs::create_dir_all(root.join("workloads").join(name)).unwrap();
    format!("unix://{}/workloads/{name}/agent.sock", root.display())
}

fn client(endpoint: &str) -> SpiffeWorkloadApiClient<tonic::transport::Channel> {
    SpiffeWorkloadApiClient::new(Transport::insecure().channel(&Address::parse(endpoint).unwrap()))
}

fn meant<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    request
}

#[tokio::test]
async fn identities_rotate_and_outlive_the_issuer() {
    let root = tempfile::tempdir().unwrap();
    let issuer = start(root.path(), Duration::from_secs(2));
    // The directory appears after the issuer has started.
    let source = X509Source::connect(&socket(root.path(), "target-1"), LIMIT).await.unwrap();
    assert_eq!(source.spiffe_id(), "spiffe://example.org/target-1");
    let mut updates = source.updates();
    timeout(LIMIT, updates.changed()).await.unwrap().unwrap();
    issuer.stop().await;

    let kept = source.svid();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(source.svid().chain(), kept.chain(), "the last SVID stays");
    updates.mark_unchanged();
    let issuer = start(root.path(), Duration::from_secs(3600));
    timeout(LIMIT, updates.changed()).await.unwrap().unwrap();
    assert!(source.svid().not_after() > SystemTime::now() + Duration::from_secs(1800));
    issuer.stop().await;
}

#[tokio::test]
async fn two_issuers_share_one_ca() {
    let root = tempfile::tempdir().unwrap();
    let (one, two) = (root.path().join("one"), root.path().join("two"));
    std::fs::create_dir_all(root.path().join("state")).unwrap();
    for node in [&one, &two] {
        std::fs::create_dir_all(node).unwrap();
        std::os::unix::fs::symlink(root.path().join("state"), node.join("state")).unwrap();
    }
    let issuers = [start(&one, Duration::from_secs(60)), start(&two, Duration::from_secs(60))];
    let server = X509Source::connect(&socket(&one, "server"), LIMIT).await.unwrap();
    let client = X509Source::connect(&socket(&two, "client"), LIMIT).await.unwrap();
    let (server, client) = (Transport::new(server).unwrap(), Transport::new(client).unwrap());
    let listener = nsm_transport::Listener::bind(&Address::parse("tcp://127.0.0.1:0").unwrap()).await.unwrap();
    let address = listener.address().clone();
    let serving = tokio::spawn(async move {
        server.serve(vec![listener], tonic::service::Routes::default(), CancellationToken::new()).await
    });
    let link = client.dial(&address, LIMIT).await.unwrap();
    assert_eq!(link.peer.unwrap().spiffe_id, "spiffe://example.org/server");
    serving.abort();
    for issuer in issuers {
        issuer.stop().await;
    }
}

#[tokio::test]
async fn the_security_header_is_demanded() {
    let root = tempfile::tempdir().unwrap();
    let endpoint = socket(root.path(), "w");
    let issuer = start(root.path(), Duration::from_secs(60));
    X509Source::connect(&endpoint, LIMIT).await.unwrap();
    let refused = client(&endpoint).fetch_x509svid(X509svidRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    issuer.stop().await;
}

#[tokio::test]
async fn jwt_svids() {
    let root = tempfile::tempdir().unwrap();
    let endpoint = socket(root.path(), "w");
    let issuer = start(root.path(), Duration::from_secs(60));
    X509Source::connect(&endpoint, LIMIT).await.unwrap();
    let mut client = client(&endpoint);
    let request = JwtsvidRequest { audience: vec!["me".into()], spiffe_id: String::new() };
    let svid = client.fetch_jwtsvid(meant(request)).await.unwrap().into_inner().svids.remove(0).svid;
    let valid =
        |audience: &str, svid: &str| meant(ValidateJwtsvidRequest { audience: audience.into(), svid: svid.into() });
    let answer = client.validate_jwtsvid(valid("me", &svid)).await.unwrap().into_inner();
    assert_eq!(answer.spiffe_id, "spiffe://example.org/w");
    assert!(client.validate_jwtsvid(valid("you", &svid)).await.is_err());
    assert!(client.validate_jwtsvid(valid("me", "x.y.z")).await.is_err());
    let mut bundles = client.fetch_jwt_bundles(meant(JwtBundlesRequest {})).await.unwrap().into_inner();
    let bundle = bundles.message().await.unwrap().unwrap().bundles.remove("spiffe://example.org").unwrap();
    assert!(String::from_utf8(bundle).unwrap().contains(r#""crv":"P-256""#));
    issuer.stop().await;
}

#[tokio::test]
async fn a_directory_made_anew_is_served_anew() {
    let root = tempfile::tempdir().unwrap();
    let issuer = start(root.path(), Duration::from_secs(60));
    let endpoint = socket(root.path(), "w");
    X509Source::connect(&endpoint, LIMIT).await.unwrap();
    std::fs::remove_dir_all(root.path().join("workloads/w")).unwrap();
    let endpoint = socket(root.path(), "w");
    X509Source::connect(&endpoint, LIMIT).await.unwrap();
    issuer.stop().await;
}

#[test]
fn a_ca_of_another_domain_is_refused() {
    let root = tempfile::tempdir().unwrap();
    ca::load_or_create(root.path(), "example.org").unwrap();
    assert!(ca::load_or_create(root.path(), "example.com").unwrap_err().to_string().contains("ca.pem"));
}

#[test]
fn every_fault_is_named() {
    let settings = Settings {
        state_dir: "".into(),
        trust_domain: "No Such".into(),
        workloads: "".into(),
        svid_ttl: Duration::ZERO.into(),
        health_socket: String::new(),
    };
    assert_eq!(settings.validate().len(), 4);
}
