//! Settings under `/proc/sys/net`, which belong to the namespace of the thread that opens them.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::{Error, Netns};

/// File of a setting; the leading `net/` of its full name may be left out.
fn path(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys/net").join(key.strip_prefix("net/").unwrap_or(key))
}

/// Reads one setting of the calling thread's namespace; `key` is a path such as `ipv4/conf/all/rp_filter`.
pub fn read_here(key: &str) -> Result<String, Error> {
    match fs::read_to_string(path(key)) {
        Ok(value) => Ok(value.split_whitespace().collect::<Vec<_>>().join(" ")),
        Err(e) => Err(Error::io(format!("read net/{key}"), e)),
    }
}

/// Sets one setting of the calling thread's namespace, unless it has the value already (`/proc/sys` may be read-only).
pub fn write_here(key: &str, value: &str) -> Result<(), Error> {
    if read_here(key)? == value {
        return Ok(());
    }
    fs::write(path(key), value).map_err(|e| Error::io(format!("set net/{key} to {value}"), e))
}

/// Sets several settings of a namespace; the first failure is returned, the others are set all the same.
pub async fn write(netns: &Netns, settings: Vec<(String, String)>) -> Result<(), Error> {
    netns.run(move || settings.iter().map(|(k, v)| write_here(k, v)).fold(Ok(()), Result::and)).await?
}

/// Reads one setting of a namespace.
pub async fn read(netns: &Netns, key: &str) -> Result<String, Error> {
    let key = key.to_string();
    netns.run(move || read_here(&key)).await?
}

/// Lets an interface work at once: IPv6 on, no duplicate address detection (it would hold back neighbour solicitations of
/// forwarded packets for a second), and IPv4 addresses of one subnet that survive the deletion of the first one.
/// What cannot be set (no IPv6, read-only) is left: the addresses themselves say clearly enough if they cannot be used.
pub fn prepare_interface_here(name: &str) {
    for (key, value) in [
        (format!("ipv6/conf/{name}/disable_ipv6"), "0"),
        (format!("ipv6/conf/{name}/accept_dad"), "0"),
        (format!("ipv6/conf/{name}/dad_transmits"), "0"),
        (format!("ipv4/conf/{name}/promote_secondaries"), "1"),
    ] {
        if let Err(e) = write_here(&key, value) {
            tracing::debug!(interface = name, error = %e, "interface setting left as it is");
        }
    }
}

/// Has the kernel announce an interface's addresses when it gets another link-layer address. Returns what was set before, to be written
/// again; what cannot be set (no IPv6) is left.
pub async fn notify(netns: &Netns, name: &str) -> Result<Vec<(String, String)>, Error> {
    let keys = [format!("ipv4/conf/{name}/arp_notify"), format!("ipv6/conf/{name}/ndisc_notify")];
    let set = |key: String| {
        let before = read_here(&key).ok()?.trim().to_owned();
        write_here(&key, "1").ok()?;
        Some((key, before))
    };
    netns.run(move || keys.into_iter().filter_map(set).collect()).await
}

/// Lets every group of the namespace open unprivileged ICMP sockets (liveness checks of clients).
pub async fn allow_ping(netns: &Netns) -> Result<(), Error> {
    write(netns, vec![("ipv4/ping_group_range".into(), "0 2147483647".into())]).await
}

/// Looks whether reverse path filtering would drop packets of asymmetric paths on one of these interfaces (the kernel uses the
/// higher one of `all` and the interface's own value). Returns the name of the first faulty one; `all` and `default`
/// are always looked at. An interface that does not exist is not faulty.
pub async fn faulty_rp_filter(netns: &Netns, interfaces: Vec<String>) -> Result<Option<String>, Error> {
    netns
        .run(move || {
            let fixed = ["all", "default"].map(String::from);
            for name in fixed.into_iter().chain(interfaces) {
                match read_here(&format!("ipv4/conf/{name}/rp_filter")) {
                    Ok(value) if value == "0" => {}
                    Ok(_) => return Ok(Some(name)),
                    Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(e),
                }
            }
            Ok(None)
        })
        .await?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn settings_are_the_namespaces_own() {
        let ns = Netns::anonymous().unwrap();
        let key = "ipv4/conf/default/rp_filter";
        for (value, fault) in [("1", Some("default".to_string())), ("0", None)] {
            write(&ns, vec![(key.into(), value.into())]).await.unwrap();
            assert_eq!(read(&ns, key).await.unwrap(), value);
            assert_eq!(read(&ns, &format!("net/{key}")).await.unwrap(), value);
            assert_eq!(faulty_rp_filter(&ns, vec!["nope".into()]).await.unwrap(), fault);
        }
        allow_ping(&ns).await.unwrap();
        assert_eq!(read(&ns, "ipv4/ping_group_range").await.unwrap(), "0 2147483647");
    }
}
