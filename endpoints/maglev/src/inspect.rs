//! What can be asked of a running engine: counters, and test runs of its programs.

use meridio_decision::layout::{Counter, FragmentKey};
use meridio_decision::{Decision, Reason};

use crate::engine::{Engine, failed};
use crate::error::Error;
use crate::live::{Counters, Hits, Live};
use crate::sys::{self, TestRun};

impl Engine {
    /// Everything that is counted.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn counters(&self) -> Result<Counters, Error> {
        Live::open(&self.settings.kernel.directory)?.counters()
    }

    /// Packets and bytes of each flow.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn flow_hits(&self) -> Result<Vec<Hits>, Error> {
        Ok(self.counters()?.flows)
    }

    /// Packets and bytes of each ready target.
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn target_hits(&self) -> Result<Vec<Hits>, Error> {
        Ok(self.counters()?.targets)
    }

    /// Packets and bytes by reason (see [`Reason`]).
    ///
    /// # Errors
    /// A map cannot be read.
    pub fn reasons(&self) -> Result<Vec<(Reason, Counter)>, Error> {
        Ok(self.counters()?.reasons)
    }

    /// Runs a program on a packet with its Ethernet header, without sending it anywhere.
    ///
    /// # Errors
    /// The kernel cannot.
    pub fn test_run(&mut self, ingress: bool, packet: &[u8], repeat: u32) -> Result<TestRun, Error> {
        let fd = self.kernel.program_fd(ingress)?;
        sys::test_run(fd, packet, repeat, 0).map_err(|e| Error::Load(format!("test run: {e}")))
    }

    /// As [`Engine::test_run`], once, of the ingress program on a super-packet (GRO, GSO) that stands for segments of so many bytes.
    ///
    /// # Errors
    /// The kernel cannot.
    pub fn test_run_super(&mut self, packet: &[u8], segment: u32) -> Result<TestRun, Error> {
        let fd = self.kernel.program_fd(true)?;
        sys::test_run(fd, packet, 1, segment).map_err(|e| Error::Load(format!("test run: {e}")))
    }

    /// Makes the program write down each decision, for [`Engine::last_decisions`].
    ///
    /// # Errors
    /// The map cannot be written.
    pub fn record(&mut self, on: bool) -> Result<(), Error> {
        self.config.change(|config| config.record = on as u32)
    }

    /// Forgets where first fragments went, for tests.
    ///
    /// # Errors
    /// The map cannot be read or written.
    pub fn forget_fragments(&mut self) -> Result<(), Error> {
        let map = &self.kernel.maps.fragments;
        let keys = map.keys(FragmentKey::default()).map_err(failed(map))?;
        keys.iter().try_for_each(|key| map.delete(key).map_err(failed(map)))
    }

    /// The last recorded decision of each CPU, as words in the order of [`Decision`]'s fields.
    ///
    /// # Errors
    /// The map cannot be read.
    pub fn last_decisions(&self) -> Result<Vec<Decision>, Error> {
        let map = &self.kernel.maps.last;
        let raw = map.decisions(self.kernel.cpus).map_err(failed(map))?;
        Ok(raw.iter().map(decision).collect())
    }

    /// Instructions of the ingress program, and instructions that the verifier walked.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn program_size(&mut self) -> Result<(u32, u32), Error> {
        self.kernel.program_size()
    }
}

fn decision(bytes: &[u8; 40]) -> Decision {
    let mut words = [0u32; 9];
    for (word, raw) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = raw.try_into().map(u32::from_ne_bytes).unwrap_or_default();
    }
    let [verdict, reason, flow, counter, slot, row, identifier, target, nat_port] = words;
    Decision { verdict, reason, flow, counter, slot, row, identifier, target, nat_port }
}
