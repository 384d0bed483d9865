//! Attracts VIP traffic: drives BIRD and reports external connectivity.
//!
//! One loop ([`agent`]) brings together what is wanted (the attractor of the NSP, the word of the load balancer) and what
//! is seen (BIRD, the kernel). Rendering ([`bird::render`]), judging ([`connectivity`]) and planning ([`kernel::plan`]) are pure.

pub mod agent;
pub mod bird;
pub mod connectivity;
pub mod drive;
pub mod error;
pub mod gateway;
pub mod kernel;
mod load_balancer;
mod nsp_client;
mod run;
pub mod secrets;
pub mod settings;

pub use run::run;
pub use settings::Settings;
