//! Kernel settings the pod needs: set where they are not, named where they cannot be set.

use std::path::Path;

use meridio_common::sysctl;

/// Checks every setting and writes those that differ; returns the faults that stay, each naming setting and interface.
///
/// Reverse-path filters would drop the replies of asymmetric paths. BFD's source ports have to be from 49152 on
/// (RFC 5881, section 4), or routers ignore the session; BIRD leaves the choice to the kernel.
pub fn ensure(interface: &str) -> Vec<String> {
    let mut wanted = vec![
        ("net/ipv4/conf/all/rp_filter".to_owned(), "0"),
        ("net/ipv4/conf/default/rp_filter".to_owned(), "0"),
        ("net/ipv4/ip_local_port_range".to_owned(), "49152 65535"),
    ];
    let own = format!("net/ipv4/conf/{interface}/rp_filter");
    if Path::new("/proc/sys").join(&own).exists() {
        wanted.push((own, "0"));
    }
    wanted.iter().filter_map(|(key, value)| sysctl::set(key, value).err()).map(|fault| fault.to_string()).collect()
}
