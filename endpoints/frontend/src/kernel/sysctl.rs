//! Kernel settings the pod needs: set where they are not, named where they cannot be set.

use std::path::{Path, PathBuf};

use crate::error::Error;

/// Names and values. Reverse-path filters drop replies of asymmetric paths; BFD's source ports have to be ephemeral
/// ones of RFC 5881 section 4, or routers ignore the session.
fn wanted(interface: &str) -> Vec<(String, &'static str)> {
    let mut wanted = vec![
        ("net.ipv4.conf.all.rp_filter".to_owned(), "0"),
        ("net.ipv4.conf.default.rp_filter".to_owned(), "0"),
        ("net.ipv4.ip_local_port_range".to_owned(), "49152\t65535"),
    ];
    let own = format!("/proc/sys/net/ipv4/conf/{interface}/rp_filter");
    if Path::new(&own).exists() {
        wanted.push((format!("net.ipv4.conf.{interface}.rp_filter"), "0"));
    }
    wanted
}

/// Checks every setting and writes those that differ; returns the ones that stay wrong.
pub fn ensure(interface: &str) -> Vec<Error> {
    wanted(interface).into_iter().filter_map(|(name, value)| ensure_one(&name, value).err()).collect()
}

fn ensure_one(name: &str, wanted: &str) -> Result<(), Error> {
    // Interface names may hold dots themselves, so the path is built from the three parts around them.
    let path = match name.strip_prefix("net.ipv4.conf.").and_then(|rest| rest.rsplit_once('.')) {
        Some((interface, key)) => PathBuf::from(format!("/proc/sys/net/ipv4/conf/{interface}/{key}")),
        None => PathBuf::from(format!("/proc/sys/{}", name.replace('.', "/"))),
    };
    let actual = std::fs::read_to_string(&path).map_err(|cause| Error::File { path: path.clone(), cause })?;
    let actual = actual.trim().to_owned();
    if actual == wanted {
        return Ok(());
    }
    tracing::info!(name, actual, wanted, "setting sysctl");
    std::fs::write(&path, wanted).map_err(|cause| Error::Sysctl {
        name: name.to_owned(),
        actual,
        wanted: wanted.to_owned(),
        cause,
    })
}
