use super::*;

pub(crate) fn settings() -> Settings {
    Settings {
        name: "target-1".into(),
        node: "node-a".into(),
        namespace: "default".into(),
        socket: "/ambassador.sock".into(),
        nsm_socket: "unix:///nsm.io.sock".into(),
        nsp_service_name: "nsp-service".into(),
        nsp_service_port: 7778,
        timeout: Duration::from_secs(15).into(),
        dial_timeout: Duration::from_secs(5).into(),
        max_token_lifetime: Duration::from_secs(600).into(),
        log_level: "DEBUG".into(),
        nsp_entry_timeout: Duration::from_secs(30).into(),
        grpc_max_backoff: Duration::from_secs(5).into(),
        grpc_probe_rpc_timeout: Duration::from_secs(1).into(),
        state_dir: "/run/meridio".into(),
        health_socket: String::new(),
        spiffe_endpoint_socket: "unix:///agent.sock".into(),
    }
}

pub(crate) fn conduit(name: &str) -> ConduitKey {
    ConduitKey { trench: "t".into(), conduit: name.into() }
}

mod scenario;
mod world;
