//! Settings of `meridio demo`.

use std::path::PathBuf;

/// Settings of the demo.
#[derive(clap::Args, Clone, Debug)]
pub struct Settings {
    /// Tells demos on one machine apart: 1 to 6 lower-case letters and digits
    #[arg(long, default_value = "a")]
    pub id: String,
    /// End after traffic and events with an exit status, instead of a live view
    #[arg(long)]
    pub once: bool,
    /// Write what was measured to this file, as JSON
    #[arg(long)]
    pub report: Option<PathBuf>,
    /// With --once: stay up until Ctrl-C before cleaning up, whatever the outcome
    #[arg(long)]
    pub keep: bool,
    /// Run only these events, separated by commas
    #[arg(long, value_delimiter = ',')]
    pub only_event: Vec<String>,
    /// Run no events
    #[arg(long)]
    pub skip_events: bool,
    /// TCP connections to each VIP
    #[arg(long, default_value_t = 5000)]
    pub tcp: u64,
    /// UDP source ports to each VIP, five packets from each
    #[arg(long, default_value_t = 4000)]
    pub udp_ports: u64,
    /// Log level of the components
    #[arg(long, default_value = "INFO")]
    pub log_level: String,
    /// Directory of the components' logs; by default /tmp/meridio-demo-ID, removed at the end unless something failed
    #[arg(long)]
    pub log_dir: Option<PathBuf>,
    /// The BIRD 2 program
    #[arg(long, default_value = "bird")]
    pub bird: String,
    /// The meridio binary that the pods run; by default this one
    #[arg(long)]
    pub binary: Option<PathBuf>,
}

impl Settings {
    /// Every fault of the settings, one line each.
    pub fn validate(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let fits = (1..=6).contains(&self.id.len())
            && self.id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
        if !fits {
            faults.push(format!(
                "--id {:?}: 1 to 6 lower-case letters and digits are needed, they become part of names",
                self.id
            ));
        }
        let known = crate::events::names();
        for name in self.only_event.iter().filter(|name| !known.contains(name)) {
            faults.push(format!("--only-event {name:?}: there is no such event; there are {}", known.join(", ")));
        }
        if let Some(binary) = self.binary.as_ref().filter(|binary| !binary.is_file()) {
            faults.push(format!("--binary {}: no such file", binary.display()));
        }
        faults
    }
}
