//! Passwords of BGP sessions, from a directory with one sub-directory per secret and one file per key
//! (the shape in which Kubernetes mounts secrets).

use std::collections::BTreeMap;
use std::path::Path;

use crate::bird::render::Password;
use crate::gateway::{Attraction, AuthRef, Gateway};

/// Longest TCP MD5 key of Linux (`TCP_MD5SIG_MAXKEYLEN`).
const KEY_MAX: usize = 80;

/// The passwords that were read last, of the gateways that there are. A file that cannot be used any more takes no
/// password away: the session it belongs to works.
#[derive(Default)]
pub struct Secrets {
    known: BTreeMap<AuthRef, String>,
}

impl Secrets {
    /// One password per gateway, in the order of the gateways, and what is wrong with those that cannot be read.
    pub fn read(&mut self, dir: Option<&Path>, attraction: &Attraction) -> (Vec<Password>, Vec<String>) {
        let mut faults = Vec::new();
        let mut last = std::mem::take(&mut self.known);
        for (gateway, auth) in attraction.gateways.iter().filter_map(|gateway| Some((gateway, gateway.auth()?))) {
            let old = last.remove(auth).or_else(|| self.known.get(auth).cloned());
            let new = read_one(dir, auth).map_err(|text| {
                let outcome = if old.is_some() { "goes on with its last password" } else { "is left out" };
                faults.push(format!("gateway {:?} {outcome}: {text}", gateway.name));
            });
            if let Some(password) = new.ok().or(old) {
                self.known.insert(auth.clone(), password);
            }
        }
        let password = |gateway: &Gateway| match gateway.auth() {
            None => Password::None,
            Some(auth) => self.known.get(auth).cloned().map_or(Password::Missing, Password::Known),
        };
        (attraction.gateways.iter().map(password).collect(), faults)
    }
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
    use crate::gateway::{Bgp, Protocol};

    fn attraction() -> Attraction {
        let auth = Some(AuthRef { source: "bgp".into(), key: "gw".into() });
        let bgp = Bgp { remote_asn: 0, local_asn: 0, remote_port: 0, local_port: 0, hold_time: 0, auth };
        let address = "169.254.100.150".parse().expect("address");
        Attraction {
            vips: vec![],
            gateways: vec![Gateway { name: "g".into(), address, protocol: Protocol::Bgp(bgp), bfd: None }],
        }
    }

    fn known(password: &str) -> Vec<Password> {
        vec![Password::Known(password.into())]
    }

    #[test]
    fn a_password_is_read_or_the_gateway_named() {
        let dir = tempfile::tempdir().expect("dir");
        let read = |dir: Option<&Path>| Secrets::default().read(dir, &attraction());
        let (passwords, faults) = read(Some(dir.path()));
        assert_eq!(passwords, [Password::Missing]);
        assert!(faults[0].contains("gateway \"g\" is left out"), "{faults:?}");
        assert_eq!(read(None).0, [Password::Missing]);

        std::fs::create_dir(dir.path().join("bgp")).expect("secret");
        std::fs::write(dir.path().join("bgp/gw"), "s3cret\n").expect("key");
        assert_eq!(read(Some(dir.path())), (known("s3cret"), vec![]));
        std::fs::write(dir.path().join("bgp/gw"), "a\"; bad").expect("key");
        assert_eq!(read(Some(dir.path())).0, [Password::Missing]);
    }

    #[test]
    fn a_password_that_was_read_stays_as_long_as_a_gateway_wants_it() {
        let dir = tempfile::tempdir().expect("dir");
        let (file, mut secrets) = (dir.path().join("bgp/gw"), Secrets::default());
        std::fs::create_dir(dir.path().join("bgp")).expect("secret");
        std::fs::write(&file, "s3cret").expect("key");
        // Two gateways may share a password.
        let mut two = attraction();
        two.gateways.push(Gateway { name: "h".into(), ..two.gateways[0].clone() });
        assert_eq!(secrets.read(Some(dir.path()), &two).1, Vec::<String>::new());

        std::fs::write(&file, "a\"; bad").expect("key");
        let (passwords, faults) = secrets.read(Some(dir.path()), &two);
        assert_eq!(passwords, [known("s3cret"), known("s3cret")].concat());
        assert!(faults.len() == 2 && faults[1].contains("\"h\" goes on with its last password"), "{faults:?}");
        std::fs::remove_file(&file).expect("removal");
        assert_eq!(secrets.read(Some(dir.path()), &attraction()).0, known("s3cret"));

        std::fs::write(&file, "another").expect("key");
        assert_eq!(secrets.read(Some(dir.path()), &attraction()), (known("another"), vec![]));
        std::fs::remove_file(&file).expect("removal");
        secrets.read(Some(dir.path()), &Attraction::default());
        assert_eq!(secrets.read(Some(dir.path()), &attraction()).0, [Password::Missing], "nobody wanted it");
    }
}
