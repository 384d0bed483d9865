//! Attracts VIP traffic: drives BIRD and reports external connectivity.

pub mod agent;
pub mod bird;
pub mod connectivity;
pub mod error;
pub mod gateway;
pub mod kernel;
pub mod secrets;
