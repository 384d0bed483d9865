//! A cluster with an observer for each trench and the watch over the primary network: what the demo and the end-to-end tests start from.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio_util::sync::CancellationToken;

use crate::cluster::{Blueprint, Cluster};
use crate::status::Observer;
use crate::traffic::sniffer::Sniffer;
use crate::traffic::{Generator, path};

/// Patience for a TAPA to listen.
const LISTEN: Duration = Duration::from_secs(30);

/// A cluster that can be watched. Dropping it ends and removes everything.
#[derive(Debug)]
pub struct Stage {
    /// One for each trench, in order.
    pub observers: Vec<Observer>,
    /// Watch over the primary network.
    pub sniffer: Sniffer,
    /// The cluster.
    pub cluster: Arc<Cluster>,
}

impl Stage {
    /// Namespaces, cables, generators and the watch; no component runs yet.
    ///
    /// # Errors
    /// As for [`Cluster::build`].
    pub fn build(blueprint: Blueprint, stop: &CancellationToken, say: &mut dyn FnMut(&str)) -> Result<Self> {
        let cluster = Arc::new(Cluster::build(blueprint, say)?);
        let mut observers = Vec::new();
        for trench in cluster.blueprint().trenches.clone() {
            let gateway = cluster.pod(&trench.pod("gateway"))?;
            let generator = Arc::new(Generator::new(&gateway.namespace)?);
            path::install(&gateway.namespace, &trench)?;
            observers.push(Observer::new(Arc::clone(&cluster), trench, generator, stop.clone())?);
        }
        let trench = &observers.first().context("no trench")?.trench;
        let sniffer = Sniffer::start(cluster.fabric()?.primary(), trench.vip4, trench.vip6)?;
        Ok(Stage { observers, sniffer, cluster })
    }

    /// Proves that the watch over the primary network counts.
    ///
    /// # Errors
    /// If it does not.
    pub fn prove_sniffer(&mut self) -> Result<()> {
        let observer = self.observers.first().context("no trench")?;
        let pod = self.cluster.pod(&observer.trench.pod("nsp"))?;
        let router: [IpAddr; 2] = [[10, 244, 0, 254].into(), [0xfd10, 0x244, 0, 0, 0, 0, 0, 0x254].into()];
        self.sniffer.prove(&pod.namespace, observer.vips(), router)
    }

    /// Starts all components, opens every target's stream, and waits until every trench is whole. Returns how long that took.
    ///
    /// # Errors
    /// If a trench is not whole after `patience`; the message says what is missing.
    pub fn up(&self, patience: Duration, say: &mut dyn FnMut(&str)) -> Result<Duration> {
        let begin = Instant::now();
        self.cluster.start()?;
        for observer in &self.observers {
            for target in observer.trench.target_pods() {
                observer.open(&target, LISTEN)?;
            }
        }
        for observer in &self.observers {
            observer.wait_whole(&observer.targets_of_trench(), patience, say)?;
        }
        Ok(begin.elapsed())
    }
}
