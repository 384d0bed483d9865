//! Attracts VIP traffic: drives BIRD and reports external connectivity.
