//! Network service platform: configuration watches and target registry of a trench.
