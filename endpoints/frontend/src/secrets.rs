//! Passwords of BGP sessions, from a directory with one sub-directory per secret and one file per key
//! (the shape in which Kubernetes mounts secrets).

use std::path::Path;

use crate::bird::render::Password;
use crate::gateway::{Attraction, AuthRef, Protocol};

/// Longest TCP MD5 key of Linux (`TCP_MD5SIG_MAXKEYLEN`).
const KEY_MAX: usize = 80;

/// One password per gateway, in the order of the gateways, and what is wrong with those that are missing.
pub fn read(dir: Option<&Path>, attraction: &Attraction) -> (Vec<Password>, Vec<String>) {
    let mut faults = Vec::new();
    let passwords = attraction.gateways.iter().map(|gateway| match &gateway.protocol {
        Protocol::Bgp(bgp) => match bgp.auth.as_ref().map(|auth| read_one(dir, auth)) {
            None => Password::None,
            Some(Ok(password)) => Password::Known(password),
            Some(Err(text)) => {
                faults.push(format!("gateway {:?} is left out: {text}", gateway.name));
                Password::Missing
            }
        },
        Protocol::Static => Password::None,
    });
    (passwords.collect(), faults)
}

fn read_one(dir: Option<&Path>, auth: &AuthRef) -> Result<String, String> {
    let AuthRef { source, key } = auth;
    let dir = dir.ok_or_else(|| format!("it wants secret {source:?}, but NFE_SECRETS_DIR is not set"))?;
    let path = dir.join(source).join(key);
    let text = std::fs::read_to_string(&path).map_err(|cause| format!("password file {path:?}: {cause}"))?;
    let password = text.strip_suffix('\n').unwrap_or(&text);
    // BIRD's strings end at a quote or a line feed and know no escapes.
    if password.is_empty() || password.len() > KEY_MAX || password.contains(['"', '\n', '\r', '\0']) {
        return Err(format!("password file {path:?}: has to hold 1 to {KEY_MAX} bytes without quotes and line feeds"));
    }
    Ok(password.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::{Bgp, Gateway};

    fn attraction() -> Attraction {
        let auth = Some(AuthRef { source: "bgp".into(), key: "gw".into() });
        let bgp = Bgp { remote_asn: 0, local_asn: 0, remote_port: 0, local_port: 0, hold_time: 0, auth };
        let address = "169.254.100.150".parse().expect("address");
        Attraction {
            vips: vec![],
            gateways: vec![Gateway { name: "g".into(), address, protocol: Protocol::Bgp(bgp), bfd: None }],
        }
    }

    #[test]
    fn a_password_is_read_or_the_gateway_named() {
        let dir = tempfile::tempdir().expect("dir");
        let (passwords, faults) = read(Some(dir.path()), &attraction());
        assert_eq!(passwords, [Password::Missing]);
        assert!(faults[0].contains("gateway \"g\""), "{faults:?}");
        assert_eq!(read(None, &attraction()).0, [Password::Missing]);

        std::fs::create_dir(dir.path().join("bgp")).expect("secret");
        std::fs::write(dir.path().join("bgp/gw"), "s3cret\n").expect("key");
        assert_eq!(read(Some(dir.path()), &attraction()).0, [Password::Known("s3cret".into())]);
        std::fs::write(dir.path().join("bgp/gw"), "a\"; bad").expect("key");
        assert_eq!(read(Some(dir.path()), &attraction()).0, [Password::Missing]);
    }
}
