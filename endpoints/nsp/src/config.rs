//! The configuration file: read at start, watched, and backed by the last good text.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use meridio_common::Health;
use meridio_model::{Configuration, Fault, NspLists, plan};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::Error;

/// Between two looks at the file. A change counts when two looks in a row see the same text, so that a file that is being written is not
/// read half way: at most twice this time passes.
const LOOK: Duration = Duration::from_millis(100);
/// Key of the remarks in the health report.
const NOTE: &str = "configuration";

/// A configuration file and what is served of it.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    path: PathBuf,
    last_good: PathBuf,
    lists: watch::Sender<Arc<NspLists>>,
    /// The text that was judged last, or why the file could not be read.
    judged: Result<String, String>,
    /// Why the present file is not what is served; empty if it is.
    refused: Vec<String>,
    /// What was left out of what is served.
    left_out: Vec<Fault>,
}

impl ConfigFile {
    /// Reads the file. If it is faulty or absent, the last good one that lies beside `datasource` is served instead.
    ///
    /// # Errors
    /// With nothing stored: what is wrong with the file.
    pub(crate) fn load(path: &Path, datasource: &Path) -> Result<Self, Error> {
        let read = read(path);
        let mut file = Self {
            path: path.to_owned(),
            last_good: last_good_path(datasource),
            lists: watch::Sender::default(),
            judged: read.as_ref().map(String::clone).map_err(ToString::to_string),
            refused: Vec::new(),
            left_out: Vec::new(),
        };
        let refused = match read {
            Ok(text) => match Configuration::parse_with_warnings(&text) {
                Ok((configuration, left_out)) => {
                    file.accepted(&text, &configuration, left_out);
                    file.publish(configuration.to_nsp());
                    return Ok(file);
                }
                Err(faults) => Error::Faulty { path: path.to_owned(), faults },
            },
            Err(source) => Error::ConfigFile { path: path.to_owned(), source },
        };
        let stored = fs::read_to_string(&file.last_good).ok();
        let stored = stored.and_then(|text| Configuration::parse_with_warnings(&text).ok());
        let Some((configuration, left_out)) = stored else { return Err(refused) };
        file.refused(refused.to_string().lines().map(str::to_owned).collect());
        file.warn(left_out);
        file.publish(configuration.to_nsp());
        Ok(file)
    }

    /// What is served, always the latest.
    pub(crate) fn lists(&self) -> watch::Receiver<Arc<NspLists>> {
        self.lists.subscribe()
    }

    /// Follows the file until `stop`.
    pub(crate) async fn follow(mut self, health: Health, stop: CancellationToken) {
        health.note(NOTE, self.remarks());
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut seen = self.judged.clone();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = looks.tick() => {}
            }
            let path = self.path.clone();
            let Ok(text) = tokio::task::spawn_blocking(move || read(&path)).await else { continue };
            let text = text.map_err(|error| error.to_string());
            if text == seen && text != self.judged {
                let accepted = self.judge(text.clone());
                health.note(NOTE, self.remarks());
                if let Some(configuration) = accepted {
                    self.publish(configuration.to_nsp());
                }
            }
            seen = text;
        }
    }

    /// Tells the watches, if anything differs.
    fn publish(&self, lists: NspLists) {
        self.lists.send_if_modified(|served| {
            let changed = **served != lists;
            if changed {
                *served = Arc::new(lists);
            }
            changed
        });
    }

    /// Judges a text that the file had twice in a row; returns what is to be served.
    fn judge(&mut self, text: Result<String, String>) -> Option<Configuration> {
        let mut accepted = None;
        match &text {
            Err(error) => {
                let line = format!("configuration file {}: cannot be read: {error}", self.path.display());
                self.refused(vec![line]);
            }
            Ok(text) => match Configuration::parse_with_warnings(text) {
                Ok((configuration, left_out)) => {
                    self.accepted(text, &configuration, left_out);
                    accepted = Some(configuration);
                }
                Err(faults) => self.refused(self.lines(&faults.0)),
            },
        }
        self.judged = text;
        accepted
    }

    fn lines(&self, faults: &[Fault]) -> Vec<String> {
        faults.iter().map(|fault| format!("configuration file {}: {fault}", self.path.display())).collect()
    }

    /// For the health report: why the file is refused, and what is left out of what is served.
    fn remarks(&self) -> Vec<String> {
        [self.lines(&self.left_out), self.refused.clone()].concat()
    }

    /// Into the log once, not again with every change of something else.
    fn warn(&mut self, left_out: Vec<Fault>) {
        if self.left_out != left_out {
            for warning in &left_out {
                tracing::warn!(object = warning.object, reason = warning.reason, "configuration");
            }
            self.left_out = left_out;
        }
    }

    fn accepted(&mut self, text: &str, configuration: &Configuration, left_out: Vec<Fault>) {
        tracing::info!(
            file = %self.path.display(),
            trench = configuration.trench.name,
            conduits = configuration.conduits.len(),
            streams = configuration.streams.len(),
            flows = configuration.flows.len(),
            vips = configuration.vips.len(),
            gateways = configuration.gateways.len(),
            "configuration accepted"
        );
        self.refused.clear();
        self.warn(left_out);
        for warning in plan::warnings(configuration) {
            tracing::warn!(object = warning.object, reason = warning.reason, "configuration");
        }
        if let Err(error) = write_atomically(&self.last_good, text) {
            // Served all the same; only a restart with a faulty file would miss it.
            tracing::error!(file = %self.last_good.display(), %error, "last good configuration not stored");
        }
    }

    fn refused(&mut self, faults: Vec<String>) {
        for fault in &faults {
            tracing::error!("{fault}");
        }
        tracing::warn!("the configuration file is refused, the last good configuration stays in force");
        self.refused = faults;
        self.refused.push("the last good configuration stays in force: correct the file".to_owned());
    }
}

