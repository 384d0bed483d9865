use super::*;
use crate::settings::fixed;

#[test]
fn the_environment_of_an_icmp_responder() {
    let lookup = fixed(&[
        ("NSM_NAME", "nse-1"),
        ("NSM_SERVICE_NAMES", "icmp-responder, other"),
        ("NSM_LABELS", "app:icmp,color:red"),
        ("NSM_CIDR_PREFIX", "[172.16.1.0/24,172.16.2.0/24], [fd00::/120]"),
        ("NSM_IPAM_POLICY", "strict"),
        ("NSM_UNREGISTER_ITSELF", "false"),
        ("NSM_REGISTRY_CLIENT_POLICIES", "etc/nsm/opa/registry/.*.rego, etc/nsm/opa/client/.*.rego"),
    ]);
    let builder = Endpoint::builder().read(&lookup).unwrap();
    assert_eq!(builder.prefixes.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1]);
    assert!(!builder.unregister && builder.register_services);
    let signed = ClientPolicies { next_token_signed: true, ..ClientPolicies::none() };
    assert_eq!(builder.registry_policies, signed);
    let registration = builder.registration("unix:///x".into());
    assert_eq!(registration.network_service_names, ["icmp-responder", "other"]);
    assert_eq!(registration.network_service_labels["other"].labels["color"], "red");
    let names = builder.chain(crate::test_source()).chain().names();
    let own = &names[names.iter().position(|name| *name == "trimpath").unwrap() + 1..];
    assert_eq!(own, ["strictipam", "point2pointipam", "point2pointipam", "mechanisms", "sendfd"]);
}

/// A client that comes with addresses of another endpoint, and those of somebody else here.
#[tokio::test]
async fn strict_gives_addresses_of_the_own_prefixes_to_one_each() {
    use nsm_chain::{Context, NetworkServiceRequest, Path, PathSegment, RequestCall, clock};
    let expires = clock::to_timestamp(clock::now() + Duration::from_secs(600));
    let request = |id: &str| {
        let own = PathSegment { name: "nsc".into(), id: id.into(), expires: Some(expires), ..Default::default() };
        let mut connection = Connection { id: id.into(), ..Default::default() };
        connection.path = Some(Path { index: 0, path_segments: vec![own] });
        let context = connection.context.get_or_insert_default().ip_context.get_or_insert_default();
        context.src_ip_addrs = vec!["10.0.0.1/32".into(), "172.16.1.1/32".into()];
        context.dst_ip_addrs = vec!["10.0.0.0/32".into(), "172.16.1.0/32".into()];
        let noop = nsm_chain::Mechanism { cls: "LOCAL".into(), r#type: NOOP.into(), ..Default::default() };
        let request = NetworkServiceRequest { connection: Some(connection), mechanism_preferences: vec![noop] };
        RequestCall::new(request, Context::new())
    };
    for (strict, addresses) in [
        (true, [&["172.16.1.1/32"][..], &["172.16.1.3/32"]]),
        (false, [&["10.0.0.1/32", "172.16.1.1/32"], &["10.0.0.1/32", "172.16.1.1/32", "172.16.1.3/32"]]),
    ] {
        let builder = Endpoint::builder().name("nse").service("svc").addresses(["172.16.1.0/24".parse().unwrap()]);
        let builder = if strict { builder.strict() } else { builder };
        let endpoint = builder.chain(crate::test_source());
        for (id, expected) in ["a", "b"].into_iter().zip(addresses) {
            let got = endpoint.chain().request(request(id)).await.unwrap();
            assert_eq!(got.context.unwrap().ip_context.unwrap().src_ip_addrs, expected, "{id}, {strict}");
        }
    }
}

#[test]
fn one_group_needs_no_brackets() {
    assert_eq!(groups("10.0.0.0/8").unwrap(), [["10.0.0.0/8".parse().unwrap()]]);
    for text in ["10.0.0.0", "[10.0.0.0/8", "[10.0.0.0/8],[x]"] {
        assert!(groups(text).is_err(), "{text}");
    }
}

#[test]
fn every_fault_is_named() {
    let lookup = fixed(&[
        ("NSM_LABELS", "color=red"),
        ("NSM_CIDR_PREFIX", "ten"),
        ("NSM_IPAM_POLICY", "rude"),
        ("NSM_REGISTER_SERVICE", "maybe"),
    ]);
    let faults = Endpoint::builder().read(&lookup).err().unwrap().to_string();
    assert_eq!(faults.lines().count(), 4, "{faults}");
}

#[tokio::test]
async fn a_manager_that_is_not_there_is_named_with_the_cause() {
    let folder = tempfile::tempdir().unwrap();
    let manager = format!("unix://{}/nsm.io.sock", folder.path().display());
    let started = Endpoint::builder()
        .name("nse-1")
        .service("svc")
        .identity(crate::test_source())
        .connect_to(&manager)
        .patience(Duration::from_millis(300))
        .start();
    let error = started.await.err().unwrap().to_string();
    assert!(error.starts_with(&format!("endpoint svc cannot be registered at {manager}: ")), "{error}");
    assert!(error.contains("No such file"), "{error}");
}
