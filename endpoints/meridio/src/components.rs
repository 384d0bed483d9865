//! The subcommands: one for each component that this build has, and the user's tools.

use tokio_util::sync::CancellationToken;

/// How a component writes logs.
pub(crate) struct Log<'a> {
    /// `service_id` of each line.
    pub service_id: &'static str,
    /// Level of the settings.
    pub level: &'a str,
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
                    #[cfg(feature = "target")]
                    Self::Target(_) => Vec::new(),
                }
            }

            /// How it logs; `None` for tools that talk to a person.
            pub(crate) fn log(&self) -> Option<Log<'_>> {
                match self {
                    $(
                        #[cfg(feature = $feature)]
                        Self::$variant($settings) => Some(Log { service_id: $id, level: $level }),
                    )+
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
                    #[cfg(feature = "target")]
                    Self::Target(target) => target.run(stop).await,
                }
            }
        }
    };
}

components! {
    /// Attracts VIP traffic: drives BIRD and reports external connectivity
    "frontend", Frontend, meridio_frontend, "Meridio-frontend", |settings| &settings.log_level;
    /// Example application of a target: says its host name over TCP and UDP
    "target-app", TargetApp, meridio_target, "Meridio-target", |_settings| "INFO";
}
