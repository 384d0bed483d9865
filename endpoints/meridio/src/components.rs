//! The subcommands: one for each component that this build has, and the user's tools.

use tokio_util::sync::CancellationToken;

/// How a component writes logs.
pub(crate) struct Log {
    /// `service_id` of each line.
    pub service_id: &'static str,
    /// Level of the settings.
    pub level: String,
}

/// Level of components that have no setting of their own for it.
fn common_level() -> String {
    std::env::var("LOG_LEVEL").unwrap_or_else(|_| "INFO".to_owned())
}

/// Declares the subcommands. Each component is `feature, Variant, crate, service id`; its `Settings` have `validate()` and a
/// `log_level`, its `run` takes them and the stop token.
macro_rules! components {
    ($($(#[doc = $help:literal])+ $feature:literal, $variant:ident, $krate:ident, $id:literal, |$settings:ident| $level:expr;)+) => {
        /// What to run.
        #[derive(clap::Subcommand, Debug)]
        pub(crate) enum Command {
            $(
                $(#[doc = $help])+
                #[cfg(feature = $feature)]
                $variant(Box<$krate::Settings>),
            )+
            /// Shows the whole trench at work on this machine, in namespaces
            #[cfg(feature = "demo")]
            Demo(Box<meridio_demo::Settings>),
            /// Says what becomes of a packet, and why: flow, row, target, or the reason for dropping it
            #[cfg(feature = "stateless-lb")]
            Why(Box<meridio_stateless_lb::inspect::why::Settings>),
            /// Prints what becomes of the packets that pass a running load balancer
            #[cfg(feature = "stateless-lb")]
            Trace(Box<meridio_stateless_lb::inspect::trace::Settings>),
            /// Opens, closes and watches streams at the ambassador socket of a TAPA
            #[cfg(feature = "target")]
            #[command(subcommand)]
            Target(crate::target::Target),
        }

        impl Command {
            /// Every fault of the settings, one line each.
            pub(crate) fn validate(&self) -> Vec<String> {
                match self {
                    $(
                        #[cfg(feature = $feature)]
                        Self::$variant(settings) => settings.validate(),
                    )+
                    #[cfg(feature = "demo")]
                    Self::Demo(settings) => settings.validate(),
                    #[cfg(feature = "stateless-lb")]
                    Self::Why(settings) => settings.validate(),
                    #[cfg(feature = "stateless-lb")]
                    Self::Trace(settings) => settings.validate(),
                    #[cfg(feature = "target")]
                    Self::Target(_) => Vec::new(),
                }
            }

            /// How it logs; `None` for tools that talk to a person.
            pub(crate) fn log(&self) -> Option<Log> {
                match self {
                    $(
                        #[cfg(feature = $feature)]
                        Self::$variant($settings) => Some(Log { service_id: $id, level: $level }),
                    )+
                    #[cfg(feature = "demo")]
                    Self::Demo(_) => None,
                    #[cfg(feature = "stateless-lb")]
                    Self::Why(_) | Self::Trace(_) => None,
                    #[cfg(feature = "target")]
                    Self::Target(_) => None,
                }
            }

            /// Runs until done or stopped.
            pub(crate) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
                match self {
                    $(
                        #[cfg(feature = $feature)]
                        Self::$variant(settings) => $krate::run(*settings, stop).await,
                    )+
                    #[cfg(feature = "demo")]
                    Self::Demo(settings) => meridio_demo::run(*settings, stop).await,
                    #[cfg(feature = "stateless-lb")]
                    Self::Why(settings) => meridio_stateless_lb::inspect::why::run(&settings),
                    #[cfg(feature = "stateless-lb")]
                    Self::Trace(settings) => meridio_stateless_lb::inspect::trace::run(*settings, stop).await,
                    #[cfg(feature = "target")]
                    Self::Target(target) => target.run(stop).await,
                }
            }
        }
    };
}

components! {
    /// Development issuer of SPIFFE identities: the Workload API without SPIRE
    "identity", Identity, meridio_identity, "Meridio-identity", |_settings| common_level();
    /// Embedded Network Service Mesh of one node: registry, manager and kernel forwarder
    "nsm", Nsm, meridio_nsm, "Meridio-nsm", |settings| settings.log_level.clone();
    /// Serves configuration and targets of a trench (network service platform)
    "nsp", Nsp, meridio_nsp, "Meridio-nsp", |settings| settings.log_level.clone();
    /// Allocates the addresses of conduits
    "ipam", Ipam, meridio_ipam, "Meridio-ipam", |settings| settings.log_level.clone();
    /// Bridges a node's targets and load balancers
    "proxy", Proxy, meridio_proxy, "Meridio-proxy", |settings| settings.log_level.clone();
    /// Spreads VIP traffic over targets: loads and feeds the eBPF load balancer
    "stateless-lb", StatelessLb, meridio_stateless_lb, "Meridio-LB", |settings| settings.log_level.clone();
    /// Attracts VIP traffic: drives BIRD and reports external connectivity
    "frontend", Frontend, meridio_frontend, "Meridio-frontend", |settings| settings.log_level.clone();
    /// Target access point ambassador: turns a pod into a target
    "tapa", Tapa, meridio_tapa, "Meridio-tapa", |settings| settings.log_level.clone();
    /// Example application of a target: says its host name over TCP and UDP
    "target-app", TargetApp, meridio_target, "Meridio-target", |_settings| common_level();
}
