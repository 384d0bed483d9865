//! The CA on disk.

use anyhow::Context;
use nsm_identity::Authority;
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{ErrorKind, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

const CA_FILE: &str = "ca.pem";

/// Loads the CA of `directory` or creates it. Issuers that start at the same time in the same directory get the same CA: a lock
/// lets one create it, and it appears by rename, whole or not at all.
pub(crate) fn load_or_create(directory: &Path, trust_domain: &str) -> anyhow::Result<Authority> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("state directory {}", directory.display()))?;
    let lock_path = directory.join("ca.lock");
    let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&lock_path);
    let lock = lock.with_context(|| format!("lock {}", lock_path.display()))?;
    flock(&lock, FlockOperation::LockExclusive).with_context(|| format!("lock {}", lock_path.display()))?;
    let path = directory.join(CA_FILE);
    match fs::read_to_string(&path) {
        Ok(pem) => Authority::from_pem(trust_domain, &pem).with_context(|| format!("CA in {}", path.display())),
        Err(cause) if cause.kind() == ErrorKind::NotFound => {
            let authority = Authority::generate(trust_domain)?;
            write_atomically(directory, &path, &authority.to_pem())
                .with_context(|| format!("CA in {}", path.display()))?;
            tracing::info!(path = %path.display(), "CA created");
            Ok(authority)
        }
        Err(cause) => Err(cause).with_context(|| format!("CA in {}", path.display())),
    }
}

fn write_atomically(directory: &Path, path: &Path, text: &str) -> std::io::Result<()> {
    let temporary = directory.join("ca.pem.new");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}