/// The document in a file; of a directory a document of its files, each a key, as Kubernetes mounts a ConfigMap.
fn read(path: &Path) -> std::io::Result<String> {
    if !path.is_dir() {
        return fs::read_to_string(path);
    }
    // The keys of a mount are links into one version, by way of this one: read there, they belong together.
    let version = fs::canonicalize(path.join("..data")).unwrap_or_else(|_| path.to_owned());
    let mut data = BTreeMap::new();
    for entry in fs::read_dir(version)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            let text = fs::read_to_string(entry.path());
            let named = |error: std::io::Error| std::io::Error::new(error.kind(), format!("{name}: {error}"));
            data.insert(name.clone(), text.map_err(named)?);
        }
    }
    // JSON is YAML.
    Ok(serde_json::json!({ "data": data }).to_string())
}

/// `<datasource>.configuration.yaml`.
fn last_good_path(datasource: &Path) -> PathBuf {
    let mut name = datasource.as_os_str().to_owned();
    name.push(".configuration.yaml");
    PathBuf::from(name)
}

/// A reader sees the old or the new text, also after a loss of power.
fn write_atomically(path: &Path, text: &str) -> std::io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|stored| stored == text) {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(parent)?;
    }
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let mut file = fs::File::create(&temporary)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "trench: {name: trench-a}\nvips: {items: [{name: v, address: 20.0.0.1/32, trench: trench-a}]}\n";

    fn vips(file: &watch::Receiver<Arc<NspLists>>) -> Vec<String> {
        file.borrow().vips.iter().map(|v| v.address.clone()).collect()
    }

    #[tokio::test]
    async fn a_faulty_file_leaves_the_last_good_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, db) = (dir.path().join("c.yaml"), dir.path().join("registry.db"));
        let missing = ConfigFile::load(&path, &db).unwrap_err().to_string();
        assert!(missing.starts_with("configuration file") && missing.contains("No such file"), "{missing}");
        fs::write(&path, GOOD.replace("/32", "").replace("name: v", "name: V")).unwrap();
        let faults = ConfigFile::load(&path, &db).unwrap_err().to_string();
        assert_eq!(faults.lines().count(), 2, "{faults}");

        fs::write(&path, GOOD).unwrap();
        let file = ConfigFile::load(&path, &db).unwrap();
        let lists = file.lists();
        let health = Health::detached("test");
        let stop = CancellationToken::new();
        let following = tokio::spawn(file.follow(health.clone(), stop.clone()));
        let wait = || tokio::time::sleep(Duration::from_millis(450));

        fs::write(&path, "trench: [").unwrap();
        wait().await;
        assert_eq!(vips(&lists), ["20.0.0.1/32"]);
        assert_eq!(health.report().notes["configuration"].len(), 2);

        // A rename, as Kubernetes does it, with a change.
        fs::write(dir.path().join("new"), GOOD.replace("20.0.0.1", "20.0.0.2")).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        wait().await;
        assert_eq!(vips(&lists), ["20.0.0.2/32"]);
        assert!(health.report().notes.is_empty());

        fs::remove_file(&path).unwrap();
        wait().await;
        assert_eq!(vips(&lists), ["20.0.0.2/32"]);
        stop.cancel();
        following.await.unwrap();
        let again = ConfigFile::load(&path, &db).unwrap();
        assert_eq!(vips(&again.lists()), ["20.0.0.2/32"]);
        assert_eq!(again.remarks().len(), 2);
    }

    #[tokio::test]
    async fn a_name_that_leads_nowhere_holds_up_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let (path, db) = (dir.path().join("c.yaml"), dir.path().join("registry.db"));
        let attractor = "attractors: {items: [{name: a, trench: trench-a, vips: [v], gateways: [gateway-x]}]}\n";
        let dangling = format!("{GOOD}{attractor}");
        // A new trench: nothing is stored.
        fs::write(&path, &dangling).unwrap();
        let file = ConfigFile::load(&path, &db).unwrap();
        let lists = file.lists();
        assert_eq!(vips(&lists), ["20.0.0.1/32"]);
        let (health, stop) = (Health::detached("test"), CancellationToken::new());
        let following = tokio::spawn(file.follow(health.clone(), stop.clone()));
        let wait = || tokio::time::sleep(Duration::from_millis(450));
        wait().await;
        let warning = format!(
            "configuration file {}: attractor a: names gateway \"gateway-x\", which does not exist: it goes without",
            path.display()
        );
        assert_eq!(health.report().notes["configuration"], [warning.as_str()]);

        let vip = ", {name: w, address: 20.0.0.2/32, trench: trench-a}]}";
        fs::write(&path, dangling.replacen("]}", vip, 1)).unwrap();
        wait().await;
        assert_eq!(vips(&lists), ["20.0.0.1/32", "20.0.0.2/32"]);
        assert_eq!(lists.borrow().attractors[0].vips.len(), 1);
        assert_eq!(health.report().notes["configuration"], [warning.as_str()]);

        // Refused: what is served has still its gap.
        fs::write(&path, "trench: [").unwrap();
        wait().await;
        let notes = health.report().notes["configuration"].clone();
        assert_eq!((notes.len(), &notes[0]), (3, &warning));
        stop.cancel();
        following.await.unwrap();
        let mut again = ConfigFile::load(&path, &db).unwrap();
        assert_eq!((vips(&again.lists()).len(), again.remarks()), (2, notes));

        let gateway = "gateways: {items: [{name: gateway-x, address: 10.0.0.1, protocol: static, trench: trench-a}]}\n";
        assert!(again.judge(Ok(format!("{dangling}{gateway}"))).is_some());
        assert_eq!(again.remarks(), [""; 0]);
    }

    /// Puts a version of the keys where a mounted ConfigMap has it: a directory behind a link, which is changed by a rename.
    fn mount(dir: &Path, version: &str, files: &[(&str, &str)]) {
        let inner = dir.join(version);
        fs::create_dir_all(&inner).unwrap();
        for (name, text) in files {
            fs::write(inner.join(name), text).unwrap();
            let link = dir.join(name);
            if !link.exists() {
                std::os::unix::fs::symlink(Path::new("..data").join(name), link).unwrap();
            }
        }
        std::os::unix::fs::symlink(version, dir.join("..data_tmp")).unwrap();
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
        for link in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).filter(|link| !link.exists()) {
            fs::remove_file(link).unwrap();
        }
    }

    #[tokio::test]
    async fn a_mounted_config_map_is_read_key_by_key() {
        let dir = tempfile::tempdir().unwrap();
        let (path, db) = (dir.path().join("config"), dir.path().join("registry.db"));
        let (trench, vip) = ("name: trench-a\n", "items:\n- name: v\n  address: 20.0.0.1/32\n  trench: trench-a\n");
        let keys = |vips| [("trench", trench), ("vips", vips), ("flows", "items: []\n")];
        mount(&path, "..1", &keys(vip));
        let file = ConfigFile::load(&path, &db).unwrap();
        let lists = file.lists();
        assert_eq!(vips(&lists), ["20.0.0.1/32"]);
        let (health, stop) = (Health::detached("test"), CancellationToken::new());
        let following = tokio::spawn(file.follow(health.clone(), stop.clone()));
        mount(&path, "..2", &keys(&vip.replace("20.0.0.1", "20.0.0.2")));
        tokio::time::sleep(Duration::from_millis(450)).await;
        assert_eq!(vips(&lists), ["20.0.0.2/32"]);
        for (version, odd) in [("..3", "meridio.yaml"), ("..4", "gateways")] {
            mount(&path, version, &[(odd, "")]);
            if version == "..4" {
                fs::remove_file(path.join(version).join(odd)).unwrap();
                fs::create_dir(path.join(version).join(odd)).unwrap();
            }
            tokio::time::sleep(Duration::from_millis(450)).await;
            assert_eq!(vips(&lists), ["20.0.0.2/32"]);
            let notes = health.report().notes;
            assert!(notes["configuration"].iter().any(|line| line.contains(odd)), "{notes:?}");
        }
        stop.cancel();
        following.await.unwrap();
    }
}
