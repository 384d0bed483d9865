//! One socket for each workload directory.

use crate::service::Issuer;
use meridio_common::Health;
use meridio_proto::spiffe::spiffe_workload_api_server::SpiffeWorkloadApiServer;
use nsm_transport::{Address, Listener, Transport};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{task::JoinSet, time::interval};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

/// How soon a new directory is noticed.
const SCAN: Duration = Duration::from_millis(250);
const SOCKET: &str = "agent.sock";

/// A socket that is served.
struct Served {
    stop: CancellationToken,
    inode: Option<u64>,
}

/// Keeps the set of served sockets equal to the set of directories until `stop`.
pub(crate) async fn serve(issuer: Issuer, root: PathBuf, health: Health, stop: CancellationToken) {
    let (mut served, mut refused) = (BTreeMap::<String, Served>::new(), BTreeMap::<String, String>::new());
    let (mut servers, mut ticks) = (JoinSet::new(), interval(SCAN));
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = ticks.tick() => {}
        }
        while servers.try_join_next().is_some() {}
        let wanted = match directories(&root) {
            Ok(wanted) => wanted,
            // Not the same as "no directories": what is served stays.
            Err(cause) => {
                health.note("workloads", vec![format!("{}: {cause}", root.display())]);
                continue;
            }
        };
        served.retain(|name, one| {
            // A directory that was made anew has lost its socket.
            let keep = wanted.contains(name) && one.inode.is_some() && inode(&root.join(name)) == one.inode;
            if !keep {
                one.stop.cancel();
            }
            keep
        });
        refused.retain(|name, _| wanted.contains(name));
        for name in wanted {
            if served.contains_key(&name) {
                continue;
            }
            match start(&issuer, &root, &name, &stop, &mut servers).await {
                Ok(one) => {
                    refused.remove(&name);
                    served.insert(name, one);
                }
                Err(cause) => {
                    if refused.get(&name) != Some(&cause) {
                        tracing::warn!(workload = name, cause, "workload is not served");
                    }
                    refused.insert(name, cause);
                }
            }
        }
        health.note("workloads", refused.iter().map(|(name, cause)| format!("{name}: {cause}")).collect());
    }
    while servers.join_next().await.is_some() {}
}

async fn start(
    issuer: &Issuer,
    root: &Path,
    name: &str,
    stop: &CancellationToken,
    servers: &mut JoinSet<()>,
) -> Result<Served, String> {
    let workload = issuer.workload(name).map_err(|cause| cause.to_string())?;
    let directory = root.join(name);
    let listener = Listener::bind(&Address::Unix(directory.join(SOCKET))).await.map_err(|cause| cause.to_string())?;
    let (stop, inode) = (stop.child_token(), inode(&directory));
    tracing::info!(id = %workload.id(), "workload served");
    let stopped = stop.clone();
    servers.spawn(async move {
        let (id, routes) = (workload.id().clone(), Routes::new(SpiffeWorkloadApiServer::new(workload)));
        if let Err(cause) = Transport::insecure().serve(vec![listener], routes, stopped).await {
            tracing::error!(%id, %cause, "workload is no longer served");
        }
    });
    Ok(Served { stop, inode })
}

fn inode(directory: &Path) -> Option<u64> {
    fs::symlink_metadata(directory.join(SOCKET)).ok().map(|meta| meta.ino())
}

fn directories(root: &Path) -> io::Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        if entry.path().is_dir()
            && let Ok(name) = entry.file_name().into_string()
        {
            names.insert(name);
        }
    }
    Ok(names)
}
