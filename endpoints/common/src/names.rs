//! Names that the kernel or Kubernetes restricts.

/// Bytes that an interface name may have (`IFNAMSIZ` without the terminator).
pub const INTERFACE_NAME_MAX: usize = 15;

/// Checks what the kernel accepts as an interface name (`dev_valid_name`).
///
/// # Errors
/// One clear line that holds the name and the reason.
pub fn interface_name(name: &str) -> Result<(), String> {
    let reason = if name.is_empty() {
        "is empty".to_owned()
    } else if name.len() > INTERFACE_NAME_MAX {
        format!("has {} bytes, the kernel allows {INTERFACE_NAME_MAX}", name.len())
    } else if name == "." || name == ".." {
        "is reserved".to_owned()
    } else if name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control()) {
        "must not contain '/', ':' or white space".to_owned()
    } else {
        return Ok(());
    };
    Err(format!("interface name {name:?} {reason}"))
}

/// Faults of a setting that is given as `host:port`, ready for `Settings::validate`.
///
/// # Errors
/// One line that names the setting, its value and the reason.
pub fn host_port(setting: &str, value: &str) -> Result<(), String> {
    match value.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p != 0) => Ok(()),
        _ => Err(format!("{setting}: {value:?} is not <host>:<port>")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names() {
        for good in ["eth0", "ext-vlan0", "conduit-a--f75b", "fünfzehn-byte"] {
            assert_eq!(interface_name(good), Ok(()));
        }
        for bad in ["", ".", "..", "a/b", "a:1", "a b", "sixteen-bytes-xx"] {
            assert!(interface_name(bad).is_err(), "{bad}");
        }
        assert_eq!(
            interface_name("an-interface-of-20-b").unwrap_err(),
            "interface name \"an-interface-of-20-b\" has 20 bytes, the kernel allows 15"
        );
    }

    #[test]
    fn host_ports() {
        assert!(host_port("NSP_SERVICE", "nsp-service:7778").is_ok());
        assert!(host_port("NSP_SERVICE", "[::1]:7778").is_ok());
        for bad in ["nsp-service", ":7778", "a:0", "a:70000", ""] {
            assert!(host_port("NSP_SERVICE", bad).is_err(), "{bad}");
        }
    }
}
