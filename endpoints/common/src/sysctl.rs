//! Kernel settings under `/proc/sys`, read and written in the network namespace of the calling thread.

use std::fs;
use std::path::PathBuf;

use crate::Error;

/// File of a setting. Keys use `/` (`net/ipv4/conf/ext.0/rp_filter`), because interface names may hold dots.
fn path(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(key)
}

/// Value of a setting, without surrounding white space.
///
/// # Errors
/// When the setting does not exist or may not be read.
pub fn read(key: &str) -> Result<String, Error> {
    fs::read_to_string(path(key)).map(|text| text.trim().to_owned()).map_err(|e| Error::io(format!("sysctl {key}"), e))
}

/// Sets `key` to `value` unless it already has that value, so that a read-only `/proc/sys` with the right values is fine.
///
/// # Errors
/// When the setting has another value and cannot be changed.
pub fn set(key: &str, value: &str) -> Result<(), Error> {
    if same(&read(key)?, value) {
        return Ok(());
    }
    fs::write(path(key), value).map_err(|e| Error::io(format!("sysctl {key} (to be set to {value})"), e))
}

/// Checks that `key` has `value`.
///
/// # Errors
/// Names the setting (and with it the interface), what it is and what it has to be.
pub fn check(key: &str, value: &str) -> Result<(), Error> {
    let found = read(key)?;
    if same(&found, value) {
        return Ok(());
    }
    Err(Error::Sysctl { object: format!("sysctl {key}"), reason: format!("is {found}, has to be {value}") })
}

/// Interfaces that would drop asymmetric traffic: `rp_filter` of `all`, of `default` and of each of `interfaces` has to
/// be 0, because the kernel applies the larger one of `all` and the interface. One line for each fault, naming it.
pub fn rp_filter_faults(interfaces: &[&str]) -> Vec<String> {
    ["all", "default"]
        .iter()
        .chain(interfaces)
        .filter_map(|name| check(&format!("net/ipv4/conf/{name}/rp_filter"), "0").err())
        .map(|e| e.to_string())
        .collect()
}

/// Settings of several numbers are separated by any white space.
fn same(a: &str, b: &str) -> bool {
    a.split_whitespace().eq(b.split_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_name_the_setting() {
        let error = check("kernel/ostype", "Plan9").unwrap_err().to_string();
        assert_eq!(error, "sysctl kernel/ostype: is Linux, has to be Plan9");
        assert!(check("kernel/ostype", "Linux").is_ok());
        assert!(read("net/ipv4/conf/no-such-if/rp_filter").unwrap_err().to_string().contains("no-such-if"));
        assert!(rp_filter_faults(&["no-such-if"]).iter().any(|line| line.contains("no-such-if")));
    }
}
