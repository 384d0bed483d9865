//! Client of the ambassador API, for applications.
